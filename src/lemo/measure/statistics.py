"""How a Record's value follows from its raw samples. One table; `check_bars` recomputes published values with it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from lemo.errors import DataError

BASELINE, CANDIDATE, BEST = "baseline", "lemo", "best"

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
    # What the candidate keeps of the baseline, by pairs, one standard error to the unfavourable side.
    "kept_less_error": lambda baseline, lemo: _kept_less_error(baseline, lemo),
}

# baseline, lemo, best -> value
_THREE_LISTS: dict[str, Callable[[Sequence[float], Sequence[float], Sequence[float]], float]] = {
    # How much of what the best gains over the baseline the candidate gains, less one standard error (jackknife by sets
    # of three).
    "share_of_best_less_error": lambda baseline, lemo, best: _share_less_error(baseline, lemo, best),
}

STATISTICS = (*_ONE_LIST, *_TWO_LISTS, *_THREE_LISTS)
COMPARATIVE = (*_TWO_LISTS, *_THREE_LISTS)

Samples = Sequence[float] | Mapping[str, Sequence[float]]


def value_of(samples: Samples, statistic: str) -> float:
    """The value that a named statistic takes on raw samples.

    Args:
        samples: one list of numbers, or for comparative statistics a mapping with the lists `baseline` and `lemo`, for
            some also `best` (further lists are allowed and ignored).
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
    if statistic not in COMPARATIVE:
        raise DataError(f"unknown statistic {statistic!r}; known are {', '.join(STATISTICS)}")
    names = (BASELINE, CANDIDATE) if statistic in _TWO_LISTS else (BASELINE, CANDIDATE, BEST)
    if not isinstance(samples, Mapping) or not all(samples.get(name) for name in names):
        raise DataError(f"statistic {statistic!r} needs the samples of {' and of '.join(map(repr, names))}")
    function: Callable[..., float] = _TWO_LISTS.get(statistic) or _THREE_LISTS[statistic]
    try:
        return float(function(*(samples[name] for name in names)))
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


def _kept_less_error(baseline: Sequence[float], candidate: Sequence[float]) -> float:
    """Mean of candidate over baseline, pair by pair, less its standard error."""
    ratios = [c / b for b, c in zip(baseline, candidate, strict=True)]
    return statistics.fmean(ratios) - paired_standard_error([0.0] * len(ratios), ratios)


def _share_less_error(baseline: Sequence[float], candidate: Sequence[float], best: Sequence[float]) -> float:
    """(baseline - candidate) / (baseline - best), of means, less the jackknife's standard error."""
    if not len(baseline) == len(candidate) == len(best) >= 2:
        raise DataError(f"needs two or more sets of three, got {len(baseline)}, {len(candidate)} and {len(best)}")
    gained = [b - c for b, c in zip(baseline, candidate, strict=True)]
    possible = [b - o for b, o in zip(baseline, best, strict=True)]
    total, most, count = sum(gained), sum(possible), len(gained)
    left_out = [(total - g) / (most - p) for g, p in zip(gained, possible, strict=True)]
    error = statistics.pstdev(left_out) * (count - 1) ** 0.5
    return total / most - error
