"""Merges an adapter into its base model, and holds the result that was written to an error budget before it counts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lemo.config import ModelConfig, RunConfig
from lemo.errors import ConfigError, MergeError
from lemo.runtime.model import in_force
from lemo.train.files import share_files
from lemo.train.four_bits import is_packed, unpack_linear
from lemo.train.lora import load_adapter, merge_layers, read_context, wrapped_names
from lemo.train.model import has_context, load_model, load_settings, load_tokenizer, resolve_path

SAMPLE_TOKENS = 512
ULPS = 4.0
DTYPES = ("float32", "bfloat16", "float16")
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
TYPICAL = "root mean square"
_NORMS = {"largest": lambda t: float(t.abs().max()), TYPICAL: lambda t: float(t.square().mean().sqrt())}

_WHICH = {
    "unrounded": ", before its weights are rounded,",
    "weights": " that was written, computed in a wider dtype,",
    "merged": "",
}


@dataclass(frozen=True)
class MergeReport:
    """What a merge came to. Errors are of logits, against the adapter model computed in `wider_dtype`.

    Attributes:
        output: folder of the merged model.
        dtype: of its weights.
        base_dtype: that the base model's configuration names; None where it names none.
        wider_dtype: of the exact logits.
        sample: which tokens were compared.
        tokens: how many.
        errors: by norm (`largest`, `root mean square`): `merged` and, in root mean square, its `budget`; `weights`, the
            error of the merged weights alone, computed in the wider dtype; `unrounded`, before they were rounded;
            `adapter`, what the adapter model itself errs in `dtype`, which is the budget of `unrounded`; `rounding`, by
            how much rounding the weights moves logits, which `weights` may err more; and `effect`, by how much the
            adapter moved the base model's exact logits.
        notes: what had to be changed.
    """

    output: Path
    dtype: str
    base_dtype: str | None
    wider_dtype: str
    sample: str
    tokens: int
    errors: dict[str, dict[str, float]]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report as lines of text."""
        lines = [f"compared {self.tokens:,} tokens ({self.sample}) with the adapter model in {self.wider_dtype}"]
        for norm, found in self.errors.items():
            budget = f" (budget {found['budget']:.2e})" if "budget" in found else ""
            lines.append(
                f"{norm} error of a logit: merged {found['merged']:.2e}{budget}, its weights "
                f"alone {found['weights']:.2e} (budget {found['adapter'] + found['rounding']:.2e}), before they were "
                f"rounded {found['unrounded']:.2e} (budget {found['adapter']:.2e}); the adapter moved logits by "
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
    progress: Callable[[str], None] | None = None,
) -> MergeReport:
    """Writes base plus adapter as a plain Transformers model, and checks what was written.

    The sum is formed in fp32 (fp64 for an fp32 model) and rounded once to the model's dtype. Before it is rounded, its
    logits may differ from those of the adapter model, both computed in the wider dtype, by no more than the adapter
    model errs in its own dtype: this is what notices an adapter that was merged in part. The written folder is then
    loaded as any user would. Computed in the wider dtype, it may err more by as much as the rounding of the weights
    moves logits; in its own, by twice the adapter model's error, that rounding and a few units of the resolution. The
    latter holds in root mean square: there, a row may err by many times what it erred in another order of sums.

    Args:
        config: the base model. Its context is extended as in training; where it says nothing of it, as the adapter's
            folder says.
        adapter: folder in PEFT's format.
        output: folder to write; must not exist.
        samples: sequences of token ids to compare on; None draws some.
        sample_name: what they are, for the report.
        device: where it is computed; a GPU if there is one when None.
        progress: told of each stage before it begins.

    Raises:
        ConfigError: the output exists, or model or adapter cannot be loaded.
        MergeError: the merged model errs more than its budget; nothing is left behind.

    *Cost*: weights in the wider dtype, twice the model's size, and seven forwards of the samples.
    """
    say = progress or (lambda text: None)
    output = Path(output)
    if output.exists():
        raise ConfigError(f"--out: {output} exists already")
    config, extended = with_context(config, adapter)
    if config.load_in_4bit:
        extended.append("the adapter was trained over weights in 4 bits, and is merged into the whole ones")
    base_dtype = getattr(load_settings(config).get_text_config(), "dtype", None)
    say(f"loading the base model {config.path} and the adapter {adapter}")
    model = load_model(replace(config, load_in_4bit=False), device=device)
    if is_packed(model):
        unpack_linear(model)
        extended.append("the base model's weights, saved in 4 bits, are unpacked")
    names = set(dict(model.named_parameters()))
    if samples is None:
        samples = draw_samples(model.config.get_text_config())
    model = load_adapter(model, adapter).eval()
    place = next(model.parameters()).device
    merged, logits, untied = _merge(model, samples, say)
    dtype, notes = logits["working"][0].dtype, extended + untied
    _check_names(set(dict(merged.named_parameters())), names, bool(untied))
    merged.config.use_cache = True  # load_model switches it off for training
    staging = output.parent / f".{output.name}.unchecked"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        say(f"writing the merged model in {_name(dtype)}")
        merged.save_pretrained(str(staging))
        share_files(staging)
        _save_tokenizer(config, adapter, staging, notes)
        del model, merged
        say("reading it back, and comparing its logits with the adapter model's")
        written = load_model(ModelConfig(str(staging), dtype=config.dtype, attention=config.attention), device=place)
        logits["merged"] = _logits(written.eval(), samples)
        _widen(written)
        logits["weights"] = _logits(written, samples)
        errors = _compare(logits)
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    typical = errors[TYPICAL]
    if typical["weights"] > typical["effect"] / 2:
        notes.append(
            f"rounding to {_name(dtype)} changes the logits about as much as the adapter does; the adapter itself, or "
            "model.dtype float32, keeps what was learned"
        )
    tokens = sum(sample.numel() for sample in samples)
    base = _name(base_dtype) if isinstance(base_dtype, torch.dtype) else None
    return MergeReport(output, _name(dtype), base, _name(_WIDER[dtype]), sample_name, tokens, errors, tuple(notes))


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


