"""Markdown tables from Records, and the places in documents that such tables fill.

A document holds a pair of comments, `<!-- records:NAME -->` and `<!-- /records -->`; `fill` writes the table of that
name between them. `python -m lemo.report.tables README.md FILE.jsonl ...` does it for a file.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lemo.errors import DataError
from lemo.measure.memory import GIB
from lemo.measure.record import Record, read_records

NOT_MEASURED = "*Not measured yet.*"
_SPEEDUP = re.compile(r"C\.\d+k_(?P<what>time|k50|k30)/\w+/qkvo")
_MARKED = re.compile(r"(<!-- records:(?P<name>[\w-]+) -->\n).*?(<!-- /records -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- /?records")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; numbers, which begin with a digit or sign, are set to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    right = [all(re.match(r"[-+–\d]", row[i]) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        return "| " + " | ".join(cells) + " |"

    rule = (
        ("-" * (width - 1) + ":") if to_right else "-" * width for width, to_right in zip(widths, right, strict=True)
    )
    return "\n".join([line(header), "| " + " | ".join(rule) + " |", *map(line, rows)])


def latest(records: Sequence[Record], name: str) -> list[Record]:
    """The newest Record of a name for each seed, of the setting that was measured last."""
    named = sorted((r for r in records if r.name == name), key=lambda r: r.time)
    same = [r for r in named if r.config_hash == named[-1].config_hash]
    return list({r.seeds: r for r in same}.values())


def mean_value(records: Sequence[Record], name: str) -> float | None:
    """Mean over seeds of the newest values of a name; None when it was not measured."""
    found = latest(records, name)
    return statistics.fmean(r.value for r in found) if found else None


def variants(records: Sequence[Record], study: str) -> list[str]:
    """Variants of a study, Records named `study/variant/...`, in the order in which they were measured."""
    names = (r.name.split("/") for r in records)
    return list(dict.fromkeys(parts[1] for parts in names if parts[0] == study and len(parts) == 3))


def _study_table(study: str, columns: dict[str, tuple[str, str]]) -> Callable[[Sequence[Record]], str]:
    """A table with one line per variant; `columns` maps the measured thing to heading and number format."""

    def table(records: Sequence[Record]) -> str:
        rows = []
        for variant in variants(records, study):
            values = [mean_value(records, f"{study}/{variant}/{what}") for what in columns]
            if any(v is not None for v in values):
                cells = ["–" if v is None else format(v, f[1]) for v, f in zip(values, columns.values(), strict=True)]
                rows.append([variant.replace("_", " "), *cells])
        if not rows:
            return NOT_MEASURED
        newest = max((r for r in records if r.name.startswith(f"{study}/")), key=lambda r: r.time)
        text = markdown(["variant", *(heading for heading, _ in columns.values())], rows)
        software = f"torch {newest.versions.get('torch', '?')}"
        return f"{text}\n\n{newest.device}, {software}, {newest.time[:10]}, `{newest.script}`."

    return table


def training_table(records: Sequence[Record]) -> str:
    """One line a shape and length: the strongest exact tool, the default, and times of fixed shares of kept rows.

    Made of the newest Records that answer the bars `C.{length}k_{time, k50, k30}` with LoRA on q, k, v and o; such a
    `speedup` holds its baseline's samples, and `.../METHOD/peak_memory` the peak of either.
    """
    peaks = {r.name: r.value for r in sorted(records, key=lambda r: r.time) if r.name.endswith("/peak_memory")}
    found: dict[tuple[str, int], dict[str, Record]] = {}
    for record in sorted(records, key=lambda r: r.time):
        if (match := _SPEEDUP.fullmatch(record.bar or "")) is not None:
            found.setdefault((record.setting["shape"], record.setting["tokens"]), {})[match["what"]] = record
    if not found:
        return NOT_MEASURED

    def cost(record: Record, method: str, side: str) -> list[str]:
        peak = peaks.get(f"{record.name.rsplit('/', 2)[0]}/{method}/peak_memory")
        ms = 1000 * statistics.median(record.samples[side])
        return [f"{ms:,.0f}", "–" if peak is None else f"{peak:.1f}"]

    rows = []
    for (shape, tokens), one in sorted(found.items()):
        default, any_one = one.get("time"), next(reversed(one.values()))
        line = [shape, f"{tokens:,}", *cost(default or any_one, (default or any_one).setting["baseline"], "baseline")]
        line += ["–", "–"] if default is None else cost(default, default.setting["method"], "lemo")
        rows.append([*line, *(f"{one[what].value:.2f}" if what in one else "–" for what in ("time", "k50", "k30"))])
    newest = max((r for one in found.values() for r in one.values()), key=lambda r: r.time)
    heading = ["shape", "tokens", "Liger: ms a step", "GiB", "lemo, default: ms a step", "GiB", "times as fast"]
    heading += ["with 50 % of rows kept", "with 30 %"]
    software = f"torch {newest.versions.get('torch', '?')}"
    return f"{markdown(heading, rows)}\n\n{newest.device}, {software}, {newest.time[:10]}, `{newest.script}`."


def bar_table(records: Sequence[Record]) -> str:
    """Newest value of every Record that answers a bar."""
    newest = {r.bar: r for r in sorted(records, key=lambda r: r.time) if r.bar}
    if not newest:
        return NOT_MEASURED
    rows = [
        [f"`{bar}`", f"{r.value:.4g}", r.unit, r.device, r.time[:10], f"`{r.script}`"]
        for bar, r in sorted(newest.items())
    ]
    return markdown(["bar", "value", "unit", "device", "measured", "by"], rows)


def estimate_table(records: Sequence[Record]) -> str:
    """Measured peak of every held-out point beside the estimate's error, largest first."""
    found = latest(records, "estimate/within_ten_percent")
    if not found:
        return NOT_MEASURED
    setting = found[0].setting
    rows = []
    for key, error in sorted(setting["errors"].items(), key=lambda item: -abs(item[1])):
        point = dict(part.split("=", 1) for part in key.split())
        shape = point["shape"] + (f", {point['layers']} layers" if "layers" in point else "")
        what = point.get("preset") or ("dense" if point["keep"] == "1.0" else f"keep {point['keep']}, kv {point['kv']}")
        how = point["recompute"] + (", offload" if "offload" in point else "")
        peak = setting["peaks_bytes"][key] / GIB
        rows.append([shape, f"{int(point['tokens']):,}", what, point["engine"], how, f"{peak:.2f}", f"{error:+.1%}"])
    heading = ["shape", "tokens", "rows", "engine", "recompute", "peak, GiB", "estimate off by"]
    close = sum(abs(error) <= setting["within"] for error in setting["errors"].values())
    text = f"{close} of {len(rows)} points within {setting['within']:.0%}."
    return f"{text}\n\n{markdown(heading, rows)}\n\n{found[0].device}, {found[0].time[:10]}, `{found[0].script}`."


