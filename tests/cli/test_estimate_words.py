"""What `lemo estimate` says of data is true of them; a mistyped card is guessed."""

from __future__ import annotations

import pytest

from lemo.cli.estimate import describe_data
from lemo.config import DataConfig, LossRowsConfig, ModelConfig, RunConfig, SparsityConfig
from lemo.errors import ConfigError
from lemo.measure.card import CARDS, find_card
from lemo.train.data_gain import Looked, data_gain
from lemo.train.forecast import forecast

SHORT, LONG = (512, 0.37, 0.37), (65536, 0.37, 0.37)
TOO_SHORT, NOTHING = "are too short to gain", "leave too little out to gain at any length"


@pytest.mark.parametrize(
    ("shares", "enabled", "line"),
    [
        ([SHORT], True, f"no step gains; all {TOO_SHORT}"),
        ([SHORT], False, f"no step gains; all {NOTHING}"),
        ([LONG], False, f"no step gains; all {NOTHING}"),
        ([LONG], True, None),
        ([SHORT, LONG, LONG, LONG], True, f"25% {TOO_SHORT}"),
    ],
)
def test_why_nothing_gains(shares, enabled, line):
    run = RunConfig(
        model=ModelConfig("smollm2-135m"),
        data=DataConfig(window_tokens=65536),
        loss_rows=LossRowsConfig(),
        sparsity=SparsityConfig(enabled=enabled),
    )
    found = data_gain(run, forecast(run), Looked(shares, len(shares)), CARDS["h100"])
    said = describe_data(found).splitlines()[1].strip()
    gaining = sum(tokens == 65536 for tokens, _, _ in shares) / len(shares) if enabled else 0.0
    assert found.gaining == gaining and "0%" not in said.split()
    if gaining:
        assert said.startswith(f"{gaining:.0%} of the steps gain, the best is {found.best:.1f} times as fast")
        assert said.endswith("times" if line is None else line)
    else:
        assert said == line


@pytest.mark.parametrize(
    ("name", "meant"), [("rtx4090", "rtx-4090"), ("A100:40", "a100-80gb or a100-40gb"), ("mi300x", None)]
)
def test_a_mistyped_card_is_guessed(name, meant):
    with pytest.raises(ConfigError, match="no card is called") as caught:
        find_card(name)
    assert str(caught.value).endswith("each also as NAME:GIB" if meant is None else f"; did you mean {meant}?")
