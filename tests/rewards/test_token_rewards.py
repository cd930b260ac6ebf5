"""What the rewards sum to and what they ignore."""

import numpy as np
import pytest

from dpr_jax.rewards import (
    BaselineRelative,
    Endogenous,
    LogLikelihood,
    Scores,
    apply_reward,
    needs,
)

# Numpy warns of the garbage that the tests put into the padding.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def _relative(sft, ref, mask):
  return np.asarray(
      apply_reward(BaselineRelative(), Scores(sft_logp=sft, ref_logp=ref, mask=mask))
  )


def _endogenous(sft, value, mask):
  return np.asarray(
      apply_reward(Endogenous(), Scores(sft_logp=sft, sft_logsumexp=value, mask=mask))
  )


def test_baseline_relative_sums_to_the_log_ratio(make_arrays):
  sft, ref, mask = make_arrays(2)
  got = _relative(sft, ref, mask)
  on = mask > 0
  np.testing.assert_array_equal(got[~on], 0.0)
  for b in range(len(mask)):
    ratio = float(np.sum(sft[b, on[b]], dtype=np.float64) - np.sum(ref[b, on[b]], dtype=np.float64))
    assert got[b].sum() == pytest.approx(ratio, abs=1e-5)
  np.testing.assert_array_equal(_relative(sft, sft, mask), 0.0)


def test_log_likelihood_is_the_logp_of_sft(make_arrays):
  sft, mask = make_arrays(1)
  got = apply_reward(LogLikelihood(), Scores(sft_logp=sft, mask=mask))
  np.testing.assert_array_equal(got, np.where(mask > 0, sft, 0.0))


def test_endogenous_equals_q_minus_next_value_and_telescopes(make_arrays):
  sft, value, mask = make_arrays(2)
  got = _endogenous(sft, value, mask)
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


def test_a_change_of_gauge_moves_endogenous_rewards_but_not_relative_ones(make_arrays, rng):
  sft, value, mask = make_arrays(2)
  shift = rng.normal(size=mask.shape).astype(np.float32)  # c(s): log-probs do not change.
  before, after = _endogenous(sft, value, mask), _endogenous(sft, value + shift, mask)
  assert np.abs(before - after).max() > 1e-2
  first = np.argmax(mask > 0, axis=1)
  np.testing.assert_allclose(
      np.sum(after, axis=1) - np.sum(before, axis=1), shift[np.arange(len(mask)), first], atol=1e-5
  )
  assert "sft_logsumexp" not in needs(BaselineRelative())
