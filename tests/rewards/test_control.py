"""The controller of beta and the moving mean, against their formulas in plain Python."""

import jax
import numpy as np
import pytest

from dpr_jax.rewards.control import WINDOW, KLControl, moving_mean, next_beta


def _naive(kls, beta, target, gain):
  """(betas, means) used and reached at every step, in float64."""
  betas, means, seen = [], [], []
  for kl in kls:
    betas.append(beta)
    error = max(-0.2, min(0.2, (kl - target) / target))
    beta *= 1 + gain * error
    seen.append(kl)
    w = min(len(seen), int(WINDOW))
    means.append((means[-1] if means else 0.0) * (1 - 1 / w) + kl / w)
  return betas, means


def test_the_controls_follow_their_formulas(rng):
  kls = rng.normal(2.0, 1.5, 40).astype(np.float32)
  steered = KLControl(0.8, target_kl=1.7, beta_gain=0.1, kl_budget=9.0)
  control = {k: np.float32(v) for k, v in steered.initial().items()}
  step = jax.jit(steered.next)
  betas, means = [], []
  for kl in kls:
    betas.append(float(control["beta"]))
    control = step(control, kl)
    means.append(float(control["kl_mean"]))
  expected = _naive(kls.tolist(), 0.8, 1.7, 0.1)
  np.testing.assert_allclose(betas, expected[0], rtol=1e-5)
  np.testing.assert_allclose(means, expected[1], rtol=1e-4)


def test_the_first_means_are_plain_averages(rng):
  kls = rng.normal(size=int(WINDOW)).astype(np.float32)
  mean, count = np.float32(0), np.float32(0)
  for i, kl in enumerate(kls):
    mean, count = moving_mean(mean, count, kl)
    assert float(mean) == pytest.approx(kls[: i + 1].mean(), abs=1e-5)


def test_one_wild_batch_moves_beta_by_a_fiftieth():
  for kl, factor in ((1e6, 1.02), (-1e6, 0.98), (1.0, 1.0)):
    assert float(next_beta(np.float32(2.0), np.float32(kl), 1.0, 0.1)) == pytest.approx(2 * factor)


def test_a_kl_that_answers_to_beta_reaches_its_target():
  """KL falls with beta, as near the optimum: kl = 1 / beta^2."""
  beta = np.float32(0.2)
  for _ in range(600):
    beta = next_beta(beta, 1 / beta**2, 4.0, 0.1)
  assert 1 / float(beta) ** 2 == pytest.approx(4.0, rel=1e-3)


def test_nothing_is_carried_where_nothing_is_asked_for():
  fixed = KLControl(1.0)
  assert fixed.initial() == {} and fixed.next({}, np.float32(1)) == {}
  assert set(KLControl(1.0, target_kl=2.0).initial()) == {"beta"}
  assert set(KLControl(1.0, kl_budget=2.0).initial()) == {"kl_mean", "kl_count"}
