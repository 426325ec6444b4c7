"""The rules of the house as functions from source text to violations. `test_rules.py` applies and tests them."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "lemo"

# Lower may not import higher. Modules of one number may not import each other, unless they are of one package.
LEVELS = {
    "errors": 0,
    "config": 0,
    "testing": 0,
    "ops": 1,
    "core": 2,
    "families": 3,
    "runtime": 4,
    "calibrate": 5,
    "measure": 6,
    "train": 7,
    "eval": 8,
    "report": 9,
    "cli": 10,
}
# config and testing may use errors.
FOUNDATION = "errors"

BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "tools", "v2", "base", "stuff", "functions"}
FILE_LINES, KERNEL_LINES, FUNCTION_LINES, PARAMETERS = 400, 500, 60, 8

# Imported inside functions only, and in one file of the package each.
LAZY_IN_ONE_FILE = ("peft", "trl", "datasets", "matplotlib")
ALLOWED_HOSTS = {"github.com", "arxiv.org", "www.apache.org", "keepachangelog.com", "www.usenix.org"}


@dataclass(frozen=True)
class Violation:
    """One broken rule at one place."""

    rule: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what} [{self.rule}]"


@dataclass(frozen=True)
class Import:
    """One import statement: the dotted module, and whether it runs when the importing module is loaded."""

    module: str
    line: int
    at_load: bool


def imports(tree: ast.Module) -> Iterator[Import]:
    """All imports of a module, those under `if TYPE_CHECKING` left out."""
    yield from _imports(tree, at_load=True)


def _imports(node: ast.AST, at_load: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, at_load)
        elif isinstance(child, ast.ImportFrom):
            for alias in child.names:
                yield Import(f"{child.module}.{alias.name}", child.lineno, at_load)
        else:
            inner = at_load and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, inner)


def unit_of(parts: tuple[str, ...]) -> str:
    """The unit of LEVELS that a module of the package belongs to, from its path's parts inside the package."""
    return parts[0].removesuffix(".py")


def check_levels(where: str, parts: tuple[str, ...], tree: ast.Module) -> list[Violation]:
    """Dependencies point down only."""
    unit = unit_of(parts)
    if unit == "__init__":
        return []
    if unit not in LEVELS:
        return [Violation("levels", where, f"{unit} has no level; give it one in LEVELS")]
    found = []
    for item in imports(tree):
        target = item.module.split(".")
        if target[0] != "lemo":
            continue
        if len(target) == 1 or target[1] in (unit, FOUNDATION):
            continue
        if LEVELS.get(target[1], 99) >= LEVELS[unit]:
            found.append(Violation("levels", where, f"line {item.line}: {unit} imports {item.module}"))
    # `import lemo` inside the package is for the version; the public names live higher up.
    for node in ast.walk(tree):
        named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lemo"
        if named and node.attr != "__version__":
            found.append(Violation("levels", where, f"line {node.lineno}: {unit} uses lemo.{node.attr}"))
    return found


def check_fences(where: str, parts: tuple[str, ...], tree: ast.Module) -> list[Violation]:
    """Some packages are imported in some places only."""
    unit, name = unit_of(parts), parts[-1]
    found = []
    for item in imports(tree):
        top = item.module.split(".")[0]
        reason = None
        if top == "triton" and name != "kernel.py":
            reason = "triton belongs in kernel.py"
        elif top == "transformers" and LEVELS.get(unit, -1) < LEVELS["families"]:
            reason = "transformers is imported from families upwards"
        elif top == "pydantic" and parts != ("cli", "recipe.py"):
            reason = "pydantic belongs in cli/recipe.py"
        elif top == "typer" and unit != "cli":
            reason = "typer belongs in cli"
        elif top in LAZY_IN_ONE_FILE and item.at_load:
            reason = f"{top} is imported inside the functions that need it"
        if reason:
            found.append(Violation("fences", where, f"line {item.line}: {reason}"))
    return found


def check_one_place(trees: dict[str, ast.Module]) -> list[Violation]:
    """Each package of LAZY_IN_ONE_FILE is imported in one file."""
    found = []
    for package in LAZY_IN_ONE_FILE:
        files = sorted(
            where
            for where, tree in trees.items()
            if any(item.module.split(".")[0] == package for item in imports(tree))
        )
        found += [Violation("one place", where, f"{package} is already imported in {files[0]}") for where in files[1:]]
    return found


