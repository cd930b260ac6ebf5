"""What a reward asks for is read off its parameters, and an unmet need is never zeros."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.config.fields import kinds
from dpr_jax.rewards import (
    BaselineRelative,
    Endogenous,
    LogLikelihood,
    Reward,
    Scores,
    apply_reward,
    needs,
)
from dpr_jax.rewards.base import check_pointwise


def confident(sft_logp, ref_logp, sft_entropy):
  return jnp.where(sft_entropy < 1.0, sft_logp - ref_logp, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(Reward):
  """A reward with a field of its own."""

  factor: float = 2.0
  pointwise = True

  def __call__(self, sft_logp):
    return self.factor * sft_logp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unsure(Reward):
  """Says that it is pointwise, but asks for more than the log-probs of one token."""

  pointwise = True

  def __call__(self, sft_logp, sft_entropy):
    return sft_logp * sft_entropy


def test_the_parameters_are_the_needs():
  assert needs(confident) == {"sft_logp", "ref_logp", "sft_entropy"}
  assert needs(lambda policy_logp, mask, floor=0.0: policy_logp) == {"policy_logp", "mask"}
  assert needs(Scaled()) == needs(LogLikelihood()) == {"sft_logp"}
  assert needs(BaselineRelative()) == {"sft_logp", "ref_logp"}
  assert needs(Endogenous()) == {"sft_logp", "sft_logsumexp", "mask"}


@pytest.mark.parametrize("reward", [
    lambda sft_logp, base_logp: sft_logp - base_logp, lambda *base_logp: 0.0,
    lambda sft_logp, **base_logp: sft_logp,
])
def test_a_parameter_that_is_no_score_is_refused(reward):
  with pytest.raises(ValueError, match="'base_logp', which is no score; known: sft_logp, .*mask"):
    needs(reward)
  with pytest.raises(ValueError, match="base_logp"):
    apply_reward(reward, Scores(sft_logp=jnp.zeros((1, 1)), mask=jnp.ones((1, 1))))


def test_a_score_that_was_not_computed_is_an_error():
  one = np.ones((1, 2), np.float32)
  scores = Scores(sft_logp=one, ref_logp=2 * one, sft_entropy=0.5 * one, mask=one)
  np.testing.assert_array_equal(apply_reward(confident, scores), -one)
  for name in needs(confident):
    with pytest.raises(ValueError, match=f"{name}, which was not computed"):
      apply_reward(confident, scores.replace(**{name: None}))


@pytest.mark.parametrize("dtype", [np.int32, np.float32, jnp.bfloat16])
def test_a_reward_is_float32_and_zero_outside_of_the_mask(rng, dtype):
  mask = (rng.random((4, 5)) < 0.6).astype(np.float32)
  logp = np.where(mask > 0, rng.integers(-3, 0, mask.shape), np.nan).astype(np.float32)
  got = apply_reward(
      lambda sft_logp: jnp.asarray(sft_logp).astype(dtype), Scores(sft_logp=logp, mask=mask)
  )
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, np.where(mask > 0, logp, 0.0))


def test_only_pointwise_rewards_have_an_exact_expectation():
  for reward in (BaselineRelative(), LogLikelihood(), Scaled()):
    check_pointwise(reward)
  for reward in (Endogenous(), Unsure(), confident):
    with pytest.raises(ValueError, match="no exact expectation"):
      check_pointwise(reward)


def test_every_reward_of_the_package_is_pointwise_where_it_says_so(rng):
  """A token's reward does not move with the scores of its neighbors."""
  draw = lambda: rng.normal(size=(3, 6)).astype(np.float32)
  names = set(Scores.__dataclass_fields__) - {"mask"}
  scores = Scores(mask=np.ones((3, 6), np.float32), **{name: draw() for name in names})
  moved = scores.replace(**{
      name: getattr(scores, name) + draw() * (np.arange(6) != 2) for name in names
  })
  found = kinds("dpr_jax.rewards")
  assert {"baseline_relative", "log_likelihood", "endogenous"} <= set(found)
  for kind, cls in found.items():
    before, after = (np.asarray(apply_reward(cls(), s))[:, 2] for s in (scores, moved))
    assert np.array_equal(before, after) == cls.pointwise, kind
