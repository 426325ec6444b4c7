"""Recipes: YAML to RunConfig, strictly. The only place that uses pydantic.

YAML is read as its version 1.2 has it: `1e-4` is a number, `no` and `on` are text, and a key may stand only once.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import logging
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pydantic
import yaml

from lemo.config import RunConfig, resolved
from lemo.errors import ConfigError
from lemo.train.checks import check_run
from lemo.train.start_adapter import KEYS, is_there, settle

_LOG = logging.getLogger("lemo")
_COMMAND_LINE = "command line"
_BESIDE_A_PLAN = ("plan", "enabled", "block_size")
# Names that other tools have for keys.
_OTHER_NAMES = {
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "lr": "training.learning_rate",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation": "training.gradient_accumulation_steps",
    "max_length": "data.window_tokens",
    "max_seq_length": "data.window_tokens",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, begun: bool = False) -> RunConfig:
    """Reads a recipe, applies `section.key=value` overrides, and checks everything.

    Relative paths in the recipe are relative to the working directory, as on the command line.

    Args:
        path: of the recipe.
        overrides: values that replace the recipe's.
        begun: it is that of a run that has begun, which says all of the adapter that `lora.adapter` names.

    Raises:
        ConfigError: unreadable file, bad YAML, unknown key, wrong type, value out of range, or an adapter to go on from
            that is not there or has other values. One line for each mistake, naming file and key.
    """
    path = Path(path)
    values = _read_values(path)
    sources = override_values(values, overrides)
    _drop_share(values, sources, str(path))
    _drop_keys_of_the_plan(values)
    run = build_run(values, str(path), sources, begun=begun)
    _check_plan_keys(values, str(path))
    return run


def _read_values(path: Path) -> dict[str, Any]:
    """Nested values of a recipe, not checked but for being a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise ConfigError(f"{path}: the recipe cannot be read ({reason})") from error
    values = parse_yaml(text, str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, got {_kind(values)}")
    return values


def override_values(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """Writes `section.key=value` overrides into nested values.

    Returns:
        Where each overridden key came from, for messages of `build_run`.

    Raises:
        ConfigError: an override that is none, or whose section is none.
    """
    sources: dict[str, str] = {}
    for override in overrides:
        key, value = _parse_override(override)
        _assign(values, key, value)
        sources[key] = _COMMAND_LINE
    return sources


def build_run(
    values: dict[str, Any], source: str = "recipe", sources: dict[str, str] | None = None, *, begun: bool = False
) -> RunConfig:
    """RunConfig from nested plain values; keys of `lora` that are left out have the values of `lora.adapter`.

    Args:
        values: what YAML gave.
        source: named in messages.
        sources: other names, by dotted key, for values that came from elsewhere.
        begun: as in `load_recipe`.

    Raises:
        ConfigError: unknown key, wrong type or value out of range.
    """
    try:
        # JSON mode is strict about types and still takes a list for a tuple and an integer for a float.
        model = _schema(RunConfig).model_validate_json(json.dumps(values), strict=True)
    except (TypeError, ValueError) as error:
        if not isinstance(error, pydantic.ValidationError):
            raise ConfigError(f"{source}: holds a value that is no text, number, list or mapping ({error})") from error
        lines = [_explain(e, source, sources or {}) for e in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error
    run = _to_dataclass(RunConfig, model)
    given = values.get("lora") or {}
    try:
        # With all keys at hand, as in a stored recipe, a folder that is gone is missed only where training begins.
        if run.lora.adapter and not begun and (is_there(run.lora) or not KEYS.issubset(given)):
            run = dataclasses.replace(run, lora=settle(run.lora, given))
        check_run(run)
    except ConfigError as error:
        key = str(error).split(" ", 1)[0]
        raise ConfigError(f"{(sources or {}).get(key, source)}: {error}") from error
    return run


def dump_recipe(run: RunConfig) -> str:
    """The run as YAML with every key that counts; `load_recipe` reads it back to a run that does the same."""
    return yaml.dump(resolved(run), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def dump_value(value: Any) -> str:
    """One value as it is written behind a key, on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def json_schema() -> dict[str, Any]:
    """JSON Schema of recipes: types, choices and defaults."""
    return _schema(RunConfig).model_json_schema()


def parse_yaml(text: str, source: str) -> Any:
    """YAML 1.2 core values; duplicate keys and syntax errors are refused with their line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{source}{place}: {error.problem or 'not valid YAML'}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML ({str(error).splitlines()[0]})") from error


class _Loader(yaml.SafeLoader):
    """SafeLoader with the plain scalars of YAML 1.2 and without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A mapping whose keys are distinct."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is no text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_Loader` would not read as text."""


_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+(?:_[0-9]+)*", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """Decimal only: YAML 1.1 would read 010 as eight."""
    return int(loader.construct_scalar(node).replace("_", ""))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _parse_override(text: str) -> tuple[str, Any]:
    """`a.b=value` with a YAML-typed value."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
        raise ConfigError(f"command line: {text!r} is no override; write section.key=value")
    return key, parse_yaml(value, f"command line, {key}")


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in nested mappings."""
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if inner is None:
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"command line: {key} cannot be set, {section} is no section")
        values = inner
    values[last] = value


@functools.cache
def _schema(cls: type) -> type[pydantic.BaseModel]:
    """A pydantic model with the fields of a dataclass, nested ones included, that forbids other keys."""
    hints = get_type_hints(cls)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            inner = _schema(hint)
            fields[field.name] = (inner, pydantic.Field(default_factory=inner))
        elif field.default_factory is not dataclasses.MISSING:
            fields[field.name] = (hint, pydantic.Field(default_factory=field.default_factory))
        else:
            fields[field.name] = (hint, field.default)
    config = pydantic.ConfigDict(extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False)
    return pydantic.create_model(cls.__name__, __config__=config, **fields)


def _to_dataclass(cls: type, model: pydantic.BaseModel) -> Any:
    """The dataclass with the values of its pydantic model."""
    values = {}
    for field in dataclasses.fields(cls):
        value = getattr(model, field.name)
        if isinstance(value, pydantic.BaseModel):
            value = _to_dataclass(get_type_hints(cls)[field.name], value)
        values[field.name] = value
    return cls(**values)


def _explain(error: dict[str, Any], source: str, sources: dict[str, str]) -> str:
    """One line for one of pydantic's errors."""
    path = [part for part in error["loc"] if isinstance(part, str)]
    if error["type"] != "extra_forbidden":
        # Of a key that takes one of several types, pydantic also names each that did not match.
        known = set(_keys(RunConfig))
        while len(path) > 1 and ".".join(path) not in known:
            path.pop()
    key = ".".join(path)
    # Of an unknown section only the first key is told, and overrides name keys inside.
    source = next((place for given, place in sources.items() if f"{given}.".startswith(f"{key}.")), source)
    if error["type"] == "extra_forbidden":
        return f"{source}: unknown key {key}{_nearest(path)}"
    hint = _hint_of(path)
    if hint is None or dataclasses.is_dataclass(hint):
        return f"{source}: {key} must be a section with keys of its own, got {_kind(error['input'])}"
    if error["type"] == "finite_number":
        return f"{source}: {key} must be a finite number"
    wrong = f"{source}: {key} must be {_describe(hint)}, got {_kind(error['input'])}"
    if get_origin(hint) is tuple and isinstance(error["input"], str) and error["type"] == "tuple_type":
        said = f"{key}=" if source == _COMMAND_LINE else f"{path[-1]}: "
        return f"{wrong}; write {said}[{error['input']}]"
    return wrong


def _nearest(path: list[str]) -> str:
    """The key that was probably meant: one that other tools call so, a sibling like it, or one in another section."""
    known = _keys(RunConfig)
    section, name = ".".join(path[:-1]), path[-1]
    if name in _OTHER_NAMES:
        return f"; did you mean {_OTHER_NAMES[name]}?"
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    close = difflib.get_close_matches(name, [key.rpartition(".")[2] for key in siblings], n=1, cutoff=0.6)
    if close:
        return f"; did you mean {section + '.' if section else ''}{close[0]}?"
    elsewhere = {key.rpartition(".")[2]: key for key in known}
    close = difflib.get_close_matches(name, list(elsewhere), n=1, cutoff=0.75)
    if close:
        return f"; did you mean {elsewhere[close[0]]}?"
    return f"; keys there are {', '.join(key.rpartition('.')[2] for key in siblings)}"


def _keys(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all keys, sections included."""
    hints, found = get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        found.append(prefix + field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            found += _keys(hints[field.name], f"{prefix}{field.name}.")
    return found


def _hint_of(path: list[str]) -> Any:
    """Type of a dotted key; None when there is no such key."""
    cls: Any = RunConfig
    for part in path:
        if not dataclasses.is_dataclass(cls):
            return cls
        hints = get_type_hints(cls)
        if part not in hints:
            return None
        cls = hints[part]
    return cls


def _describe(hint: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is tuple:
        inner = {str: "texts", int: "integers", float: "numbers"}.get(arguments[0], str(arguments[0]))
        return f"a list of {inner}"
    if origin is not None and arguments:  # Literal
        return "one of " + ", ".join(map(str, arguments))
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}
    return words.get(hint, str(hint))


def _kind(value: Any) -> str:
    """A value in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else f"the list {value!r}"
    return repr(value)


def _drop_share(values: dict[str, Any], sources: dict[str, str], source: str) -> None:
    """Files for validation on the command line take the place of a share that the recipe holds out."""
    data = values.get("data")
    asked = "data.validation" in sources and "data.held_out_share" not in sources
    if asked and isinstance(data, dict) and data.get("validation") and data.pop("held_out_share", None):
        _LOG.warning("%s: data.held_out_share does not count, the command line names data.validation", source)


def _drop_keys_of_the_plan(values: dict[str, Any]) -> None:
    """A plan brings its own ratios: keys that say what `lemo calibrate` made it for change nothing, and are left out.

    So the recipe that was calibrated trains under its plan with `sparsity.plan` alone added.
    """
    sparsity = values.get("sparsity")
    plan = sparsity.get("plan") if isinstance(sparsity, dict) else None
    if not isinstance(plan, str) or not (beside := Path(plan).parent / "recipe.yaml").is_file():
        return
    made_for = _read_values(beside).get("sparsity")
    for key in [key for key in sparsity if key not in _BESIDE_A_PLAN]:
        if isinstance(made_for, dict) and key in made_for and made_for[key] == sparsity[key]:
            del sparsity[key]


def _check_plan_keys(values: dict[str, Any], source: str) -> None:
    """Other values beside a plan would be ignored, so they are refused.

    But for the size of blocks, which loss rows follow too.
    """
    sparsity = values.get("sparsity") or {}
    if not sparsity.get("plan"):
        return
    defaults = {field.name: field.default for field in dataclasses.fields(type(RunConfig().sparsity))}
    wrong = [
        f"sparsity.{key}"
        for key, value in sparsity.items()
        if key not in _BESIDE_A_PLAN and (tuple(value) if isinstance(value, list) else value) != defaults[key]
    ]
    if wrong:
        verb, them = (
            ("stands", "its own value; remove the key") if len(wrong) == 1 else ("stand", "its own; remove them")
        )
        raise ConfigError(f"{source}: {', '.join(wrong)} {verb} beside sparsity.plan, which brings {them}")
