"""A reference is one pytree: how its members combine, and the checkpoints it may be made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

from dpr_jax.config.sections import SFTSection
from dpr_jax.references import Reference, combine_logps
from dpr_jax.references.base import COMBINE


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


def test_of_one_member_nothing_changes(rng):
  logps = rng.normal(size=(1, 3, 4)).astype(np.float32)
  for how in COMBINE:
    np.testing.assert_array_equal(combine_logps(logps, how), logps[0])


@pytest.mark.parametrize("how", COMBINE)
def test_the_log_probs_of_a_reference_are_its_members_combined(rng, how):
  """Also where no probability is representable: a member that is sure of another token."""
  members = tuple({"params": rng.normal(-200.0, 100.0, (2, 3)).astype(np.float32)}
                  for _ in range(3))
  reference = Reference(members, how)
  got = jax.jit(lambda r: r.logps(lambda v: 2.0 * v["params"]))(reference)
  logps = 2.0 * np.stack([m["params"] for m in members]).astype(np.float64)
  top = logps.max(0)
  expected = logps.mean(0)
  if how == "logmeanexp":
    expected = top + np.log(np.exp(logps - top).mean(0))
  np.testing.assert_allclose(got, expected, atol=1e-3, rtol=0)  # 16 ulps at 1,000.


def test_the_members_are_the_leaves_and_the_rule_is_not():
  reference = Reference(({"params": np.ones(2)}, {"params": np.zeros(2)}), "mean_logp")
  doubled = jax.tree.map(lambda x: 2 * x, reference)
  assert isinstance(doubled, Reference) and doubled.combine == "mean_logp"
  np.testing.assert_array_equal(doubled.members[0]["params"], 2.0)
  assert len(jax.tree.leaves(reference)) == 2


def test_variables_are_a_reference_of_one_member():
  for variables in ({"params": np.ones(2)}, freeze({"params": np.ones(2)})):
    reference = Reference.of(variables)
    assert reference.members == (variables,)
    assert Reference.of(reference) is reference


def test_milestones_are_steps_of_the_run_and_the_end_is_kept():
  sft = lambda milestones, steps: SFTSection(milestones=milestones, steps=steps)
  assert sft((0.5, 0.25), 10).milestone_steps() == {0.25: 2, 0.5: 5, 1.0: 10}
  assert sft((), 7).milestone_steps() == {1.0: 7}
  assert sft((0.25, 0.5), 10).milestone_step(0.5) == 5
  assert sft((), 7).milestone_step(1.0) == 7


@pytest.mark.parametrize("fraction,steps", [(0.0, 10), (-0.5, 10), (1.5, 10), (0.01, 10)])
def test_fractions_outside_of_the_run_are_refused(fraction, steps):
  with pytest.raises(ValueError, match=f"^milestones: {fraction} of {steps} steps"):
    SFTSection(milestones=(fraction,), steps=steps)


def test_a_milestone_that_was_not_kept_is_refused():
  with pytest.raises(ValueError, match=r"^fraction=0.4 .*0.25.*sft.milestones"):
    SFTSection(milestones=(0.25,), steps=100).milestone_step(0.4)
