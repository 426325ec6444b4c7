"""What was read and cut, and what was lost on the way, as counts and as lines of text."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DataReport:
    """What was read, what became of it, and what was lost; nothing is dropped without standing here.

    Attributes:
        documents: documents read.
        tokens: tokens in them.
        windows: samples that remain.
        window_tokens: longest sample allowed.
        kept_tokens: tokens in the samples that remain.
        lost_tokens: tokens in no sample, by reason.
        unused_windows: samples beyond the limit that was asked for.
        unused_tokens: tokens in them.
        packed_windows: samples that hold more than one document.
        truncated: samples whose document or last turns were cut.
        dropped: samples left out because they were longer than the window.
        supervised_rows: rows that carry loss before any loss-row draw.
        notes: further facts, one line each.
    """

    window_tokens: int
    documents: int = 0
    tokens: int = 0
    windows: int = 0
    kept_tokens: int = 0
    lost_tokens: dict[str, int] = field(default_factory=dict)
    unused_windows: int = 0
    unused_tokens: int = 0
    packed_windows: int = 0
    truncated: int = 0
    dropped: int = 0
    supervised_rows: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def supervised_share(self) -> float:
        """Share of the kept rows that carry loss."""
        return self.supervised_rows / self.kept_tokens if self.kept_tokens else 0.0

    def lose(self, reason: str, tokens: int) -> None:
        """Counts lost tokens."""
        if tokens:
            self.lost_tokens[reason] = self.lost_tokens.get(reason, 0) + int(tokens)

    def lines(self) -> list[str]:
        """The report as lines of text."""
        s = "" if self.windows == 1 else "s"
        packed = f", {self.packed_windows:,} of them packed" if self.packed_windows else ""
        lines = [
            f"{self.documents:,} document{'s' if self.documents != 1 else ''}, {self.tokens:,} tokens",
            f"{self.windows:,} window{s} of up to {self.window_tokens:,} tokens{packed}, {self.kept_tokens:,} tokens",
            f"rows with loss: {self.supervised_share:.1%}",
        ]
        lost = sum(self.lost_tokens.values())
        if lost:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.lost_tokens.items())
            lines.append(f"lost tokens: {lost:,} ({lost / self.tokens:.1%}): {reasons}")
        if self.unused_windows:
            lines.append(f"beyond the limit: {self.unused_windows:,} windows with {self.unused_tokens:,} tokens")
        if self.truncated:
            lines.append(f"samples truncated: {self.truncated:,}")
        if self.dropped:
            lines.append(f"samples dropped: {self.dropped:,}")
        return lines + self.notes
