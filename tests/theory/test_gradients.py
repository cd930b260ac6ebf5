"""Estimators of the policy gradient and of the KL: exact means and variances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.theory.gradients import (
    KL_FORMS,
    full_return,
    kl_gradient,
    moments,
    reward_to_go,
    score_gradients,
)
from dpr_jax.theory.mdp import per_token, sequence_logp, token_logp
from dpr_jax.theory.objectives import baseline_relative
from dpr_jax.theory.values import expected_return, sequence_kl, state_kl, visits


def _differences(function, table, step=1e-5):
  """Central differences of a mean over prompts."""
  out = np.zeros_like(table)
  for at in np.ndindex(table.shape):
    delta = np.zeros_like(table)
    delta[at] = step
    out[at] = np.mean(function(table + delta) - function(table - delta)) / (2 * step)
  return out


def _moments(i, policy, weights_YxT):
  return moments(i.mdp, policy, score_gradients(i.mdp, policy, weights_YxT))


def test_reward_to_go_and_full_return_have_the_gradient_of_the_return(make_instance):
  i = make_instance(2, 3, 3)
  reward = baseline_relative(i.sft, i.ref)
  rewards_YxT = per_token(i.mdp, reward)
  exact = _differences(lambda x: expected_return(i.mdp, x, reward), i.policy)
  assert np.abs(exact).max() > 1e-2
  to_go, _ = _moments(i, i.policy, reward_to_go(rewards_YxT))
  full, _ = _moments(i, i.policy, full_return(rewards_YxT))
  np.testing.assert_allclose(to_go, full, atol=1e-12)
  np.testing.assert_allclose(to_go, exact, atol=1e-9)
  myopic, _ = _moments(i, i.policy, rewards_YxT)
  assert np.abs(myopic - exact).max() > 1e-3  # per-token returns: another objective.


def test_reward_to_go_varies_less_on_average(make_instance):
  """Not in every instance: past rewards may happen to cancel. On average over instances."""
  ratios = []
  for _ in range(30):
    i = make_instance(1, 3, 4)
    rewards_YxT = per_token(i.mdp, baseline_relative(i.sft, i.ref))
    to_go = _moments(i, i.sft, reward_to_go(rewards_YxT))[1]
    full = _moments(i, i.sft, full_return(rewards_YxT))[1]
    ratios.append(to_go / full)
  print(f"variance of reward-to-go / full return: mean {np.mean(ratios):.3f}, "
        f"{np.min(ratios):.3f} to {np.max(ratios):.3f}")
  assert np.mean(ratios) < 1.0


def test_moments_equal_those_of_a_sample(make_instance, rng):
  i = make_instance(2, 3, 3)
  grads = score_gradients(i.mdp, i.policy, rng.normal(size=i.mdp.responses.mask_YxT.shape))
  mean, variance = moments(i.mdp, i.policy, grads)
  p_Y = np.exp(sequence_logp(i.mdp, i.policy)) / i.mdp.num_prompts
  n = 40_000
  counts = rng.multinomial(n, p_Y / p_Y.sum())
  sample = np.tensordot(counts / n, grads, axes=1)
  # Six standard errors of the whole vector.
  assert np.sum(np.square(sample - mean)) < 36 * variance / n
  second = counts @ np.sum(np.square(grads - mean), axis=(1, 2)) / n
  assert second == pytest.approx(variance, rel=0.2)


def test_a_score_gradient_is_that_of_the_weighted_log_probs(make_instance, rng):
  i = make_instance(1, 3, 3)
  weights = rng.normal(size=i.mdp.responses.mask_YxT.shape)
  grads = score_gradients(i.mdp, i.policy, weights)
  for row in rng.integers(0, len(weights), 3):
    objective = lambda x, row=row: np.array([np.sum(weights[row] * token_logp(i.mdp, x)[row])])
    np.testing.assert_allclose(grads[row], _differences(objective, i.policy), atol=1e-8)


def _autodiff(i, form):
  """The gradient that automatic differentiation gives a KL loss on all weighted responses."""
  y = i.mdp.responses
  other = jax.nn.log_softmax(jnp.asarray(i.sft, jnp.float32))
  p_Y = jnp.asarray(np.exp(sequence_logp(i.mdp, i.policy)) / i.mdp.num_prompts, jnp.float32)
  states, on = np.where(y.mask_YxT > 0, y.states_YxT, 0), jnp.asarray(y.mask_YxT > 0)

  def loss(logits):
    log_pi = jax.nn.log_softmax(logits)
    gap = jnp.where(on, (log_pi - other)[states, y.tokens_YxT], 0.0)
    term = {
        "k1_loss": lambda: gap,
        "k2_loss": lambda: jnp.square(gap) / 2,
        "full_loss": lambda: jnp.where(
            on, jnp.sum(jnp.exp(log_pi) * (log_pi - other), axis=1)[states], 0.0
        ),
        "k1_reward": lambda: jnp.where(on, log_pi[states, y.tokens_YxT], 0.0)
        * jax.lax.stop_gradient(jnp.cumsum(gap[:, ::-1], axis=1)[:, ::-1]),
    }[form]()
    return jnp.sum(p_Y * jnp.sum(term, axis=1))  # p_Y: how the samples came, not differentiated.

  return jax.jit(jax.grad(loss))(jnp.asarray(i.policy, jnp.float32))


@pytest.mark.parametrize("form", KL_FORMS)
def test_the_expected_gradient_of_each_kl_is_that_of_autodiff(make_instance, form):
  i = make_instance(2, 3, 3)
  np.testing.assert_allclose(
      kl_gradient(i.mdp, i.policy, i.sft, form), _autodiff(i, form), atol=1e-6
  )


def test_only_k1_as_a_loss_has_no_gradient(make_instance):
  i = make_instance(2, 3, 3)
  grad = lambda form: kl_gradient(i.mdp, i.policy, i.sft, form)
  np.testing.assert_allclose(grad("k1_loss"), 0.0, atol=1e-12)
  # k2 and the whole vocabulary: the KL of each state, at the visits as they are.
  d_S = visits(i.mdp, i.policy)
  frozen = _differences(
      lambda x: np.sum(d_S * state_kl(x, i.sft)) / i.mdp.num_prompts, i.policy
  )
  assert np.abs(frozen).max() > 1e-2
  np.testing.assert_allclose(grad("k2_loss"), frozen, atol=1e-8)
  np.testing.assert_allclose(grad("full_loss"), frozen, atol=1e-8)
  # In the reward, with returns to go: the KL of whole responses.
  whole = _differences(lambda x: sequence_kl(i.mdp, x, i.sft), i.policy)
  np.testing.assert_allclose(grad("k1_reward"), whole, atol=1e-8)
  assert np.abs(whole - frozen).max() > 1e-3


def test_k2_of_whole_responses_has_the_gradient_of_their_kl(make_instance):
  """(log pi(y) - log other(y))^2 / 2 per response, not per token, sees the visits as well."""
  i = make_instance(2, 3, 3)
  gap_Y = sequence_logp(i.mdp, i.policy) - sequence_logp(i.mdp, i.sft)
  weights = np.broadcast_to(gap_Y[:, None], i.mdp.responses.mask_YxT.shape)
  got, _ = _moments(i, i.policy, weights)
  whole = _differences(lambda x: sequence_kl(i.mdp, x, i.sft), i.policy)
  np.testing.assert_allclose(got, whole, atol=1e-8)


def test_an_unknown_form_is_refused(make_instance):
  i = make_instance(1, 2, 2)
  with pytest.raises(ValueError, match="form='k3'"):
    kl_gradient(i.mdp, i.policy, i.sft, "k3")
