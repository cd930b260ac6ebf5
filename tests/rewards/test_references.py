"""Which checkpoints are the reference, and how several of them are one."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.config import default_config, resolve
from dpr_jax.errors import UserError
from dpr_jax.rewards.references import (
    Member,
    candidate_fractions,
    combine_logps,
    milestone_steps,
    reference_members,
    reference_step,
    reference_steps,
)


def _config(**reference):
  config = resolve(default_config())
  return dataclasses.replace(config, reference=dataclasses.replace(config.reference, **reference))


def test_milestones_are_steps_of_the_run_and_the_end_is_kept():
  assert milestone_steps((0.5, 0.25), 10) == {0.25: 2, 0.5: 5, 1.0: 10}
  assert milestone_steps((), 7) == {1.0: 7}
  assert reference_step(0.5, (0.25, 0.5), 10) == 5
  assert reference_step(1.0, (), 7) == 7


@pytest.mark.parametrize("fraction,steps", [(0.0, 10), (-0.5, 10), (1.5, 10), (0.01, 10)])
def test_fractions_outside_of_the_run_are_refused(fraction, steps):
  with pytest.raises(UserError, match="config.sft.milestones"):
    milestone_steps((fraction,), steps)


def test_a_reference_that_was_not_kept_is_refused():
  expected = r"config.reference.fraction=0.4 .*0.25.*config.sft.milestones"
  with pytest.raises(UserError, match=expected):
    reference_step(0.4, (0.25,), 100)
  with pytest.raises(UserError, match=r"config.reference.fractions\[1\]=0.4 .*milestones"):
    reference_members(_config(kind="ensemble_mean_logp", fractions=(0.25, 0.4)))


def test_members_of_each_kind():
  steps = _config().sft.steps
  assert reference_members(_config()) == (Member("sft", steps // 2),)
  assert reference_members(_config(), 0.25) == (Member("sft", steps // 4),)
  half = _config(kind="half_data", fraction=0.3)
  assert reference_members(half) == (Member("ref", round(0.3 * steps)),)
  assert reference_members(_config(kind="ema")) == (Member("sft", steps, "ema"),)
  for kind in ("ensemble_logmeanexp", "ensemble_mean_logp"):
    several = _config(kind=kind, fractions=(0.1, 0.75))
    expected = (Member("sft", round(0.1 * steps)), Member("sft", round(0.75 * steps)))
    assert reference_members(several) == expected


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1e-6])
def test_half_data_needs_a_share_that_gives_steps(fraction):
  with pytest.raises(UserError, match=r"config\.reference\.fraction"):
    reference_steps(fraction, 100)


def test_candidates_are_the_milestones_before_the_end():
  config = _config(select="snr")
  assert candidate_fractions(config) == [0.1, 0.25, 0.5, 0.75]
  few = dataclasses.replace(config, sft=dataclasses.replace(config.sft, milestones=(0.5, 1.0)))
  with pytest.raises(UserError, match=r"config\.reference\.select=snr needs at least two"):
    candidate_fractions(few)


@pytest.mark.parametrize("members", [1, 3])
def test_ensembles_equal_sums_of_probabilities_and_means(rng, members):
  probs = rng.dirichlet(np.ones(5), size=(members, 2, 4))  # [K, B, T, V].
  logps = jnp.asarray(np.log(probs), jnp.float32)
  mixture, mean = (np.asarray(combine_logps(logps, how)) for how in ("logmeanexp", "mean_logp"))
  np.testing.assert_allclose(np.exp(mixture), probs.mean(0), atol=1e-6)
  np.testing.assert_allclose(np.exp(mixture).sum(-1), 1.0, atol=1e-6)
  np.testing.assert_allclose(mean, np.log(probs).mean(0), atol=1e-5)
  assert (mixture >= mean - 1e-6).all()  # Jensen.
  with pytest.raises(ValueError, match="median"):
    combine_logps(logps, "median")
