"""The exact gradient on tables: that of the theory, the expected sampled one, and its optimum."""

import jax
import numpy as np
import pytest

from dpr_jax.losses import make_full_vocabulary_loss, make_reinforce_loss
from dpr_jax.references.base import Reference, combine_logps
from dpr_jax.rewards import LogLikelihood
from dpr_jax.rewards.baseline_relative import BASELINE_RELATIVE
from dpr_jax.theory.exact import (
    TabularModel,
    ascend,
    enumerate_rollout,
    expected_batch,
    expected_full_batch,
)
from dpr_jax.theory.mdp import log_softmax
from dpr_jax.theory.optimum import contrastive
from dpr_jax.theory.values import state_kl, total_variation, visits


def _table(gradient):
  return np.asarray(gradient["params"]["table"])


def _exact(model, policy, sft, ref, reward=BASELINE_RELATIVE, *, beta, beta_ref, divergence):
  """(gradient [S, A] of the exact loss, the mean KL to its target)."""
  loss = make_full_vocabulary_loss(
      model, reward=reward, divergence=divergence, beta_ref=beta_ref, has_target=beta + beta_ref > 0
  )

  def total(policy):
    rollout = jax.lax.stop_gradient(enumerate_rollout(model, policy, sft, ref, reward))
    batch = expected_full_batch(rollout, model.mdp.num_prompts, sft, ref, beta=beta)
    loss_sum, _, metrics = loss(policy, batch, None)
    return loss_sum, metrics.get("kl_to_target")

  grads, kl = jax.jit(jax.grad(total, has_aux=True))(policy)
  return _table(grads), None if kl is None else float(kl[0] / kl[1])


def _sampled(model, policy, sft, ref, reward=BASELINE_RELATIVE, **kwargs):
  """The expected gradient [S, A] of REINFORCE with the return of each token."""
  loss = make_reinforce_loss(model)

  def total(policy):
    rollout = jax.lax.stop_gradient(enumerate_rollout(model, policy, sft, ref, reward))
    batch = expected_batch(rollout, model.mdp.num_prompts, returns="per_token", **kwargs)
    return loss(policy, batch, None)[0]

  return _table(jax.jit(jax.grad(total))(policy))


@pytest.mark.parametrize("reward", [BASELINE_RELATIVE, LogLikelihood()], ids=lambda r: r.kind)
@pytest.mark.parametrize("beta, beta_ref, combine", [
    (0.0, 0.0, "logmeanexp"), (0.7, 0.0, "mean_logp"), (0.7, 0.4, "logmeanexp"),
    (0.0, 0.6, "mean_logp"),
])
def test_it_is_the_expected_sampled_gradient(make_instance, beta, beta_ref, combine, reward):
  """In scale, too, with a reference of two members."""
  i = make_instance()
  model = TabularModel(i.mdp)
  policy, sft, first = (model.variables(x) for x in (i.policy, i.sft, i.ref))
  ref = Reference((first, model.variables(i.ref[::-1])), combine)
  how = dict(reward=reward, beta=beta, beta_ref=beta_ref)
  exact, _ = _exact(model, policy, sft, ref, divergence="reverse_kl", **how)
  assert np.abs(exact).max() > 1e-3
  np.testing.assert_allclose(exact, _sampled(model, policy, sft, ref, **how), atol=1e-6)
  log_ref = np.asarray(combine_logps(np.stack(
      [log_softmax(np.float32(x)) for x in (i.ref, i.ref[::-1])]), combine))
  # By the definition of J, in float64: its gradient is p (A - E A), of each state by its visits.
  log_pi, log_sft, p = log_softmax(i.policy), log_softmax(i.sft), np.exp(log_softmax(i.policy))
  r = log_sft - (log_ref if reward is BASELINE_RELATIVE else 0.0)
  advantage = r - beta * (log_pi - log_sft) - beta_ref * (log_pi - log_ref)
  mean = np.sum(p * advantage, axis=1, keepdims=True)
  weight = visits(i.mdp, i.policy)[:, None] / i.mdp.num_prompts
  np.testing.assert_allclose(exact, -weight * p * (advantage - mean), atol=1e-6)


def _target(i, beta, beta_ref):
  """The optimum of each state with a dual KL, log-probs [S, A]."""
  b = beta + beta_ref
  return log_softmax(
      ((1 + beta) * log_softmax(i.sft) + (beta_ref - 1) * log_softmax(i.ref)) / b
  )


@pytest.mark.parametrize("beta, beta_ref", [(0.7, 0.0), (0.5, 2.0)])
def test_gradients_of_both_divergences_are_those_of_the_kl_to_the_target(
    make_instance, beta, beta_ref
):
  i = make_instance()
  model = TabularModel(i.mdp)
  variables = [model.variables(x) for x in (i.policy, i.sft, i.ref)]
  log_tau, log_pi, b = _target(i, beta, beta_ref), log_softmax(i.policy), beta + beta_ref
  kl_S, visits_S = state_kl(log_pi, log_tau), visits(i.mdp, i.policy)
  by_state = {
      "reverse_kl": np.exp(log_pi) * (log_pi - log_tau - kl_S[:, None]),
      "forward_kl": np.exp(log_pi) - np.exp(log_tau),
  }
  for divergence, gradient in by_state.items():
    got, kl = _exact(model, *variables, beta=beta, beta_ref=beta_ref, divergence=divergence)
    expected = b * visits_S[:, None] * gradient / i.mdp.num_prompts
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert kl == pytest.approx(np.sum(visits_S * kl_S) / np.sum(visits_S), abs=1e-5)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("beta, beta_ref", [(0.25, 0.0), (0.5, 2.0)])
def test_it_converges_to_the_closed_form(make_instance, beta, beta_ref, divergence):
  i = make_instance()
  star = _target(i, beta, beta_ref)
  if not beta_ref:
    np.testing.assert_allclose(star, contrastive(i.sft, i.ref, beta), atol=1e-12)
  got, path = ascend(i.mdp, i.sft, i.ref, beta=beta, beta_ref=beta_ref, divergence=divergence)
  error, before = (float(total_variation(i.mdp, x, star).max()) for x in (got, path[0][1]))
  print(f"{divergence}, beta={beta}, {beta_ref}: total variation {before:.3f} -> {error:.1e}")
  assert error < 1e-3 and error < 0.1 * before
  assert state_kl(star, got)[visits(i.mdp, star) > 0.01].max() < 1e-3
