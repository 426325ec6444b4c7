"""How a Record's value follows from its raw samples. One table; `check_bars` recomputes published values with it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from lemo.errors import DataError

BASELINE, CANDIDATE = "baseline", "lemo"

_ONE_LIST: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "min": min,
    "max": max,
    "sum": sum,
    "last": lambda values: values[-1],
}

# baseline, lemo -> value
_TWO_LISTS: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    # Gain: how many times less the candidate needs.
    "ratio_of_medians": lambda baseline, lemo: statistics.median(baseline) / statistics.median(lemo),
    "ratio_of_max": lambda baseline, lemo: max(baseline) / max(lemo),
    # The same over several settings: element i of both lists belongs to setting i.
    "ratio_of_geometric_means": lambda baseline, lemo: (
        statistics.geometric_mean(baseline) / statistics.geometric_mean(lemo)
    ),
    # Cost: how many times the baseline the candidate needs.
    "overhead_of_medians": lambda baseline, lemo: statistics.median(lemo) / statistics.median(baseline),
    # Gap: what the candidate has on top of the baseline.
    "difference_of_means": lambda baseline, lemo: statistics.fmean(lemo) - statistics.fmean(baseline),
    # Gain as a difference: what the candidate has less than the baseline.
    "reduction_of_means": lambda baseline, lemo: statistics.fmean(baseline) - statistics.fmean(lemo),
    # The same by pairs, one standard error to the unfavourable side; and the gain in standard errors.
    "gap_plus_error": lambda baseline, lemo: _mean_difference(baseline, lemo) + paired_standard_error(baseline, lemo),
    "gain_less_error": lambda baseline, lemo: _mean_difference(lemo, baseline) - paired_standard_error(baseline, lemo),
    "gain_in_errors": lambda baseline, lemo: _mean_difference(lemo, baseline) / paired_standard_error(baseline, lemo),
}

STATISTICS = (*_ONE_LIST, *_TWO_LISTS)
COMPARATIVE = tuple(_TWO_LISTS)

Samples = Sequence[float] | Mapping[str, Sequence[float]]


def value_of(samples: Samples, statistic: str) -> float:
    """The value that a named statistic takes on raw samples.

    Args:
        samples: one list of numbers, or for comparative statistics a mapping with the lists `baseline` and `lemo`
            (further lists are allowed and ignored).
        statistic: a name of STATISTICS.

    Raises:
        DataError: an unknown statistic, missing or empty lists, or numbers it cannot be computed from.
    """
    if statistic in _ONE_LIST:
        if isinstance(samples, Mapping):
            raise DataError(f"statistic {statistic!r} reads one list of samples, got lists {sorted(samples)}")
        if not samples:
            raise DataError("no samples")
        return float(_ONE_LIST[statistic](samples))
    if statistic not in _TWO_LISTS:
        raise DataError(f"unknown statistic {statistic!r}; known are {', '.join(STATISTICS)}")
    if not isinstance(samples, Mapping) or not samples.get(BASELINE) or not samples.get(CANDIDATE):
        raise DataError(f"statistic {statistic!r} needs the samples of {BASELINE!r} and of {CANDIDATE!r}")
    try:
        return float(_TWO_LISTS[statistic](samples[BASELINE], samples[CANDIDATE]))
    except ZeroDivisionError:
        raise DataError(f"statistic {statistic!r} divides by zero") from None


def paired_standard_error(baseline: Sequence[float], candidate: Sequence[float]) -> float:
    """Standard error of the mean of candidate minus baseline, sample by sample.

    Raises:
        DataError: lists of different length, or fewer than two pairs.
    """
    if len(baseline) != len(candidate) or len(baseline) < 2:
        raise DataError(f"needs two or more pairs, got {len(baseline)} and {len(candidate)} samples")
    differences = [c - b for b, c in zip(baseline, candidate, strict=True)]
    return statistics.stdev(differences) / len(differences) ** 0.5


def _mean_difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Mean of second minus mean of first."""
    return statistics.fmean(second) - statistics.fmean(first)