TABLES: dict[str, Callable[[Sequence[Record]], str]] = {
    "bars": bar_table,
    "training": training_table,
    "estimate": estimate_table,
    "demo": _study_table(
        "demo",
        {
            "validation_loss_before": ("loss before, nats", ".3f"),
            "validation_loss_after": ("after", ".3f"),
            "tokens_per_second": ("tokens/s", ".0f"),
            "peak_memory": ("peak memory, GiB", ".2f"),
            "forward_share": ("rows that run, share", ".2f"),
            "backward_share": ("rows with gradient, share", ".2f"),
        },
    ),
    "extension": _study_table(
        "extension",
        {
            "dense_validation_loss": ("validation loss, nats", ".4f"),
            "dense_validation_loss_on_loss_rows": ("on loss rows", ".4f"),
            "sparse_validation_loss": ("the same, sparse", ".4f"),
            "tokens_per_second": ("tokens/s", ",.0f"),
            "peak_memory": ("peak memory, GiB", ".1f"),
            "speedup": ("step time, dense over lemo", ".2f"),
        },
    ),
}


def fill(text: str, records: Sequence[Record]) -> str:
    """The document with every marked place filled.

    Raises:
        DataError: a place names a table that does not exist, or its markers do not pair.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise DataError(f"no table is called {name!r}; there are {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[name](records)}\n\n{match[3]}"

    places = len(_MARKED.findall(text))
    if len(_MARKER.findall(text)) != 2 * places:
        raise DataError("a records marker has no partner: each `<!-- records:NAME -->` needs `<!-- /records -->`")
    return _MARKED.sub(replace, text)


def main(arguments: Sequence[str]) -> int:
    """Fills the first file from the Records in the others."""
    if not arguments:
        print("usage: python -m lemo.report.tables DOCUMENT [RECORDS.jsonl ...]", file=sys.stderr)
        return 2
    document = Path(arguments[0])
    try:
        document.write_text(fill(document.read_text(encoding="utf-8"), read_records(arguments[1:])), encoding="utf-8")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
