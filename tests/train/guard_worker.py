"""What each of two gloo processes runs for the tests of guards: numbers that are not finite, and signals, in one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch.distributed as dist
from transformers import Trainer

from lemo.config import SparsityConfig
from lemo.train.checkpoint import SaveOnRequest
from lemo.train.trainer import LemoTrainer
from tests.distributed import train_worker
from tests.distributed.group import join_group
from tests.distributed.train_worker import WORLD


def run(folder: Path, name: str, *, resume: bool = False, **training) -> dict:
    """A dense run, the steps it skipped, and a sum of its weights."""
    found: dict = {}
    prepare = train_worker.recipe

    def dense(*args, **kwargs):
        return dataclasses.replace(prepare(*args, **kwargs), sparsity=SparsityConfig(enabled=False))

    train = LemoTrainer.train

    def watched(self, *args, **kwargs):
        output = train(self, *args, **kwargs)
        found["skipped"] = self.guard.skipped
        found["weights"] = [float(p.detach().double().sum()) for p in self.model.parameters() if p.requires_grad]
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_worker, "recipe", dense)
        patch.setattr(LemoTrainer, "train", watched)
        return train_worker.run(folder, name, resume=resume, **training) | found


def spoiled(folder: Path, rank: int, name: str) -> dict:
    """The second process's loss, or its gradient before the processes' are added, is NaN in step 2."""
    step = Trainer.training_step

    def spoil(self, model, inputs, *args, **kwargs):
        bad = self.state.global_step == 1 and rank == 1
        hooks = []
        if bad and name == "gradient":
            parameter = next(p for p in model.parameters() if p.requires_grad)
            hooks = [parameter.register_hook(lambda grad: grad * math.nan)]
        found = step(self, model, inputs, *args, **kwargs)
        for hook in hooks:
            hook.remove()
        return found * math.nan if bad and name == "loss" else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", spoil)
        return run(folder, name)


def cut(folder: Path, rank: int) -> dict:
    """Only the second process gets the signal, in a batch of step 3."""
    after = SaveOnRequest.on_substep_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return after(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SaveOnRequest, "on_substep_end", interrupt)
        return run(folder, "cut", gradient_accumulation_steps=3)


def main(rank: int, folder: Path) -> None:
    """Runs all scenarios on one process."""
    join_group(rank, WORLD, folder, seconds=60)
    scenarios = {
        "loss": lambda: spoiled(folder, rank, "loss"),
        "gradient": lambda: spoiled(folder, rank, "gradient"),
        "whole": lambda: run(folder, "whole", gradient_accumulation_steps=3),
        "cut": lambda: cut(folder, rank),
        "resumed": lambda: run(folder, "cut", resume=True, gradient_accumulation_steps=3),
    }
    for name, scenario in scenarios.items():
        try:
            result = scenario()
        except Exception:
            result = {"error": traceback.format_exc()}
        (folder / f"{name}.{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
