"""Times training steps of lemo and its peers: one process a turn, methods take turns A-B-A-B, runs can be resumed.

    python -m benchmarks.training --preset smoke --work runs/training.jsonl --budget-seconds 540
    python -m benchmarks.training --preset 64k --shape llama2-7b --lora qkvo --work runs/training.jsonl
    python -m benchmarks.training --shape llama2-7b --tokens 8192 --methods liger,lemo:keep=0.5+recompute=none ...

Options of a method given by --methods are joined by +, since commas part the methods. Every turn goes into --work at
once; a turn that is there is not measured again. At the end the Records that the work file gives are added to --out.
A ratio is only published when both sides were measured in the same commands. Out of memory is a result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.peers.peer import Setting, Unsupported, load_method, parse_method
from benchmarks.training_presets import Group, estimate_turn_seconds, presets
from benchmarks.training_records import FINAL, Cell, append_new, cell_key, collect, make_records, read_cells

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Turn:
    """One process to run."""

    group: Group
    method: str
    turn: int

    @property
    def key(self) -> str:
        """In the work file."""
        return cell_key(self.group.setting, self.method, self.turn, self.group.steps)


def turns_of(group: Group) -> list[Turn]:
    """A, B, ..., A, B, ..."""
    return [Turn(group, method, turn) for turn in range(group.turns) for method in group.methods]


class Pool:
    """Child processes; the next ones import their libraries while one runs a long sequence.

    Short steps are bound by the host, so nothing else may run beside them.
    """

    AHEAD, AHEAD_TOKENS = 2, 16384
    COMMAND = (sys.executable, "-m", "benchmarks.training_cell")

    def __init__(self) -> None:
        self.ready: list[subprocess.Popen] = []

    def start(self) -> subprocess.Popen:
        """A child that waits for its job."""
        log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  lives as long as the child
        child = subprocess.Popen(
            self.COMMAND,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        child.log = log  # type: ignore[attr-defined]
        return child

    def run(self, turn: Turn, limit_s: float, following: int) -> dict[str, Any]:
        """Result of a turn. `following`: how many come after it."""
        child = self.ready.pop(0) if self.ready else self.start()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.json"
            job = {
                "setting": dataclasses.asdict(turn.group.setting),
                "method": turn.method,
                "turn": turn.turn,
                "steps": turn.group.steps_of(turn.turn),
                "warmup": turn.group.warmup,
                "probe": turn.turn == 0,
            }
            message = json.dumps({"job": job, "result": str(path)}) + "\n"
            ahead = self.AHEAD if turn.group.setting.tokens > self.AHEAD_TOKENS else 0
            while len(self.ready) < min(ahead, following):
                self.ready.append(self.start())
            try:
                child.communicate(message, timeout=limit_s)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                return {"status": "timeout", "reason": f"not done after {limit_s:.0f} s"}
            if path.exists():
                return json.loads(path.read_text())
        child.log.seek(0)  # type: ignore[attr-defined]
        tail = child.log.read()[-2000:]  # type: ignore[attr-defined]
        return {"status": "killed" if child.returncode < 0 else "failed", "code": child.returncode, "reason": tail}

    def close(self) -> None:
        """Lets the waiting children go."""
        for child in self.ready:
            child.communicate("")
        self.ready = []


class Session:
    """One command: the turns that the work file lacks, as far as the budget goes."""

    def __init__(self, groups: Sequence[Group], options: argparse.Namespace) -> None:
        self.options, self.cells = options, read_cells(options.work)
        self.command, self.begin = uuid.uuid4().hex[:12], time.monotonic()
        self.rounds = [[t for t in turns_of(g) if t.turn == n] for g in groups for n in range(g.turns)]
        self.rounds = [[t for t in turns if _is_open(t, self.cells, options)] for turns in self.rounds]
        self.waiting = sum(len(turns) for turns in self.rounds)
        options.work.parent.mkdir(parents=True, exist_ok=True)

    @property
    def left_s(self) -> float:
        """Of the budget."""
        return self.options.budget_seconds - (time.monotonic() - self.begin)

    def estimate(self, turn: Turn) -> float:
        """Seconds that a turn will take; none where the first turn said that the method cannot run."""
        if _hopeless(turn, self.cells):
            return 0.0
        return estimate_turn_seconds(turn.group, turn.method, turn.turn, _step_seconds(turn, self.cells))

    def run(self) -> bool:
        """Runs what fits. Returns whether all is done.

        A round, one turn of every method, is begun only if all of it fits, so that its methods meet in one command.
        Only a command that has done nothing yet begins a round that is too long for it.
        """
        pool, idle = Pool(), True
        try:
            for turns in self.rounds:
                needed = sum(self.estimate(turn) for turn in turns)
                if needed > self.left_s and not idle:
                    return self._stop(f"the next round, {_label(turns[0])} and on,", needed)
                for turn in turns:
                    self.waiting -= 1
                    if _hopeless(turn, self.cells):
                        continue
                    if self.estimate(turn) > self.left_s:
                        return self._stop(_label(turn), self.estimate(turn))
                    idle = False
                    self._run_turn(pool, turn)
        finally:
            pool.close()
        return True

    def _stop(self, what: str, needed_s: float) -> bool:
        print(f"stopped: {what} needs about {needed_s:.0f} s, {self.left_s:.0f} s are left", flush=True)
        return False

    def _run_turn(self, pool: Pool, turn: Turn) -> None:
        result = pool.run(turn, min(self.left_s, max(120.0, 4 * self.estimate(turn))), self.waiting)
        cell = {"key": turn.key, "command": self.command, "method": turn.method, "turn": turn.turn}
        cell |= {"setting": turn.group.setting.described(), **result}
        cell["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        with self.options.work.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        self.cells[turn.key] = cell
        print(f"{_label(turn)}: {_outcome(cell)}", flush=True)


def _is_open(turn: Turn, cells: dict[str, Cell], options: argparse.Namespace) -> bool:
    known = cells.get(turn.key)
    return known is None or known["status"] not in FINAL or parse_method(turn.method)[0] in options.fresh


def _hopeless(turn: Turn, cells: dict[str, Cell]) -> bool:
    """Whether the first turn already said that the method cannot run here."""
    first = cells.get(dataclasses.replace(turn, turn=0).key)
    return turn.turn == 1 and first is not None and first["status"] in ("out of memory", "unsupported")


def _step_seconds(turn: Turn, cells: dict[str, Cell]) -> float | None:
    """Of the method's other turn."""
    other = cells.get(dataclasses.replace(turn, turn=1 - turn.turn).key)
    return statistics.median(other["seconds"]) if other and other["status"] == "ok" else None


