"""Backward and forward recursions against sums over all responses."""

import numpy as np
import pytest

from dpr_jax.theory.mdp import by_prompt, per_token, sequence_logp
from dpr_jax.theory.objectives import baseline_relative
from dpr_jax.theory.values import (
    expected_length,
    expected_return,
    policy_values,
    sequence_kl,
    state_kl,
    total_variation,
    visits,
)


def test_values_equal_sums_over_all_continuations(make_instance, rng):
  i = make_instance(2, 3, 4)
  reward = rng.normal(size=i.policy.shape)
  value_S, q_SxA = policy_values(i.mdp, i.policy, reward, gamma=0.9)
  r = i.mdp.responses
  p_Y = np.exp(sequence_logp(i.mdp, i.policy))
  rewards_YxT = per_token(i.mdp, reward)
  for s in range(i.mdp.num_states):
    t = i.mdp.depth_S[s]
    through = r.states_YxT[:, t] == s
    g_Y = np.sum(rewards_YxT[:, t:] * 0.9 ** np.arange(i.mdp.max_length - t), axis=1)
    mean = lambda rows: np.sum(p_Y[rows] * g_Y[rows]) / np.sum(p_Y[rows])  # noqa: B023
    assert value_S[s] == pytest.approx(mean(through), abs=1e-10)
    for a in range(i.mdp.vocab_size):
      rows = through & (r.tokens_YxT[:, t] == a)
      assert q_SxA[s, a] == pytest.approx(mean(rows), abs=1e-10)


def test_returns_and_visits_equal_expectations_over_responses(make_instance, rng):
  i = make_instance(2, 3, 4)
  reward = rng.normal(size=i.policy.shape)
  p_Y = np.exp(sequence_logp(i.mdp, i.policy))
  expected = by_prompt(i.mdp, p_Y * np.sum(per_token(i.mdp, reward), axis=1))
  np.testing.assert_allclose(expected_return(i.mdp, i.policy, reward), expected, atol=1e-12)
  d_S = [np.sum(p_Y[np.any(i.mdp.responses.states_YxT == s, axis=1)])
         for s in range(i.mdp.num_states)]
  np.testing.assert_allclose(visits(i.mdp, i.policy), d_S, atol=1e-12)
  np.testing.assert_allclose(
      expected_length(i.mdp, i.policy), by_prompt(i.mdp, p_Y * i.mdp.responses.lengths_Y)
  )


def test_the_kl_of_responses_is_the_kl_of_states_at_the_visits(make_instance):
  i = make_instance(2, 3, 4)
  log_p, log_q = sequence_logp(i.mdp, i.policy), sequence_logp(i.mdp, i.sft)
  expected = by_prompt(i.mdp, np.exp(log_p) * (log_p - log_q))
  assert expected.min() > 1e-3
  np.testing.assert_allclose(sequence_kl(i.mdp, i.policy, i.sft), expected, atol=1e-12)
  np.testing.assert_allclose(sequence_kl(i.mdp, i.policy, i.policy + 3.0), 0.0, atol=1e-12)


def test_sft_expects_a_positive_reward_in_every_state(make_instance):
  """E_{a ~ pi_sft}[r | s] = KL(pi_sft || pi_ref)(s) >= 0: going on is always worth something."""
  i = make_instance(2, 4, 3)
  reward = baseline_relative(i.sft, i.ref)
  pi = np.exp(i.sft) / np.exp(i.sft).sum(axis=1, keepdims=True)
  kl_S = state_kl(i.sft, i.ref)
  np.testing.assert_allclose(np.sum(pi * reward, axis=1), kl_S, atol=1e-12)
  assert kl_S.min() > 0
  # Hence the return of pi_sft from any state is the KL of what it still writes.
  value_S, _ = policy_values(i.mdp, i.sft, reward)
  assert np.all(value_S >= kl_S - 1e-12)
  np.testing.assert_allclose(
      value_S[: i.mdp.num_prompts], sequence_kl(i.mdp, i.sft, i.ref), atol=1e-12
  )


def test_total_variation_is_the_largest_gap_of_an_event(make_instance):
  i = make_instance(1, 2, 3)
  p, q = (np.exp(sequence_logp(i.mdp, x)) for x in (i.policy, i.sft))
  events = np.array(np.meshgrid(*[[0, 1]] * len(p))).reshape(len(p), -1)
  assert total_variation(i.mdp, i.policy, i.sft)[0] == pytest.approx(
      np.abs((p - q) @ events).max(), abs=1e-12
  )
