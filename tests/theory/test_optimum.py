"""The optimum of DPR: recursion, closed form, invariance, and what a wrong reward costs."""

import numpy as np
import pytest

from dpr_jax.theory import TokenMDP
from dpr_jax.theory.mdp import by_prompt, log_softmax, per_token, sequence_logp
from dpr_jax.theory.objectives import baseline_relative, endogenous, shape
from dpr_jax.theory.optimum import (
    as_policy,
    closed_form,
    contrastive,
    regularised_return,
    reward_error_bounds,
    soft_optimum,
)
from dpr_jax.theory.values import (
    expected_length,
    expected_return,
    policy_values,
    sequence_kl,
    state_kl,
    total_variation,
    visits,
)

BETAS = [(0.25, 0.0), (1.0, 0.0), (5.0, 0.0), (0.5, 0.5), (0.3, 1.7), (0.0, 2.0), (2.0, 1.0)]


@pytest.mark.parametrize("beta_sft, beta_ref", BETAS)
def test_soft_dynamic_programming_equals_the_closed_form(make_instance, beta_sft, beta_ref):
  i = make_instance(2, 3, 4)
  reward = baseline_relative(i.sft, i.ref)
  log_pi, value_S = soft_optimum(i.mdp, reward, i.sft, beta_sft, i.ref, beta_ref)
  closed_Y = closed_form(i.mdp, i.sft, i.ref, beta_sft, beta_ref)
  np.testing.assert_allclose(np.exp(sequence_logp(i.mdp, log_pi)), np.exp(closed_Y), atol=1e-10)
  np.testing.assert_allclose(sequence_logp(i.mdp, log_pi), closed_Y, atol=1e-10)
  np.testing.assert_allclose(log_pi, as_policy(i.mdp, closed_Y), atol=1e-10)
  # The written formula, with nothing shared: weights, and one sum a prompt.
  p, q = (np.exp(sequence_logp(i.mdp, x)) for x in (i.sft, i.ref))
  b = beta_sft + beta_ref
  w = p ** ((1 + beta_sft) / b) * q ** ((beta_ref - 1) / b)
  np.testing.assert_allclose(
      np.exp(closed_Y), w / by_prompt(i.mdp, w)[i.mdp.responses.prompts_Y], atol=1e-12
  )
  # V*(s_0) is the objective at the optimum.
  at = regularised_return(i.mdp, log_pi, reward, i.sft, beta_sft, i.ref, beta_ref)
  np.testing.assert_allclose(value_S[: i.mdp.num_prompts], at, atol=1e-10)


@pytest.mark.parametrize("beta_sft, beta_ref", BETAS)
def test_what_any_policy_loses_is_its_kl_to_the_optimum(make_instance, rng, beta_sft, beta_ref):
  """J(pi*) - J(pi) = (beta_sft + beta_ref) KL(pi || pi*), for any reward: so pi* is the optimum."""
  i = make_instance(2, 3, 3)
  reward = rng.normal(size=i.sft.shape)
  args = (reward, i.sft, beta_sft, i.ref, beta_ref)
  log_pi, _ = soft_optimum(i.mdp, *args)
  for other in (i.policy, i.sft, log_pi + 0.1 * rng.normal(size=log_pi.shape)):
    loss = regularised_return(i.mdp, log_pi, *args) - regularised_return(i.mdp, other, *args)
    np.testing.assert_allclose(
        loss, (beta_sft + beta_ref) * sequence_kl(i.mdp, other, log_pi), atol=1e-10
    )
    assert loss.min() > 0


def test_shaping_moves_no_optimum_but_does_move_the_myopic_one(make_instance, rng):
  i = make_instance(2, 3, 4)
  reward = baseline_relative(i.sft, i.ref)
  shaped = shape(i.mdp, reward, rng.normal(size=i.mdp.num_states))
  assert np.abs(shaped - reward).max() > 0.1
  a, b = (soft_optimum(i.mdp, r, i.sft, 0.7)[0] for r in (reward, shaped))
  np.testing.assert_allclose(a, b, atol=1e-10)
  # One step ahead it does: softmax(log pi_sft + r / beta).
  myopic = lambda r: log_softmax(log_softmax(i.sft) + r / 0.7)
  np.testing.assert_allclose(myopic(reward), contrastive(i.sft, i.ref, 0.7), atol=1e-12)
  assert total_variation(i.mdp, myopic(reward), myopic(shaped)).min() > 1e-3