def _label(turn: Turn) -> str:
    setting = turn.group.setting
    return f"{setting.label} {setting.tokens} {setting.lora} {turn.method} turn {turn.turn + 1}"


def _outcome(cell: Cell) -> str:
    if cell["status"] != "ok":
        return f"{cell['status']}: {cell.get('reason', '')}"
    held = f", holds {statistics.median(cell['held_bytes']) / 2**30:.2f} GiB" if any(cell["held_bytes"]) else ""
    step, loss = statistics.median(cell["seconds"]), cell["losses"][0]
    notes = "".join(f"\n    note: {note}" for note in cell["describe"].get("notes", ()))
    return (
        f"{step * 1e3:.1f} ms, {cell['peak_gib']:.2f} GiB{held}, first loss {loss:.4f}, {cell['total_s']:.0f} s{notes}"
    )


def print_table(groups: Sequence[Group], cells: dict[str, Cell]) -> None:
    """Medians and peaks of what is complete."""
    for group in groups:
        measured = collect(group, cells)
        if not measured:
            continue
        setting = group.setting
        print(f"\n{setting.label}, {setting.tokens} tokens, LoRA on {setting.lora}")
        for method, one in measured.items():
            status = one.turns[-1]["status"]
            if not one.complete:
                print(f"  {method:<60} {status if status != 'ok' else 'one turn is missing'}")
                continue
            print(f"  {method:<60} {statistics.median(one.seconds) * 1e3:10.1f} ms {max(one.peaks):8.2f} GiB")


