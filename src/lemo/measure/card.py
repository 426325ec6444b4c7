"""Cards: how much memory they have and how fast they are, stated by a table or probed where one is at hand."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace

from lemo.errors import ConfigError
from lemo.measure.memory import GIB


@dataclass(frozen=True)
class Card:
    """One accelerator.

    Attributes:
        name: as people call it.
        memory_bytes: of the card.
        matmul: FLOP/s that large bf16 products reach.
        attention_forward: FLOP/s of causal attention, forward.
        attention_backward: the same, backward.
        bandwidth: bytes/s of reading and writing memory.
        launch_s: time that starting the work of one layer takes at least, forward and backward.
        source: `measured`, or `scaled`: from the vendor's statement by what a measured card of its kind reaches.
    """

    name: str
    memory_bytes: int
    matmul: float
    attention_forward: float
    attention_backward: float
    bandwidth: float
    launch_s: float = 1.2e-3
    source: str = "scaled"


def _card(name: str, gib: float, matmul: float, bandwidth: float, modern: bool = True, source: str = "scaled") -> Card:
    """A card whose attention reaches the usual share of its products: cuDNN on Hopper, FlashAttention-2 before it."""
    forward, backward = (0.78, 0.60) if modern else (0.65, 0.50)
    return Card(name, int(gib * GIB), matmul, forward * matmul, backward * matmul, bandwidth, source=source)


# What products and copies reach, about 0.8 of the stated dense bf16 rate and 0.9 of the stated bandwidth.
CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        _card("h200", 139.8, 680e12, 4.2e12, source="measured"),
        _card("h100", 79.2, 650e12, 2.9e12),
        _card("b200", 178.0, 1600e12, 7.0e12),
        _card("a100-80gb", 79.1, 255e12, 1.8e12, modern=False),
        _card("a100-40gb", 39.4, 255e12, 1.4e12, modern=False),
        _card("l40s", 44.5, 250e12, 0.78e12, modern=False),
        _card("l4", 22.0, 75e12, 0.26e12, modern=False),
        _card("a10g", 22.0, 65e12, 0.54e12, modern=False),
        _card("rtx-4090", 23.5, 150e12, 0.92e12, modern=False),
        _card("rtx-3090", 23.5, 65e12, 0.85e12, modern=False),
        _card("rtx-5090", 31.3, 190e12, 1.6e12, modern=False),
    )
}


def find_card(name: str) -> Card:
    """A card by name, with `:GIB` behind it for another memory size.

    Raises:
        ConfigError: an unknown card, or a size that is no number.
    """
    known, colon, size = name.lower().partition(":")
    if known not in CARDS:
        begun = [card for card in CARDS if known and card.startswith(known)]
        close = begun or difflib.get_close_matches(known, CARDS, n=1)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"no card is called {known!r}, known are {', '.join(CARDS)}, each also as NAME:GIB{meant}")
    if not colon:
        return CARDS[known]
    try:
        gib = float(size)
    except ValueError:
        gib = 0.0
    if not gib > 0:
        raise ConfigError(f"{name!r}: behind the colon stands the card's memory in GiB")
    return replace(CARDS[known], memory_bytes=int(gib * GIB))


def here() -> Card | None:
    """The first CUDA device: its own memory size, and the rates of the card of the table that its name contains.

    None where there is no device. Rates of a card that is not in the table are those of an A100 by bandwidth alone
    and are marked `assumed`; `probe_card` measures them.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    plain = properties.name.lower().replace(" ", "-")
    for name, card in CARDS.items():
        if name.removesuffix("-80gb").removesuffix("-40gb") in plain:
            return replace(card, name=properties.name, memory_bytes=properties.total_memory)
    card = CARDS["a100-80gb"]
    return replace(card, name=properties.name, memory_bytes=properties.total_memory, source="assumed")


def probe_card(card: Card, *, seconds: float = 2.0) -> Card:
    """The same card with rates measured on the first CUDA device.

    Args:
        card: as `here` gives it.
        seconds: about so long.

    Raises:
        ConfigError: there is no CUDA device.
    """
    import torch
    from torch.nn import functional as F

    if not torch.cuda.is_available():
        raise ConfigError("rates can only be measured on a CUDA device")
    each = seconds / 4
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * size**3 / _seconds_of(lambda: a @ b, each)
    bandwidth = 2 * a.nbytes / _seconds_of(lambda: b.copy_(a), each)
    heads, rows, width = 32, 16384, 128
    qkv = [torch.randn(1, heads, rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    flops = 2 * heads * width * rows**2
    with torch.no_grad():
        forward = flops / _seconds_of(lambda: F.scaled_dot_product_attention(*qkv, is_causal=True), each)
    query, key, value = (t.requires_grad_() for t in qkv)
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    grad = torch.ones_like(output)
    spent = _seconds_of(lambda: torch.autograd.grad(output, (query, key, value), grad, retain_graph=True), each)
    return replace(
        card,
        matmul=matmul,
        bandwidth=bandwidth,
        attention_forward=forward,
        attention_backward=2.5 * flops / spent,
        source="probed",
    )


def _seconds_of(run: Callable[[], object], seconds: float) -> float:
    """Seconds of a call: the median of those that fit, after one to warm up."""
    import statistics

    from lemo.measure.profile import StepTimer

    timer = StepTimer("cuda")
    run()
    while len(timer.seconds) < 3 or (sum(timer.seconds) < seconds and len(timer.seconds) < 100):
        with timer.step():
            run()
    return statistics.median(timer.seconds)
