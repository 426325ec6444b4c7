"""What peers are given and give back, and the reading of method names."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lemo.errors import LemoError
from lemo.train.four_bits import match_dtype, pack_linear
from lemo.train.rehearsal import SHAPES, random_model

PEERS = (
    "hf_peft",
    "liger",
    "trl_chunked",
    "longlora_s2",
    "jenga_rule",
    "random_ltd",
    "offload",
    "unsloth",
    "lemo_dense",
    "lemo",
)
# Options of every method: the supervised share, where it is not the setting's; and rows of a run of supervised blocks,
# which are drawn one by one otherwise.
SHARED = ("share", "span")
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj")


class Unsupported(LemoError):
    """A peer cannot run here, or not this way; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What all methods of one comparison share.

    Attributes:
        shape: a name of lemo.train.rehearsal.SHAPES, or a folder with a config.json.
        tokens: T; the batch is one sequence.
        lora: `qkvo`, or `all` linear maps of the layers.
        supervised_share: share of blocks that carry loss.
        layers: run only so many layers; None for all.
        rank: of the adapter.
        alpha: of the adapter.
        block_size: of the supervised blocks, and of lemo.
        dtype: of the base model.
        device: where it runs.
        seed: of weights, tokens and supervised blocks.
        data: a pre-tokenised npz; None for random tokens.
    """

    shape: str
    tokens: int
    lora: str = "qkvo"
    supervised_share: float = 0.4
    layers: int | None = None
    rank: int = 8
    alpha: int = 16
    block_size: int = 64
    dtype: str = "bfloat16"
    device: str = "cuda"
    seed: int = 0
    data: str | None = None

    @property
    def label(self) -> str:
        """Name of the shape without the path of a folder."""
        return self.shape if self.shape in SHAPES else Path(self.shape).name

    @property
    def torch_dtype(self) -> torch.dtype:
        """The base model's."""
        return getattr(torch, self.dtype)

    def described(self) -> dict[str, Any]:
        """For Records: everything, without paths of this machine."""
        data = "random tokens" if self.data is None else Path(self.data).name
        return {**asdict(self), "shape": self.label, "data": data, "batch": 1, "attention": "sdpa"}


@dataclass
class Prepared:
    """A method that is ready to train.

    Attributes:
        model: whose trainable parameters the optimizer steps.
        forward: batch on the device -> loss, to be backpropagated.
        describe: after a step, what the method did: numbers and words for the Record.
        probe: around one further step that is not timed; yields a dict to which it adds what it measured.
    """

    model: Any
    forward: Callable[[dict[str, torch.Tensor]], torch.Tensor]
    describe: Callable[[], dict[str, Any]] = dict
    probe: Callable[[], AbstractContextManager[dict[str, Any]]] = field(default=lambda: nullcontext({}))


def parse_method(method: str) -> tuple[str, dict[str, str]]:
    """`peer:a=1,b=x` -> (`peer`, {"a": "1", "b": "x"}).

    Raises:
        Unsupported: no peer of that name, or an option that is no KEY=VALUE.
    """
    name, _, rest = method.partition(":")
    if name not in PEERS:
        raise Unsupported(f"no peer is called {name!r}; there are {', '.join(PEERS)}")
    options = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise Unsupported(f"{method}: {part!r} is no KEY=VALUE")
        options[key] = value
    return name, options


def load_method(method: str) -> tuple[Any, dict[str, str]]:
    """The peer's module, and its options with defaults filled in.

    Raises:
        Unsupported: an unknown peer or option.
    """
    name, given = parse_method(method)
    module = importlib.import_module(f"benchmarks.peers.{name}")
    if unknown := sorted(set(given) - set(module.OPTIONS) - set(SHARED)):
        raise Unsupported(f"{name} has no option {', '.join(unknown)}; it has {', '.join(module.OPTIONS)}")
    return module, {**module.OPTIONS, **given}


def adapted(config: Any, setting: Setting, adapter: str, *, attention: str = "sdpa", bits: str = "16") -> Any:
    """A random model with a LoRA adapter of PEFT around it.

    Args:
        config: the model's.
        setting: of the comparison.
        adapter: `float32`, what PEFT makes by default; or `model`, the base model's dtype.
        attention: name of the attention implementation.
        bits: of the base's linear maps: 16, those of the setting's dtype; or 4, by bitsandbytes.

    Raises:
        Unsupported: other bits, or 4 without bitsandbytes.
    """
    model = random_model(
        config, dtype=setting.torch_dtype, device=setting.device, seed=setting.seed, attention=attention
    )
    if bits == "16":
        return add_lora(model, setting, adapter)
    if bits != "4" or importlib.util.find_spec("bitsandbytes") is None:
        raise Unsupported(f"bits must be 16, or 4 where bitsandbytes is installed, got {bits!r}")
    pack_linear(model.requires_grad_(False))
    model = add_lora(model, setting, adapter)
    if adapter == "model":
        match_dtype(model)
    return model


def add_lora(model: Any, setting: Setting, adapter: str) -> Any:
    """Wraps a model with a LoRA adapter through PEFT."""
    import peft

    if adapter not in ("float32", "model"):
        raise Unsupported(f"adapter must be float32 or model, got {adapter!r}")
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets: Any = "all-linear" if setting.lora == "all" else [name for name in QKVO if name in present]
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=setting.rank, lora_alpha=setting.alpha, target_modules=targets)
    return peft.get_peft_model(model, lora, autocast_adapter_dtype=adapter == "float32")


def checkpoint_layers(model: Any, recompute: str) -> None:
    """Turns Transformers' own recomputation of whole layers on (`layer`) or leaves it off (`none`).

    Raises:
        Unsupported: any other level.
    """
    if recompute == "none":
        return
    if recompute != "layer":
        raise Unsupported(f"Transformers recomputes whole layers or nothing, not {recompute!r}")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def plain_forward(model: Any) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """The model's own loss."""
    return lambda batch: model(**batch).loss


def numbers(options: Mapping[str, str], *names: str) -> list[float]:
    """Options as numbers.

    Raises:
        Unsupported: one is none.
    """
    try:
        return [float(options[name]) for name in names]
    except ValueError as error:
        raise Unsupported(str(error)) from error
