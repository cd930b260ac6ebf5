"""What the rewards sum to, what they ignore, and that fractions and gradients survive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.rewards import (
    baseline_relative,
    endogenous,
    hybrid,
    kl_penalised,
    log_likelihood,
)

# Numpy warns of the garbage that the tests put into the padding.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

BAD = np.array([np.nan, np.inf, -np.inf], np.float32)


def _arrays(rng, count, batch=5, length=8):
  """`count` float32 [B, T] arrays with garbage outside of the mask, and the mask."""
  first = rng.integers(0, 3, (batch, 1))
  last = first + rng.integers(1, length - 2, (batch, 1))
  column = np.arange(length)
  mask = ((column >= first) & (column < last)).astype(np.float32)
  garbage = lambda: rng.choice(BAD, mask.shape)
  arrays = [
      np.where(mask > 0, -rng.exponential(size=mask.shape), garbage()).astype(np.float32)
      for _ in range(count)
  ]
  return *arrays, mask


def test_baseline_relative_sums_to_the_log_ratio(rng):
  sft, ref, mask = _arrays(rng, 2)
  got = np.asarray(baseline_relative(sft, ref, mask))
  on = mask > 0
  np.testing.assert_array_equal(got[~on], 0.0)
  for b in range(len(mask)):
    ratio = float(np.sum(sft[b, on[b]], dtype=np.float64) - np.sum(ref[b, on[b]], dtype=np.float64))
    assert got[b].sum() == pytest.approx(ratio, abs=1e-5)
  np.testing.assert_array_equal(baseline_relative(sft, sft, mask), 0.0)


def test_log_likelihood_is_the_logp_of_sft(rng):
  sft, mask = _arrays(rng, 1)
  np.testing.assert_array_equal(log_likelihood(sft, mask), np.where(mask > 0, sft, 0.0))


def test_endogenous_equals_q_minus_next_value_and_telescopes(rng):
  sft, value, mask = _arrays(rng, 2)
  got = np.asarray(endogenous(sft, value, mask))
  for b, t in np.ndindex(mask.shape):
    if not mask[b, t]:
      assert got[b, t] == 0
      continue
    after = value[b, t + 1] if t + 1 < mask.shape[1] and mask[b, t + 1] else 0.0  # V(terminal) = 0.
    q = sft[b, t] + value[b, t]
    assert got[b, t] == pytest.approx(q - after, abs=1e-5)
  for b in range(len(mask)):
    on = mask[b] > 0
    assert got[b].sum() == pytest.approx(sft[b, on].sum() + value[b, on][0], abs=1e-5)


def test_a_change_of_gauge_moves_endogenous_rewards_but_not_relative_ones(rng):
  sft, ref, value, mask = _arrays(rng, 3)
  shift = rng.normal(size=mask.shape).astype(np.float32)  # c(s): log-probs do not change.
  before, after = endogenous(sft, value, mask), endogenous(sft, value + shift, mask)
  assert np.abs(np.asarray(before) - after).max() > 1e-2
  first = np.argmax(mask > 0, axis=1)
  np.testing.assert_allclose(
      np.sum(after, axis=1) - np.sum(before, axis=1), shift[np.arange(len(mask)), first], atol=1e-5
  )


@pytest.mark.parametrize("dtype", [np.int32, np.float32, jnp.bfloat16])
def test_fractions_survive_whatever_the_dtype_of_the_rewards(rng, dtype):
  policy, sft, mask = _arrays(rng, 2)
  rewards = np.ones_like(mask).astype(dtype)
  got = kl_penalised(rewards, policy, sft, mask, beta=0.25)
  assert got.dtype == jnp.float32
  on = mask > 0
  np.testing.assert_allclose(np.asarray(got)[on], (1 - 0.25 * (policy - sft))[on], atol=1e-6)
  np.testing.assert_array_equal(np.asarray(got)[~on], 0.0)


def test_the_kl_in_the_reward_carries_no_gradient(rng):
  policy, sft, mask = _arrays(rng, 2)
  grad = jax.grad(lambda p: jnp.sum(kl_penalised(jnp.zeros_like(p), p, sft, mask, 1.0)))(policy)
  np.testing.assert_array_equal(grad, 0.0)


def test_hybrid_puts_the_external_score_on_the_last_token(rng):
  rewards, mask = _arrays(rng, 1)
  mask[2] = 0.0  # a row that is masked away.
  external = rng.random(len(mask)).astype(np.float32)
  got = np.asarray(jax.jit(hybrid, static_argnums=3)(rewards, external, mask, 0.3))
  for b, t in np.ndindex(mask.shape):
    expected = 0.0
    if mask[b, t]:
      expected = 0.7 * rewards[b, t]
      if t == np.flatnonzero(mask[b])[-1]:
        expected += 0.3 * external[b]
    assert got[b, t] == pytest.approx(expected, abs=1e-5)
  alone = np.asarray(hybrid(rewards, external, mask, 1.0)).sum(1)
  np.testing.assert_allclose(alone, np.where(mask.any(1), external, 0.0), atol=1e-6)
