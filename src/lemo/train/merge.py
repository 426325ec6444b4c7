"""Merges an adapter into its base model, and holds the result that was written to an error budget before it counts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lemo.config import ModelConfig, RunConfig
from lemo.errors import ConfigError, DataError, MergeError
from lemo.train.files import share_files
from lemo.train.four_bits import is_packed, unpack_linear
from lemo.train.lora import load_adapter, merge_layers, read_context, wrapped_names
from lemo.train.model import has_context, load_model, load_settings, load_tokenizer, resolve_path

SAMPLE_TOKENS = 512
ULPS = 4.0
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
_NORMS = {"largest": lambda t: float(t.abs().max()), "root mean square": lambda t: float(t.square().mean().sqrt())}


@dataclass(frozen=True)
class MergeReport:
    """What a merge came to. Errors are of logits, against the adapter model computed in `wider_dtype`.

    Attributes:
        output: folder of the merged model.
        dtype: of its weights.
        wider_dtype: of the exact logits.
        sample: which tokens were compared.
        tokens: how many.
        errors: by norm (`largest`, `root mean square`): `merged` and its `budget`; `weights`, the error of the merged
            weights alone, computed in the wider dtype; `adapter`, what the adapter model itself errs in `dtype`, which
            is the budget of `weights`; and `effect`, by how much the adapter moved the base model's exact logits.
        notes: what had to be changed.
    """

    output: Path
    dtype: str
    wider_dtype: str
    sample: str
    tokens: int
    errors: dict[str, dict[str, float]]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report as lines of text."""
        lines = [f"compared {self.tokens:,} tokens ({self.sample}) with the adapter model in {self.wider_dtype}"]
        for norm, found in self.errors.items():
            lines.append(
                f"{norm} error of a logit: merged {found['merged']:.2e} (budget {found['budget']:.2e}), its weights "
                f"alone {found['weights']:.2e} (budget {found['adapter']:.2e}); the adapter moved logits by "
                f"{found['effect']:.2e}"
            )
        return lines + [f"note: {note}" for note in self.notes]


def merge_adapter(
    config: ModelConfig,
    adapter: str | Path,
    output: str | Path,
    *,
    samples: Sequence[Tensor] | None = None,
    sample_name: str = "tokens drawn at random",
    device: Any = None,
) -> MergeReport:
    """Writes base plus adapter as a plain Transformers model, and checks what was written.

    The sum is formed in fp32 (fp64 for an fp32 model) and rounded once to the model's dtype. The written folder is then
    loaded as any user would, and its logits are compared with those of the adapter model in the wider dtype. Their
    error may be twice the one that the adapter model makes in its own dtype, plus a few units of its resolution.
    Computed in the wider dtype too, where only the rounding of the weights is left, it may be no larger than that one:
    this is what notices an adapter that was merged in part.

    Args:
        config: the base model. Its context is extended as in training; where it says nothing of it, as the adapter's
            folder says.
        adapter: folder in PEFT's format.
        output: folder to write; must not exist.
        samples: sequences of token ids to compare on; None draws some.
        sample_name: what they are, for the report.
        device: where it is computed; a GPU if there is one when None.

    Raises:
        ConfigError: the output exists, or model or adapter cannot be loaded.
        MergeError: the merged model errs more than its budget; nothing is left behind.

    *Cost*: weights in the wider dtype, twice the model's size, and six forwards of the samples.
    """
    output = Path(output)
    if output.exists():
        raise ConfigError(f"--out: {output} exists already")
    config, extended = with_context(config, adapter)
    if config.load_in_4bit:
        extended.append("the adapter was trained over weights in 4 bits, and is merged into the whole ones")
    model = load_model(replace(config, load_in_4bit=False), device=device)
    if is_packed(model):
        unpack_linear(model)
        extended.append("the base model's weights, saved in 4 bits, are unpacked")
    names = set(dict(model.named_parameters()))
    if samples is None:
        samples = draw_samples(model.config.get_text_config())
    model = load_adapter(model, adapter).eval()
    place = next(model.parameters()).device
    with torch.no_grad():
        working = _logits(model, samples)
        dtypes = _widen(model)
        exact = _logits(model, samples)
        with model.disable_adapter():
            plain = _logits(model, samples)
        notes = extended + _untie(model, wrapped_names(model))
        merged = merge_layers(model)
        for parameter in merged.parameters():
            parameter.data = parameter.data.to(dtypes.get(id(parameter), working[0].dtype))
    _check_names(set(dict(merged.named_parameters())), names, len(notes) > len(extended))
    merged.config.use_cache = True  # load_model switches it off for training
    staging = output.parent / f".{output.name}.unchecked"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        merged.save_pretrained(str(staging))
        share_files(staging)
        _save_tokenizer(config, adapter, staging, notes)
        del model, merged
        written = load_model(ModelConfig(str(staging), dtype=config.dtype, attention=config.attention), device=place)
        own = _logits(written.eval(), samples)
        _widen(written)
        errors = _compare(own, _logits(written, samples), working, exact, plain)
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    dtype = working[0].dtype
    typical = errors["root mean square"]
    if typical["weights"] > typical["effect"] / 2:
        notes.append(
            f"rounding to {_name(dtype)} changes the logits about as much as the adapter does; the adapter itself, or "
            "model.dtype float32, keeps what was learned"
        )
    tokens = sum(sample.numel() for sample in samples)
    return MergeReport(output, _name(dtype), _name(_WIDER[dtype]), sample_name, tokens, errors, tuple(notes))


