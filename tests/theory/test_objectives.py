"""SFT is inverse soft-Q learning, and what a change of gauge does to the rewards."""

import numpy as np
import pytest

from dpr_jax.theory.mdp import log_softmax, logsumexp, per_token, sequence_logp
from dpr_jax.theory.objectives import (
    baseline_relative,
    endogenous,
    iq_learn,
    iq_learn_normalised,
    sft_loss,
    shape,
)


def _telescoped(mdp, q_SxA, demos_Y):
  """E_demo[ sum_t Q(s_t, a_t) - V(s_t) ]: the same number as `iq_learn`, state by state."""
  advantages_YxT = per_token(mdp, q_SxA - logsumexp(q_SxA)[:, None])
  return np.sum(demos_Y * np.sum(advantages_YxT, axis=1)) / mdp.num_prompts


def _demos(mdp, rng):
  """A random distribution over each prompt's responses."""
  demos_Y = rng.exponential(size=len(mdp.responses.lengths_Y))
  for p in range(mdp.num_prompts):
    own = mdp.responses.prompts_Y == p
    demos_Y[own] /= demos_Y[own].sum()
  return demos_Y


def _gradient(function, table, step=1e-6):
  """Central differences."""
  out = np.zeros_like(table)
  for at in np.ndindex(table.shape):
    delta = np.zeros_like(table)
    delta[at] = step
    out[at] = (function(table + delta) - function(table - delta)) / (2 * step)
  return out


def _iq_by_loops(mdp, q, demos_Y):
  """J(Q), read off the definition: one demonstration and one token at a time."""
  v = lambda state: np.log(np.sum(np.exp(q[mdp.index[state]])))
  total, r = 0.0, mdp.responses
  for p, y, n, weight in zip(r.prompts_Y, r.tokens_YxT, r.lengths_Y, demos_Y):
    p, y = int(p), tuple(int(a) for a in y[:n])
    for t in range(n):
      terminal = t == n - 1
      following = 0.0 if terminal else v((p, y[: t + 1]))
      total += weight / mdp.num_prompts * (q[mdp.index[p, y[:t]], y[t]] - following)
  return total - np.mean([v((p, ())) for p in range(mdp.num_prompts)])


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_sft_is_iq_learn_by_telescoping(make_instance, rng, scale):
  mdp = make_instance(3, 3, 4).mdp
  q, demos = mdp.random_logits(rng, scale), _demos(mdp, rng)
  j = iq_learn(mdp, q, demos)
  assert j == pytest.approx(_iq_by_loops(mdp, q, demos), abs=1e-12)
  assert j == pytest.approx(-sft_loss(mdp, q, demos), abs=1e-12)
  assert j == pytest.approx(_telescoped(mdp, q, demos), abs=1e-12)


def test_the_normalised_form_breaks_the_identity_at_gamma_1(make_instance, rng):
  mdp = make_instance(2, 3, 2).mdp
  q, demos = mdp.random_logits(rng), _demos(mdp, rng)
  start = np.mean(logsumexp(q)[: mdp.num_prompts])
  trap = lambda q: iq_learn_normalised(mdp, q, demos, gamma=1.0)
  # What is missing is V(s_0) itself ...
  assert trap(q) + sft_loss(mdp, q, demos) == pytest.approx(start, abs=1e-12)
  # ... so the objective grows without end while the policy stays what it is ...
  up = q.copy()
  up[: mdp.num_prompts] += 100.0
  np.testing.assert_allclose(log_softmax(up), log_softmax(q), atol=1e-12)
  assert trap(up) - trap(q) == pytest.approx(100.0, abs=1e-9)
  assert iq_learn(mdp, up, demos) == pytest.approx(iq_learn(mdp, q, demos), abs=1e-9)
  # ... and its gradient is not that of SFT, which the right form's is.
  sft = -_gradient(lambda q: sft_loss(mdp, q, demos), q)
  np.testing.assert_allclose(_gradient(lambda q: iq_learn(mdp, q, demos), q), sft, atol=1e-8)
  assert np.abs(_gradient(trap, q) - sft).max() > 0.1


def test_the_log_ratio_does_not_depend_on_the_gauge_but_the_endogenous_reward_does(
    make_instance, rng
):
  i = make_instance(2, 3, 4)
  mdp, c_S = i.mdp, rng.normal(size=i.mdp.num_states)
  moved = i.sft + c_S[:, None]
  np.testing.assert_allclose(
      baseline_relative(moved, i.ref), baseline_relative(i.sft, i.ref), atol=1e-12
  )
  np.testing.assert_allclose(
      baseline_relative(i.sft, i.ref + c_S[:, None]), baseline_relative(i.sft, i.ref), atol=1e-12
  )
  change_YxT = per_token(mdp, endogenous(mdp, moved) - endogenous(mdp, i.sft))
  assert np.abs(change_YxT).max() > 0.1
  # The change is potential shaping, so its sum over a response is c(s_0) alone.
  np.testing.assert_allclose(
      endogenous(mdp, moved), shape(mdp, endogenous(mdp, i.sft), -c_S), atol=1e-12
  )
  np.testing.assert_allclose(
      change_YxT.sum(axis=1), c_S[mdp.responses.prompts_Y], atol=1e-12
  )


def test_rewards_sum_to_the_log_ratio_and_to_the_log_likelihood(make_instance):
  i = make_instance(2, 3, 4)
  sft_Y, ref_Y = sequence_logp(i.mdp, i.sft), sequence_logp(i.mdp, i.ref)
  np.testing.assert_allclose(
      per_token(i.mdp, baseline_relative(i.sft, i.ref)).sum(axis=1), sft_Y - ref_Y, atol=1e-12
  )
  start_Y = logsumexp(i.sft)[i.mdp.responses.prompts_Y]
  np.testing.assert_allclose(
      per_token(i.mdp, endogenous(i.mdp, i.sft)).sum(axis=1), sft_Y + start_Y, atol=1e-12
  )