def test_the_endogenous_reward_has_the_optimum_of_the_log_likelihood(make_instance):
  """It is log pi_sft up to shaping: the optimum is pi_sft^(1 + 1 / beta), over responses."""
  i = make_instance(2, 3, 4)
  a = soft_optimum(i.mdp, endogenous(i.mdp, i.sft), i.sft, 0.5)[0]
  b = soft_optimum(i.mdp, log_softmax(i.sft), i.sft, 0.5)[0]
  np.testing.assert_allclose(a, b, atol=1e-10)
  uniform = closed_form(i.mdp, i.sft, i.sft, 0.5)
  sharp = 3.0 * sequence_logp(i.mdp, i.sft)
  gap_Y = sequence_logp(i.mdp, a) - sharp
  for p in range(i.mdp.num_prompts):
    assert np.ptp(gap_Y[i.mdp.responses.prompts_Y == p]) < 1e-10  # the normaliser alone.
  np.testing.assert_allclose(uniform, sequence_logp(i.mdp, i.sft), atol=1e-10)


def test_the_limits_of_beta(make_instance):
  i = make_instance(2, 3, 3)
  far = as_policy(i.mdp, closed_form(i.mdp, i.sft, i.ref, 1e7))
  assert total_variation(i.mdp, far, i.sft).max() < 1e-5  # beta -> infinity is SFT.
  ratio_Y = sequence_logp(i.mdp, i.sft) - sequence_logp(i.mdp, i.ref)
  near_Y = closed_form(i.mdp, i.sft, i.ref, 1e-4)
  for p in range(i.mdp.num_prompts):  # beta -> 0 is the response with the largest ratio.
    own = np.flatnonzero(i.mdp.responses.prompts_Y == p)
    assert own[np.argmax(near_Y[own])] == own[np.argmax(ratio_Y[own])]
  # A KL to ref of weight 1 cancels the pull away from ref: pi_sft itself, whatever beta_sft.
  np.testing.assert_allclose(
      closed_form(i.mdp, i.sft, i.ref, 0.8, 1.0), sequence_logp(i.mdp, i.sft), atol=1e-10
  )


def test_contrastive_decoding_maximises_each_state_alone(make_instance, rng):
  i = make_instance(1, 4, 2)
  beta, reward = 0.6, baseline_relative(i.sft, i.ref)

  def objective(logits):  # [S]
    pi = np.exp(log_softmax(logits))
    return np.sum(pi * reward, axis=1) - beta * state_kl(logits, i.sft)

  best = contrastive(i.sft, i.ref, beta)
  np.testing.assert_allclose(
      best, log_softmax((1 + 1 / beta) * i.sft - i.ref / beta), atol=1e-12
  )
  for _ in range(20):
    other = best + rng.normal(size=best.shape)
    gap = objective(best) - objective(other)
    np.testing.assert_allclose(gap, beta * state_kl(other, best), atol=1e-10)
  # It is the optimum of DPR where nothing follows, and not elsewhere.
  star, _ = soft_optimum(i.mdp, reward, i.sft, beta)
  last = i.mdp.depth_S == i.mdp.max_length - 1
  np.testing.assert_allclose(best[last], star[last], atol=1e-10)
  assert np.abs(best[~last] - star[~last]).max() > 1e-3


def _loss(mdp, reward, wrong, sft, beta):
  """What the optimum of `wrong` loses under `reward`, and both optima."""
  star, perturbed = (soft_optimum(mdp, r, sft, beta)[0] for r in (reward, wrong))
  value = lambda pi: regularised_return(mdp, pi, reward, sft, beta)
  return value(star) - value(perturbed), star, perturbed


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("epsilon", [0.01, 0.3])
def test_a_reward_error_bounds_the_error_of_values_and_policies(make_instance, rng, beta, epsilon):
  for kind in ("signs", "uniform"):
    i = make_instance(2, 3, 4)
    reward = baseline_relative(i.sft, i.ref)
    noise = rng.uniform(-1, 1, reward.shape)
    wrong = reward + epsilon * (np.sign(noise) if kind == "signs" else noise)
    bounds = reward_error_bounds(i.mdp, epsilon, beta)
    slack = 1e-9

    gap = np.abs(expected_return(i.mdp, i.policy, wrong) - expected_return(i.mdp, i.policy, reward))
    assert np.all(gap <= epsilon * expected_length(i.mdp, i.policy) + slack)
    assert np.all(epsilon * expected_length(i.mdp, i.policy) <= bounds["evaluation"] + slack)
    values = [soft_optimum(i.mdp, r, i.sft, beta)[1] for r in (reward, wrong)]
    left_S = i.mdp.max_length - i.mdp.depth_S
    assert np.all(np.abs(values[0] - values[1]) <= epsilon * left_S + slack)
    assert bounds["soft_value"] == pytest.approx(epsilon * left_S.max())

    loss, star, perturbed = _loss(i.mdp, reward, wrong, i.sft, beta)
    assert np.all(loss >= -slack) and np.all(loss <= bounds["suboptimality"] + slack)
    ratio_Y = sequence_logp(i.mdp, perturbed) - sequence_logp(i.mdp, star)
    assert np.abs(ratio_Y).max() <= bounds["log_ratio"] + slack


