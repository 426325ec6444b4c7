"""What each of two gloo processes runs: every scenario once, results in a folder for the tests to judge."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from lemo.runtime.attach import attach
from lemo.runtime.model import decoder_layers
from tests.distributed.group import join_group
from tests.integration.plans import BLOCK, documents, exact, keep_all, padded, skipping
from tests.runtime.oracle import tiny_model

WORLD = 2
PLANS = {
    "keep_all": keep_all,
    "skip_all": skipping,
    "skip_kept": lambda m: skipping(m, kv="kept"),
    "rows": exact,
    "pairs": lambda m: exact(m, gradient="pairs"),
    "local": lambda m: exact(m, 0.1, gradient="keys", context_window=2 * BLOCK),
}
WRAPPERS = ("ddp", "fsdp2")
ORDERS = ("before", "after")


def batch_of(rank: int, kind: str = "ragged") -> dict[str, torch.Tensor]:
    """This rank's two documents; `one_dense`: rank 1's carry loss on every token, so that nothing can be skipped."""
    samples = documents(2 * WORLD, seed=11)[2 * rank : 2 * rank + 2]
    if kind == "one_dense" and rank == 1:
        samples = [{"input_ids": s["input_ids"], "labels": s["input_ids"]} for s in samples]
    return padded(samples)


def marked(plan: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs; under the plan `local` the loss rows of every other block attend locally."""
    if plan != "local":
        return inputs
    carry = torch.nn.functional.pad(inputs["labels"][:, 1:] != -100, (0, 1))
    return inputs | {"local_rows": carry & (torch.arange(carry.shape[1]) // BLOCK % 2 == 1)}


def whole_batch(kind: str = "ragged") -> dict[str, torch.Tensor]:
    """All ranks' documents in one batch."""
    parts = [batch_of(rank, kind) for rank in range(WORLD)]
    longest = max(part["input_ids"].shape[1] for part in parts)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.cat([torch.nn.functional.pad(p[name], (0, longest - p[name].shape[1]), value=v) for p in parts])
        for name, v in fill.items()
    }


def items(kind: str = "ragged") -> torch.Tensor:
    """Supervised tokens of all ranks."""
    return (whole_batch(kind)["labels"][:, 1:] != -100).sum()


def wrap(model, wrapper: str):
    """DDP; or FSDP2 of every layer and the root, `fsdp2_head` of the LM head too."""
    if wrapper == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    if wrapper == "fsdp2_head":
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def outcome(model, inputs, scale: float = 1.0) -> dict:
    """Loss and whole gradients of one step."""
    loss = model(**inputs).loss
    (loss * scale).backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            found[name.removeprefix("module.")] = grad.clone()
    return {"loss": loss.detach(), "gradients": found}


def step(rank: int, wrapper: str, order: str | None, plan: str, *, kind: str = "ragged", **options) -> dict:
    """One training step of a wrapped model; `order` None: without lemo."""
    checkpointed = options.pop("checkpointed", False)
    model = tiny_model()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    handle = None
    if order == "before":
        handle = attach(model, PLANS[plan](model), **options)
    wrapped = wrap(model, wrapper)
    if order == "after":
        handle = attach(wrapped, PLANS[plan](model), **options)
    runs = [0] * len(decoder_layers(model))
    for index, layer in enumerate(decoder_layers(model)):

        def count(module, args, index=index):
            runs[index] += 1

        layer.register_forward_pre_hook(count)
    inputs = marked(plan, batch_of(rank, kind)) | {"num_items_in_batch": items(kind)}
    result = outcome(wrapped, inputs, scale=WORLD) | {"runs": runs}
    if handle is not None:
        result |= {"dense": handle.dense_batches, "sparse": handle.sparse_batches, "notes": handle.notes}
        result["detach"] = try_detach(handle)
    return result


def try_detach(handle) -> str | None:
    """What detaching says; None when it works."""
    try:
        handle.detach()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def alone(plan: str, kind: str = "ragged") -> dict:
    """One process on the whole batch."""
    model = tiny_model()
    with attach(model, PLANS[plan](model), self_test=False):
        return outcome(model, marked(plan, whole_batch(kind)) | {"num_items_in_batch": items(kind)})


def two_steps(rank: int, wrapper: str, order: str | None) -> dict:
    """Weights after two optimizer steps with accumulation, through a sharded or replicated optimizer."""
    model = tiny_model()
    handle = attach(model, PLANS["skip_all"](model)) if order == "before" else None
    wrapped = wrap(model, wrapper)
    if order == "after":
        handle = attach(wrapped, PLANS["skip_all"](model))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        for _ in range(2):
            loss = wrapped(**batch_of(rank), num_items_in_batch=2 * items()).loss
            (loss * WORLD).backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    weights = {}
    for name, p in wrapped.named_parameters():
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        weights[name.removeprefix("module.")] = whole.detach().clone()
    return {"losses": torch.stack(losses), "weights": weights, "sparse": handle.sparse_batches}


def train(rank: int, plan: str | None, folder: Path) -> dict:
    """Transformers' Trainer over DDP: loss curve and weights."""
    from transformers import Trainer, TrainingArguments

    model = tiny_model()
    handle = None if plan is None else attach(model, PLANS[plan](model), loss="model", self_test=False)
    settings = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=documents(16), data_collator=padded)
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"curve": curve, "weights": {n: p.detach().clone() for n, p in model.named_parameters()}}
    return result | {"sparse": 0 if handle is None else handle.sparse_batches}


def scenarios(rank: int, folder: Path):
    """(name, function) of everything that the tests look at, in the same order on every rank."""
    for wrapper in WRAPPERS:
        for plan in PLANS:
            for loss in ("model", "segmented") if plan == "keep_all" else ("segmented",):
                for order in ORDERS:
                    yield (
                        f"{wrapper}-{order}-{plan}-{loss}",
                        lambda w=wrapper, o=order, p=plan, x=loss: step(rank, w, o, p, loss=x),
                    )
        yield f"{wrapper}-plain", lambda w=wrapper: step(rank, w, None, "keep_all")
        yield f"{wrapper}-checkpointed", lambda w=wrapper: step(rank, w, "after", "skip_all", checkpointed=True)
        for order in ORDERS:
            yield f"{wrapper}-{order}-steps", lambda w=wrapper, o=order: two_steps(rank, w, o)
            for plan in ("skip_all", "rows"):
                yield (
                    f"{wrapper}-{order}-{plan}-one_dense",
                    lambda w=wrapper, o=order, p=plan: step(rank, w, o, p, kind="one_dense"),
                )
    for order in ORDERS:
        yield f"fsdp2_head-{order}", lambda o=order: step(rank, "fsdp2_head", o, "skip_all", segment_rows=16)
    for plan in PLANS:
        yield f"alone-{plan}", lambda p=plan: alone(p)
        yield f"alone-{plan}-one_dense", lambda p=plan: alone(p, "one_dense")
    for plan in (None, "keep_all", "skip_all"):
        yield f"trainer-{plan}", lambda p=plan: train(rank, p, folder)


def main(rank: int, folder: Path) -> None:
    """Runs all scenarios on one rank."""
    join_group(rank, WORLD, folder, seconds=30)
    for name, run in scenarios(rank, folder):
        try:
            result = run()
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, folder / f"{name}.{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
