"""Returns and advantages against loops in plain Python; padding holds garbage throughout."""

import jax
import numpy as np
import pytest

from dpr_jax.rewards import advantages, returns
from dpr_jax.rewards.transforms import RewardContext, zscore_by_position


def _case(rng, batch=6, length=7, contiguous=True):
  mask = (np.arange(length) < rng.integers(1, length + 1, (batch, 1))).astype(np.float32)
  if not contiguous:
    mask = (rng.random((batch, length)) < 0.6).astype(np.float32)
  garbage = rng.choice(np.array([np.nan, np.inf, -np.inf, 1e30], np.float32), mask.shape)
  return np.where(mask > 0, rng.normal(size=mask.shape), garbage).astype(np.float32), mask


def _naive_return(rewards, mask, kind, gamma):
  out = np.zeros(mask.shape)
  for b, t in np.ndindex(mask.shape):
    if not mask[b, t]:
      continue
    for k in range(mask.shape[1]):
      if not mask[b, k]:
        continue
      weight = {
          "reward_to_go": gamma ** (k - t) if k >= t else 0.0,
          "full_return": 1.0,
          "per_token": float(k == t),
      }[kind]
      out[b, t] += weight * float(rewards[b, k])
  return out


@pytest.mark.parametrize("kind", ["reward_to_go", "full_return", "per_token"])
@pytest.mark.parametrize("gamma", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("contiguous", [True, False])
def test_returns_equal_the_double_sum(rng, kind, gamma, contiguous):
  rewards, mask = _case(rng, contiguous=contiguous)
  got = jax.jit(returns, static_argnums=(2, 3))(rewards, mask, kind, gamma)
  np.testing.assert_allclose(got, _naive_return(rewards, mask, kind, gamma), atol=1e-5)


def _naive_advantage(g, mask, baseline, group_size):
  out = np.zeros(mask.shape)
  on = [(b, t) for b, t in np.ndindex(mask.shape) if mask[b, t]]
  values = np.array([float(g[i]) for i in on])
  for b, t in on:
    own = float(g[b, t])
    if baseline == "none":
      out[b, t] = own
    elif baseline == "position_mean":
      out[b, t] = own - np.mean([float(g[c, u]) for c, u in on if u == t])
    elif baseline == "leave_one_out":
      others = [float(g[c, u]) for c, u in on
                if u == t and c != b and c // group_size == b // group_size]
      out[b, t] = own - (np.mean(others) if others else 0.0)
    else:
      out[b, t] = (own - values.mean()) / values.std()
  return out


@pytest.mark.parametrize("baseline,group_size", [
    ("none", 1), ("position_mean", 1), ("leave_one_out", 2), ("leave_one_out", 3), ("whiten", 1),
])
@pytest.mark.parametrize("contiguous", [True, False])
def test_advantages_equal_loops(rng, baseline, group_size, contiguous):
  g, mask = _case(rng, contiguous=contiguous)
  got = jax.jit(advantages, static_argnums=(2, 3))(g, mask, baseline, group_size)
  np.testing.assert_allclose(got, _naive_advantage(g, mask, baseline, group_size), atol=2e-5)


def test_the_leave_one_out_baseline_ignores_the_rows_own_return(rng):
  g, mask = _case(rng)
  changed = g.copy()
  changed[0, 0] += 5.0
  before, after = (advantages(x, mask, "leave_one_out", 3) for x in (g, changed))
  assert float(after[0, 0] - before[0, 0]) == pytest.approx(5.0, abs=1e-4)


def test_equal_returns_whiten_to_zero():
  mask = np.ones((2, 3), np.float32)
  np.testing.assert_array_equal(advantages(np.full((2, 3), 0.7, np.float32), mask, "whiten"), 0.0)


@pytest.mark.parametrize("value", [1e-3, 0.1, 123.4, 1e4, -3e6])
def test_returns_that_are_equal_but_for_rounding_whiten_to_zero(rng, value):
  mask = (rng.random((64, 50)) < 0.9).astype(np.float32)
  equal = np.full((64, 50), value, np.float32)
  noisy = equal * (1 + 5e-7 * rng.normal(size=equal.shape)).astype(np.float32)
  for g in (equal, noisy):
    np.testing.assert_array_equal(advantages(g, mask, "whiten"), 0.0)
    np.testing.assert_array_equal(zscore_by_position()(g, RewardContext(mask=mask)), 0.0)
  signal = equal * (1 + 1e-3 * rng.normal(size=equal.shape)).astype(np.float32)
  if abs(value) > 1:  # Otherwise it is within the epsilon of the division.
    white = np.asarray(advantages(signal, mask, "whiten"))[mask > 0]
    assert white.std() == pytest.approx(1, 0.02)


def test_unknown_names_and_impossible_groups_are_refused(rng):
  g, mask = _case(rng)
  with pytest.raises(ValueError, match="returns='discounted'"):
    returns(g, mask, "discounted")
  with pytest.raises(ValueError, match="variance_baseline='critic'"):
    advantages(g, mask, "critic")
  for size in (1, 4):
    with pytest.raises(ValueError, match=f"group_size={size}"):
      advantages(g, mask, "leave_one_out", size)
