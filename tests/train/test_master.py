"""fp32 master weights: 16-bit parameters are stepped as fp32 ones, and a state that was saved goes on bit for bit."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from lemo.config import DataConfig, LoraConfig, ModelConfig, RunConfig, SparsityConfig, TrainingConfig
from lemo.eval.perplexity import evaluate_loss
from lemo.train.collate import WindowCollator
from lemo.train.master import MASTER, MasterWeights
from lemo.train.run import train
from lemo.train.trainer import LemoTrainer
from tests.train.test_trainer import arguments, dataset, seeded_model
from tests.train.tiny import save_tiny_model, words

MAKERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
}


def gradients(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 4, generator=generator).bfloat16() for _ in range(steps)]


def stepped(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, steps: list[torch.Tensor]) -> None:
    for gradient in steps:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
        parameter.grad = None


@pytest.mark.parametrize("kind", MAKERS)
def test_a_16_bit_parameter_is_the_rounded_32_bit_one(kind):
    start = torch.linspace(-1, 1, 32).view(8, 4).bfloat16()
    wide, narrow = nn.Parameter(start.float()), nn.Parameter(start.clone())
    reference, optimizer = MAKERS[kind]([wide]), MAKERS[kind]([narrow])
    MasterWeights(optimizer)
    for gradient in gradients(20):
        stepped(reference, wide, [gradient])
        stepped(optimizer, narrow, [gradient])
        assert torch.equal(narrow.data, wide.data.bfloat16())
    plain = nn.Parameter(start.clone())
    stepped(MAKERS[kind]([plain]), plain, gradients(20))
    assert not torch.equal(plain.data, narrow.data), "else the copies would be for nothing"


def test_moments_fall_again():
    parameter = nn.Parameter(torch.zeros(8, 4, dtype=torch.bfloat16))
    optimizer = MAKERS["adamw"]([parameter])
    copies = MasterWeights(optimizer)
    stepped(optimizer, parameter, [torch.ones(8, 4)] * 3)
    moment = optimizer.state[copies.pairs[0][1]]["exp_avg_sq"]
    before = moment.clone()
    stepped(optimizer, parameter, [torch.zeros(8, 4)] * 3)
    assert moment.dtype == torch.float32 and bool((moment < before).all())


@pytest.mark.parametrize("kind", MAKERS)
def test_a_saved_state_goes_on_bit_for_bit(kind, tmp_path):
    steps = gradients(8)
    runs = []
    for interrupted in (False, True):
        parameter = nn.Parameter(torch.linspace(-1, 1, 32).view(8, 4).bfloat16())
        optimizer = MAKERS[kind]([parameter])
        copies = MasterWeights(optimizer)
        stepped(optimizer, parameter, steps[:4])
        if interrupted:
            torch.save((optimizer.state_dict(), parameter.data), tmp_path / "o.pt")
            state, data = torch.load(tmp_path / "o.pt")
            parameter = nn.Parameter(data)
            optimizer = MAKERS[kind]([parameter])
            copies = MasterWeights(optimizer)
            optimizer.load_state_dict(state)
        stepped(optimizer, parameter, steps[4:])
        runs.append((parameter.data, copies.pairs[0][1].data))
    assert all(torch.equal(whole, resumed) for whole, resumed in zip(*runs, strict=True))


def test_a_state_of_before_starts_from_the_parameters():
    parameter = nn.Parameter(torch.ones(8, 4, dtype=torch.bfloat16))
    old = MAKERS["adamw"]([parameter])
    stepped(old, parameter, gradients(2))
    optimizer = MAKERS["adamw"]([parameter])
    copies = MasterWeights(optimizer)
    optimizer.load_state_dict(copy.deepcopy(old.state_dict()))
    held = copies.pairs[0][1]
    assert torch.equal(held.data, parameter.data.float())
    stepped(optimizer, parameter, gradients(1))
    assert optimizer.state[held]["exp_avg"].dtype == torch.float32


def test_what_has_no_gradient_is_left_alone():
    with_one, without, wide = (
        nn.Parameter(torch.ones(4, dtype=t)) for t in (torch.bfloat16, torch.bfloat16, torch.float32)
    )
    optimizer = MAKERS["adamw"]([with_one, without, wide])
    copies = MasterWeights(optimizer)
    assert [pair[0] for pair in copies.pairs] == [with_one, without], "32 bits need no copy"
    for _ in range(2):
        with_one.grad = torch.ones(4, dtype=torch.bfloat16)
        optimizer.step()
    assert MASTER not in optimizer.state[copies.pairs[1][1]]
    without.grad = torch.ones(4, dtype=torch.bfloat16)
    optimizer.step()
    assert bool((copies.pairs[1][1] < 1).all())


def trained(folder: Path, *, master: bool, resume: str | None = None) -> tuple[LemoTrainer, dict[str, torch.Tensor]]:
    model = seeded_model().bfloat16()
    trainer = LemoTrainer(
        model=model,
        args=arguments(folder, num_train_epochs=1, save_strategy="steps", save_steps=3, learning_rate=1e-4),
        train_dataset=dataset(6),
        data_collator=WindowCollator(),
        console=Console(file=io.StringIO()),
        master_weights=master,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, model.state_dict()


def test_a_trainer_keeps_them_through_a_checkpoint(tmp_path):
    trainer, whole = trained(tmp_path / "whole", master=True)
    _, resumed = trained(tmp_path / "again", master=True, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    dtypes = {value.dtype for state in trainer.optimizer.state.values() for value in state.values() if value.dim()}
    assert dtypes == {torch.float32}
    _, plain = trained(tmp_path / "plain", master=False)
    assert any(not torch.equal(whole[name], plain[name]) for name in whole)


def test_lemo_train_keeps_them(tmp_path):
    save_tiny_model(tmp_path / "model", layers=2)
    (tmp_path / "train.txt").write_text(words(300, seed=1))
    run = RunConfig(
        output=str(tmp_path / "run"),
        model=ModelConfig(path=str(tmp_path / "model"), dtype="bfloat16"),
        data=DataConfig(train=(str(tmp_path / "train.txt"),), window_tokens=64),
        sparsity=SparsityConfig(block_size=16, context_window=0),
        lora=LoraConfig(rank=2),
        training=TrainingConfig(max_steps=2, save_steps=1),
    )
    train(run, evaluate_loss, console=Console(file=io.StringIO()))
    states = [
        torch.load(folder / "optimizer.pt")["state"].values()
        for folder in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    ]
    assert states and all(MASTER in state and state["exp_avg_sq"].dtype == torch.float32 for state in states[-1])
