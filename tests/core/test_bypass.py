"""Laws of the bypass fit: it is the best map of its rank, sums merge, weights count."""

import pytest
import torch

from lemo.core.bypass import Bypass, BypassFit, rms_normalise
from lemo.errors import ConfigError

WIDTH = 12


def _data(rows=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) * 3
    mixing = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    return x, rms_normalise(x) @ mixing + 0.3 * noise


def _fit(x, update, weight=None):
    fit = BypassFit(WIDTH)
    fit.add(x, update, weight)
    return fit


def _loss(fit, down, up, ridge):
    map_MM = down.double() @ up.double()
    strength = ridge * fit.gram_MM.diagonal().mean()
    residual = fit.energy - 2 * (map_MM * fit.cross_MM).sum() + (map_MM * (fit.gram_MM @ map_MM)).sum()
    return float(residual + strength * map_MM.square().sum())


def test_exact_low_rank_map_is_recovered():
    x, _ = _data()
    down, up = torch.randn(WIDTH, 3).double(), torch.randn(3, WIDTH).double()
    update = rms_normalise(x) @ down @ up
    fit = _fit(x, update)
    bypass = fit.solve(3, ridge=0.0)
    torch.testing.assert_close(bypass.update(x), update, rtol=1e-4, atol=1e-4)
    assert fit.explained(bypass) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("rank", [1, 4])
def test_no_step_in_the_low_rank_family_improves_the_solution(rank, ridge):
    fit = _fit(*_data())
    bypass = fit.solve(rank, ridge)
    best = _loss(fit, bypass.down_MR, bypass.up_RM, ridge)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        candidate_down = torch.randn(WIDTH, rank, generator=generator, dtype=torch.float64)
        # The best up-map for this down-map, by the normal equations.
        strength = ridge * fit.gram_MM.diagonal().mean()
        metric = fit.gram_MM + strength * torch.eye(WIDTH, dtype=torch.float64)
        for start in (candidate_down, bypass.down_MR.double() + 0.05 * candidate_down):
            best_up = torch.linalg.solve(start.T @ metric @ start, start.T @ fit.cross_MM)
            assert _loss(fit, start, best_up, ridge) >= best - 1e-6 * abs(best)


def test_full_rank_equals_ridge_regression_and_rank_m():
    x, update = _data()
    fit = _fit(x, update)
    full, same = fit.solve(None, 1e-2), fit.solve(WIDTH, 1e-2)
    normed = rms_normalise(x)
    strength = 1e-2 * fit.gram_MM.diagonal().mean()
    direct = torch.linalg.solve(normed.T @ normed + strength * torch.eye(WIDTH, dtype=torch.float64), normed.T @ update)
    torch.testing.assert_close(full.down_MR.double(), direct, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((same.down_MR @ same.up_RM).double(), direct, rtol=1e-4, atol=1e-5)


def test_more_rank_explains_more_and_matches_the_rows():
    x, update = _data()
    fit = _fit(x, update)
    shares = [fit.explained(fit.solve(rank, 0.0)) for rank in (1, 3, 6, WIDTH)]
    assert shares == sorted(shares) and shares[0] < shares[-1]
    residual = update - fit.solve(6, 0.0).update(x)
    assert shares[2] == pytest.approx(float(1 - residual.square().sum() / update.square().sum()), abs=1e-5)


def test_merged_sums_equal_one_pass():
    x, update = _data()
    whole = _fit(x, update)
    parts = _fit(x[:90], update[:90]).merge(_fit(x[90:], update[90:]))
    restored = BypassFit.from_state_dict(parts.state_dict())
    torch.testing.assert_close(restored.gram_MM, whole.gram_MM)
    torch.testing.assert_close(restored.solve(4).down_MR, whole.solve(4).down_MR, rtol=1e-4, atol=1e-5)


def test_rows_of_weight_zero_do_not_matter():
    x, update = _data()
    weight = torch.ones(len(x), dtype=torch.float64)
    weight[:50] = 0
    poisoned = x.clone()
    poisoned[:50] = torch.nan
    fit, reference = _fit(poisoned, update, weight), _fit(x[50:], update[50:])
    torch.testing.assert_close(fit.gram_MM, reference.gram_MM)
    torch.testing.assert_close(fit.energy, reference.energy)


def test_a_weight_of_two_equals_the_row_twice():
    x, update = _data(40)
    weight = torch.ones(40, dtype=torch.float64)
    weight[:10] = 2
    fit = _fit(x, update, weight)
    doubled = _fit(torch.cat([x, x[:10]]), torch.cat([update, update[:10]]))
    torch.testing.assert_close(fit.cross_MM, doubled.cross_MM)


def test_update_keeps_the_dtype_and_differentiates():
    bypass = Bypass(torch.randn(WIDTH, 2), torch.randn(2, WIDTH))
    assert bypass.rank == 2
    assert bypass.update(torch.randn(3, WIDTH, dtype=torch.bfloat16)).dtype == torch.bfloat16
    exact = bypass.to(dtype=torch.float64)
    x = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(exact.update, (x,))


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="rows to be fitted"):
        BypassFit(WIDTH).solve(2)
    for rank in (0, WIDTH + 1):
        with pytest.raises(ConfigError, match="rank"):
            _fit(*_data()).solve(rank)


def test_a_prior_is_what_the_map_is_held_to():
    fit, rank = _fit(*_data()), 3
    prior = Bypass(torch.randn(WIDTH, rank), torch.randn(rank, WIDTH))
    held = fit.solve(rank, 1e9, prior)
    torch.testing.assert_close(held.down_MR @ held.up_RM, prior.down_MR @ prior.up_RM, rtol=1e-3, atol=1e-3)
    free = fit.solve(None, 0.5)
    pulled = fit.solve(None, 0.5, prior)
    # Stationary: G(W - free optimum) + strength (W - P) = 0, that is G W - C + strength (W - P) = 0.
    strength = 0.5 * fit.gram_MM.diagonal().mean()
    gradient = fit.gram_MM @ pulled.down_MR.double() - fit.cross_MM
    gradient += strength * (pulled.down_MR.double() - (prior.down_MR @ prior.up_RM).double())
    assert float(gradient.abs().max()) < 1e-3 * float(fit.cross_MM.abs().max())
    assert not torch.allclose(free.down_MR, pulled.down_MR, atol=1e-2)
    nothing = Bypass(torch.zeros(WIDTH, rank), torch.zeros(rank, WIDTH))
    assert torch.equal(fit.solve(rank, 0.1, nothing).down_MR, fit.solve(rank, 0.1).down_MR)