def check_size(where: str, source: str, tree: ast.Module) -> list[Violation]:
    """Files, functions and parameter lists stay short. A docstring does not count towards its function's lines."""
    found = []
    kernel = where.endswith("kernel.py")
    limit = KERNEL_LINES if kernel else FILE_LINES
    lines = source.count("\n")
    if lines > limit:
        found.append(Violation("file lines", where, f"{lines} lines, at most {limit}"))
    for owner, function in functions(tree):
        label = f"{owner}.{function.name}" if owner else function.name
        place = f"{where}::{label}"
        if (length := function_lines(function)) > FUNCTION_LINES:
            found.append(Violation("function lines", place, f"{length} lines, at most {FUNCTION_LINES}"))
        # Triton kernels take sizes as parameters, and autograd.Function.forward every tensor by itself.
        exempt = kernel or function.name in ("forward", "backward", "setup_context")
        if not exempt and (count := parameters(function)) > PARAMETERS:
            found.append(Violation("parameters", place, f"{count} parameters, at most {PARAMETERS}"))
    return found


def functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions with the dotted name of what they stand in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner, node
        name = getattr(node, "name", None)
        inner = owner
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inner = f"{owner}.{name}" if owner else str(name)
        yield from functions(node, inner)


def function_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    total = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        total -= (first.end_lineno or first.lineno) - first.lineno + 1
    return total


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters without self and cls; *args and **kwargs count one each."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    count = sum(argument.arg not in ("self", "cls", "mcs") for argument in named)
    return count + (arguments.vararg is not None) + (arguments.kwarg is not None)


def check_name(where: str, parts: tuple[str, ...]) -> list[Violation]:
    """Modules are named after what they hold."""
    banned = [part for part in parts if part.removesuffix(".py") in BANNED_NAMES]
    return [Violation("names", where, f"{part} says nothing about its content") for part in banned]


# Written in two pieces so that this file does not break its own rule.
_MACHINE_PATH = re.compile(r"(?<![\w.~-])/" + r"(?:work|root|farm|tmp|home|Users|mnt|scratch|data)/[\w.-]+")
_ADDRESS = re.compile(r"\b(?!127\.0\.0\.1\b|0\.0\.0\.0\b)\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b")
_LINK = re.compile(r"https?:" + r"//([\w.-]+)")


def check_portable(where: str, text: str) -> list[Violation]:
    """No path of one machine, no address, no link outside the list of known hosts."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for match in _MACHINE_PATH.finditer(line):
            found.append(Violation("portable", where, f"line {number}: path of one machine: {match[0]}"))
        for match in _ADDRESS.finditer(line):
            found.append(Violation("portable", where, f"line {number}: network address {match[0]}"))
        for match in _LINK.finditer(line):
            if match[1] not in ALLOWED_HOSTS:
                found.append(Violation("portable", where, f"line {number}: host {match[1]} is not on the list"))
    return found


def package_files() -> dict[str, Path]:
    """Python files of the package by their path inside it."""
    return {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


def project_files() -> dict[str, Path]:
    """Text files that the project ships, by their path inside the repository."""
    endings = {".py", ".toml", ".md", ".yaml", ".yml", ".json", ".jsonl", ".sh"}
    folders = ("src", "tests", "benchmarks", "examples", "recipes", "docs", ".ci")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    paths += [path for path in ROOT.iterdir() if path.is_file()]
    kept = [p for p in paths if p.suffix in endings or p.name in ("Makefile", "run")]
    return {str(path.relative_to(ROOT)): path for path in sorted(kept)}


@functools.cache
def all_violations() -> tuple[Violation, ...]:
    """Every broken rule in the repository, exceptions not yet taken away."""
    found: list[Violation] = []
    trees: dict[str, ast.Module] = {}
    for where, path in package_files().items():
        tree = trees[where] = ast.parse(path.read_text())
        parts = path.relative_to(PACKAGE).parts
        found += check_levels(where, parts, tree) + check_fences(where, parts, tree) + check_name(where, parts)
    found += check_one_place(trees)
    for where, path in project_files().items():
        text = path.read_text()
        found += check_portable(where, text)
        if path.suffix == ".py":
            sizes = check_size(where, text, ast.parse(text))
            # Test functions may be long tables; test files may not.
            found += [v for v in sizes if not where.startswith("tests/") or v.rule == "file lines"]
    return tuple(found)