def choose_groups(options: argparse.Namespace) -> list[Group]:
    """The preset's groups that were asked for, or one made from the options."""
    if options.methods:
        setting = Setting(options.shape or "llama2-7b", options.tokens, options.lora or "qkvo")
        methods = tuple(method.replace("+", ",") for method in options.methods.split(","))
        found = [Group(setting, methods, (), options.steps or 20, options.warmup or 2)]
    else:
        found = presets()[options.preset]
        found = [
            g for g in found if options.shape in (None, g.setting.shape) and options.lora in (None, g.setting.lora)
        ]
    if options.without:
        found = [
            dataclasses.replace(g, methods=tuple(m for m in g.methods if not any(x in m for x in options.without)))
            for g in found
        ]
    changes = {
        "device": options.device,
        "dtype": options.dtype,
        "supervised_share": options.share,
        "data": options.data,
    }
    changes |= {"layers": options.layers, "seed": options.seed}
    changes = {name: value for name, value in changes.items() if value is not None}
    found = [dataclasses.replace(group, setting=dataclasses.replace(group.setting, **changes)) for group in found]
    sizes = {name: value for name in ("steps", "warmup") if (value := getattr(options, name)) is not None}
    return [dataclasses.replace(group, **sizes) for group in found]


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=sorted(presets()), default="smoke")
    add("--methods", help="methods instead of a preset")
    add("--shape", help="only this shape of the preset; with --methods a shape or a folder with a config.json")
    add("--lora", choices=("qkvo", "all"))
    add(
        "--without", type=lambda text: text.split(","), default=[], help="leave methods with one of these in their name"
    )
    add("--tokens", type=int, default=8192, help="with --methods")
    add("--work", type=Path, default=Path("runs/training.jsonl"), help="one line a turn")
    add("--out", type=Path, default=Path(__file__).parent / "results" / "training.jsonl")
    add("--budget-seconds", type=float, default=float("inf"), help="starts no turn that would not fit")
    add("--steps", type=int, help="timed steps of a method over both turns")
    add("--warmup", type=int)
    add("--layers", type=int)
    add("--share", type=float, help="supervised share; 0.4 by default")
    add("--data", help="pre-tokenised npz; random tokens by default")
    add("--device")
    add("--dtype")
    add("--seed", type=int)
    add("--fresh", type=lambda text: text.split(","), default=[], help="peers to measure again")
    add("--records-only", action="store_true", help="measure nothing, write the Records of the work file")
    add("--list", action="store_true", help="print turns and estimated seconds, run nothing")
    return parser.parse_args(arguments)


def check_methods(groups: Sequence[Group]) -> None:
    """Ends the command for a method that nobody knows, before any process starts."""
    try:
        for group in groups:
            for method in group.methods:
                load_method(method)
    except Unsupported as error:
        sys.exit(f"error: {error}")


def list_turns(groups: Sequence[Group], options: argparse.Namespace) -> None:
    """Prints what would run."""
    cells, total = read_cells(options.work), 0.0
    for turn in (turn for group in groups for turn in turns_of(group)):
        if _is_open(turn, cells, options):
            seconds = estimate_turn_seconds(turn.group, turn.method, turn.turn, _step_seconds(turn, cells))
            total += seconds
            print(f"{seconds:6.0f} s  {_label(turn)}")
    print(f"{total:6.0f} s  estimated in all, on an H200")


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    groups = choose_groups(options)
    check_methods(groups)
    if options.list:
        list_turns(groups, options)
        return 0
    done = True if options.records_only else Session(groups, options).run()
    cells = read_cells(options.work)
    print_table(groups, cells)
    records, remarks = make_records(groups, cells)
    for remark in remarks:
        print(f"remark: {remark}")
    print(f"{append_new(records, options.out)} new Records in {options.out.name}")
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