def test_the_simulation_lemma_is_an_equality_for_a_constant_error(make_instance):
  i = make_instance(2, 3, 4)
  reward = baseline_relative(i.sft, i.ref)
  gap = expected_return(i.mdp, i.policy, reward + 0.2) - expected_return(i.mdp, i.policy, reward)
  np.testing.assert_allclose(gap, 0.2 * expected_length(i.mdp, i.policy), atol=1e-12)
  # And in general the visits to each state times its mean error.
  error = np.random.default_rng(0).normal(size=reward.shape)
  pi = np.exp(log_softmax(i.policy))
  gap = expected_return(i.mdp, i.policy, reward + error) - expected_return(i.mdp, i.policy, reward)
  mean_S = np.sum(pi * error, axis=1)
  np.testing.assert_allclose(
      gap, by_prompt(i.mdp, visits(i.mdp, i.policy) * mean_S), atol=1e-12
  )


def test_the_linear_bound_is_nearly_reached():
  """Two tokens that never end: the error of epsilon on each turns a gap of 2 epsilon around."""
  mdp, epsilon, tiny = TokenMDP(1, 3, 5, eos=0), 0.25, 1e-3
  sft = np.zeros((mdp.num_states, 3))
  reward = np.zeros_like(sft)
  reward[:, 0] = -100.0  # EOS is never worth it.
  reward[:, 1] = 2 * epsilon - tiny
  wrong = reward.copy()
  wrong[:, 1] -= epsilon
  wrong[:, 2] += epsilon
  loss, *_ = _loss(mdp, reward, wrong, sft, beta=1e-5)
  bound = reward_error_bounds(mdp, epsilon)["suboptimality"]
  assert bound == 2 * 5 * epsilon
  assert 0.99 * bound < loss[0] <= bound


def test_the_quadratic_bound_is_nearly_reached():
  """The same error twisted against a strong KL: Hoeffding's constant 1 / 2 is the right one."""
  mdp, epsilon, beta = TokenMDP(1, 3, 1, eos=0), 0.01, 1.0
  sft = np.array([[-40.0, 0.0, 0.0]])  # two equal tokens, EOS negligible.
  wrong = np.array([[0.0, epsilon, -epsilon]])
  loss, *_ = _loss(mdp, np.zeros_like(sft), wrong, sft, beta)
  bound = reward_error_bounds(mdp, epsilon, beta)["suboptimality"]
  assert bound == pytest.approx(epsilon**2 / 2)
  assert 0.99 * bound < loss[0] <= bound


def test_the_values_under_a_fixed_policy_contract_like_the_reward(make_instance, rng):
  """|Q' - Q|(s, a) <= (T - depth(s)) epsilon at gamma = 1, and less with a discount."""
  i = make_instance(1, 3, 4)
  reward = rng.normal(size=i.sft.shape)
  error = rng.uniform(-0.1, 0.1, reward.shape)
  for gamma in (1.0, 0.5):
    q = [policy_values(i.mdp, i.policy, r, gamma)[1] for r in (reward, reward + error)]
    left_S = [sum(gamma**k for k in range(i.mdp.max_length - d)) for d in i.mdp.depth_S]
    assert np.all(np.abs(q[0] - q[1]) <= 0.1 * np.array(left_S)[:, None] + 1e-12)


def test_as_policy_inverts_sequence_logp(make_instance):
  i = make_instance(2, 3, 4)
  back = as_policy(i.mdp, sequence_logp(i.mdp, i.policy))
  np.testing.assert_allclose(back, log_softmax(i.policy), atol=1e-10)
  assert per_token(i.mdp, back).min() < 0


@pytest.mark.parametrize("beta_sft, beta_ref", [(0.0, 0.0), (-1.0, 2.0), (1.0, -0.5)])
def test_impossible_weights_are_refused(make_instance, beta_sft, beta_ref):
  i = make_instance(1, 2, 2)
  with pytest.raises(ValueError, match=f"beta_sft={beta_sft}"):
    closed_form(i.mdp, i.sft, i.ref, beta_sft, beta_ref)
  with pytest.raises(ValueError, match=f"beta_sft={beta_sft}"):
    soft_optimum(i.mdp, i.sft, i.sft, beta_sft, i.ref, beta_ref)


def test_a_kl_to_no_reference_is_refused(make_instance):
  i = make_instance(1, 2, 2)
  with pytest.raises(ValueError, match="ref_SxA"):
    soft_optimum(i.mdp, i.sft, i.sft, 1.0, None, 0.5)
