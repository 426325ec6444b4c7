"""Samples that cannot be named are refused before any collator sees them."""

from __future__ import annotations

from collections import UserDict

import pytest

from lemo.errors import DataError
from lemo.train.loss_rows import LossRows
from lemo.train.row_draw import sample_name, without_name


@pytest.mark.parametrize(
    ("sample", "part"),
    [({}, "no 'input_ids' (keys: none)"), ({"text": "x"}, "keys: text"), ({"input_ids": "words"}, "list of tokens")],
)
def test_a_sample_without_tokens_is_refused(sample, part):
    with pytest.raises(DataError) as error:
        LossRows(lambda features: pytest.fail("the collator was asked"))([sample])
    assert part in str(error.value) and "input_ids" in str(error.value)


def test_what_a_tokenizer_returns_is_a_sample_as_a_dict_is():
    """Transformers' BatchEncoding is no dict."""
    assert sample_name(UserDict(input_ids=[1, 2])) == sample_name({"input_ids": [1, 2]}) == sample_name([1, 2])
    assert without_name(UserDict(input_ids=[1], sample_id="a")) == {"input_ids": [1]}