def base_config(path: str) -> ModelConfig:
    """A base model in the dtype that its own configuration names, its context as it is.

    Raises:
        ConfigError: the model cannot be read.
    """
    from transformers import AutoConfig

    try:
        dtype = getattr(AutoConfig.from_pretrained(resolve_path(path)).get_text_config(), "dtype", None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the adapter's base model {path} cannot be read; name it with --base") from error
    return ModelConfig(path, dtype=_name(dtype) if dtype in _WIDER else "float32")  # type: ignore[arg-type]


def with_context(config: ModelConfig, adapter: str | Path) -> tuple[ModelConfig, list[str]]:
    """A base model in the context that an adapter was trained in, and a note where that extends it."""
    context = read_context(adapter)
    if context is None or config.rope_scaling != "none" or has_context(load_settings(config), context):
        return config, []
    length, scaling = context["context_length"], context["rope_scaling"]
    note = f"the context is extended to {length:,} tokens ({scaling}), as the adapter was trained"
    return replace(config, context_length=length, rope_scaling=scaling), [note]


def read_samples(run: RunConfig, tokenizer: Any, *, count: int = 2) -> list[Tensor] | None:
    """The first tokens of some validation windows of a run; None when it has none that can be read now."""
    from lemo.train.data import load_windows

    if not run.data.validation_sources:
        return None
    data = replace(run.data, max_windows=None, validation_windows=count)
    try:
        dataset, _ = load_windows(data, tokenizer, "validation")
    except DataError:
        return None
    return [torch.as_tensor(dataset[i]["input_ids"][:SAMPLE_TOKENS])[None] for i in range(len(dataset))]


def draw_samples(settings: Any, count: int = 2) -> list[Tensor]:
    """(1, T) random tokens of a model's vocabulary, the same every time."""
    length = min(SAMPLE_TOKENS, getattr(settings, "max_position_embeddings", None) or SAMPLE_TOKENS)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(settings.vocab_size, (1, length), generator=generator) for _ in range(count)]


def _logits(model: Any, samples: Sequence[Tensor]) -> list[Tensor]:
    """Logits of each sample on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return [model(input_ids=sample.to(device), use_cache=False).logits.cpu() for sample in samples]


def _widen(model: nn.Module) -> dict[int, torch.dtype]:
    """Raises every parameter to the wider dtype in place, and says what each was. Buffers stay as they are."""
    dtypes = {}
    for parameter in model.parameters():
        dtypes[id(parameter)] = parameter.dtype
        parameter.data = parameter.data.to(_WIDER[next(iter(dtypes.values()))])
    return dtypes


def _untie(model: Any, wrapped: Sequence[str]) -> list[str]:
    """Gives the head its own weight where it shares the embedding's and the adapter changes one of them."""
    base = model.get_base_model()
    settings = base.config.get_text_config()
    if not getattr(settings, "tie_word_embeddings", False):
        return []
    ends = {name: module for name, module in base.named_modules() if module is base.get_input_embeddings()}
    ends |= {name: module for name, module in base.named_modules() if module is base.get_output_embeddings()}
    changed = [name for name in ends if any(w == name or w.endswith(f".{name}") for w in wrapped)]
    if not changed:
        return []
    head = base.get_output_embeddings()
    while hasattr(head, "base_layer"):
        head = head.base_layer
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    settings.tie_word_embeddings = base.config.tie_word_embeddings = False
    return [f"head and embedding shared their weight and the adapter changes {changed[0]}: they are now two weights"]


def _check_names(found: set[str], names: set[str], untied: bool) -> None:
    """The merged model has the base model's parameters, a head of its own apart."""
    extra, missing = found - names, names - found
    if missing or len(extra) > int(untied):
        raise MergeError(f"the merged model has other parameters than its base: {sorted(extra | missing)[0]}, ...")


def _save_tokenizer(config: ModelConfig, adapter: str | Path, folder: Path, notes: list[str]) -> None:
    """The tokenizer beside the adapter, else the base model's, else none and a note."""
    for source in (ModelConfig(str(adapter)), config):
        if source is not config and not (Path(adapter) / "tokenizer_config.json").is_file():
            continue
        try:
            load_tokenizer(source).save_pretrained(str(folder))
            return
        except ConfigError:
            continue
    notes.append("neither adapter nor base model has a tokenizer that can be read, so none was saved")


def _compare(*logits: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    """Errors by norm.

    Args:
        *logits: of the merged model in its dtype and in the wider one, of the adapter model in both, and of the base
            model in the wider one.

    Raises:
        MergeError: one is above its budget.
    """
    resolution = torch.finfo(logits[0][0].dtype).eps
    merged_N, weights_N, working_N, exact_N, plain_N = (
        torch.cat([t.double().flatten() for t in each]) for each in logits
    )
    if not bool(merged_N.isfinite().all()):
        raise MergeError("the merged model's logits are not finite; nothing was written")
    errors = {}
    for name, norm in _NORMS.items():
        adapter = norm(working_N - exact_N)
        found = errors[name] = {
            "merged": norm(merged_N - exact_N),
            "budget": 2 * adapter + ULPS * resolution * norm(exact_N),
            "weights": norm(weights_N - exact_N),
            "adapter": adapter,
            "effect": norm(exact_N - plain_N),
        }
        for error, budget in (("merged", "budget"), ("weights", "adapter")):
            if not found[error] <= found[budget]:
                what = "" if error == "merged" else " weights, computed in a wider dtype,"
                raise MergeError(
                    f"the merged model{what} does not compute what the adapter model does: {name} error of its logits "
                    f"is {found[error]:.2e}, more than {found[budget]:.2e}, for which rounding accounts; the adapter "
                    f"model's own is {adapter:.2e}. Nothing was written"
                )
    return errors


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