def read_samples(run: RunConfig, tokenizer: Any, *, count: int = 2) -> list[Tensor]:
    """The first tokens of some validation windows of a run.

    Raises:
        DataError: a file cannot be read now.
        ConfigError: the run has no validation data.
    """
    from lemo.train.data import load_windows

    data = replace(run.data, max_windows=None, validation_windows=count)
    dataset, _ = load_windows(data, tokenizer, "validation")
    return [torch.as_tensor(dataset[i]["input_ids"][:SAMPLE_TOKENS])[None] for i in range(len(dataset))]


def draw_samples(settings: Any, count: int = 2) -> list[Tensor]:
    """(1, T) random tokens of a model's vocabulary, the same every time."""
    length = min(SAMPLE_TOKENS, getattr(settings, "max_position_embeddings", None) or SAMPLE_TOKENS)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(settings.vocab_size, (1, length), generator=generator) for _ in range(count)]


def _merge(
    model: Any, samples: Sequence[Tensor], say: Callable[[str], None]
) -> tuple[Any, dict[str, list[Tensor]], list[str]]:
    """Adds an adapter to its base model.

    Returns:
        The base model with rounded weights, the logits of `_compare` that there are by then, and notes.
    """
    with torch.no_grad():
        say("computing the adapter model's logits")
        logits = {"working": _logits(model, samples)}
        dtype, dtypes = logits["working"][0].dtype, _widen(model)
        logits["exact"] = _logits(model, samples)
        with model.disable_adapter():
            logits["plain"] = _logits(model, samples)
        say("merging")
        notes = _untie(model, wrapped_names(model))
        merged = merge_layers(model)
        logits["unrounded"] = _logits(merged, samples)
        _narrow(merged, dtypes, dtype)
        _widen(merged)
        logits["rounded"] = _logits(merged, samples)
        _narrow(merged, dtypes, dtype)
    return merged, logits, notes


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


def _narrow(model: nn.Module, dtypes: Mapping[int, torch.dtype], dtype: torch.dtype) -> None:
    """Rounds every parameter to what `_widen` says it was, and new ones to `dtype`, in place."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtypes.get(id(parameter), dtype))


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
    head: Any = in_force(base.get_output_embeddings())
    while "weight" not in head._parameters:  # PEFT's modules around it pass its weight on
        head = head.base_layer if hasattr(head, "base_layer") else head.original_module
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


def _compare(logits: Mapping[str, Sequence[Tensor]]) -> dict[str, dict[str, float]]:
    """Errors by norm.

    Args:
        logits: of the adapter model in its dtype (`working`) and in the wider one (`exact`), of the written model in
            its dtype (`merged`) and in the wider one (`weights`), of the merged model in the wider one before
            (`unrounded`) and after its weights were `rounded`, and of the base model in the wider one (`plain`).

    Raises:
        MergeError: one is above its budget.
    """
    resolution = torch.finfo(logits["merged"][0].dtype).eps
    flat = {name: torch.cat([t.double().flatten() for t in each]) for name, each in logits.items()}
    if not bool(flat["merged"].isfinite().all()):
        raise MergeError("the merged model's logits are not finite; nothing was written")
    errors = {}
    for name, norm in _NORMS.items():
        error = {each: norm(flat[each] - flat["exact"]) for each in ("unrounded", "weights", "merged")}
        adapter, rounding = norm(flat["working"] - flat["exact"]), norm(flat["rounded"] - flat["unrounded"])
        effect = norm(flat["exact"] - flat["plain"])
        errors[name] = error | {"adapter": adapter, "rounding": rounding, "effect": effect}
        budgets = {"unrounded": adapter, "weights": adapter + rounding}
        if name == TYPICAL:
            budget = 2 * adapter + rounding + ULPS * resolution * norm(flat["exact"])
            budgets["merged"] = errors[name]["budget"] = budget
        for what, allowed in budgets.items():
            if not error[what] <= allowed:
                raise MergeError(
                    f"the merged model{_WHICH[what]} does not compute what the adapter model does: {name} error of its "
                    f"logits is {error[what]:.2e}, more than {allowed:.2e}, for which rounding accounts; the adapter "
                    f"model's own is {adapter:.2e}. Nothing was written"
                )
    return errors


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
