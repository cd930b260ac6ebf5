"""The product's rewards, loss and train step on a table converge to the closed-form optimum."""

import functools

import jax
import numpy as np
import optax
import pytest

from dpr_jax.data.batches import PromptBatch, SFTBatch
from dpr_jax.losses import make_reinforce_loss, make_sft_loss, reinforce_batch
from dpr_jax.models import token_logprobs
from dpr_jax.rewards import Endogenous
from dpr_jax.rewards.control import KLControl
from dpr_jax.rollout import make_rollout_step
from dpr_jax.theory.exact import TabularModel, ascend, enumerate_rollout, expected_batch
from dpr_jax.theory.gradients import moments, reward_to_go, score_gradients
from dpr_jax.theory.mdp import log_softmax, per_token, sequence_logp, token_logp
from dpr_jax.theory.objectives import baseline_relative, endogenous, sft_loss
from dpr_jax.theory.optimum import (
    as_policy,
    closed_form,
    contrastive,
    regularised_return,
    soft_optimum,
)
from dpr_jax.theory.values import state_kl, total_variation, visits
from dpr_jax.training import make_train_step
from dpr_jax.training.dpr_step import DPRStep

BETAS = [0.25, 0.5, 1.0, 2.0, 5.0]


def _optimum(i, beta, beta_ref=0.0):
  return as_policy(i.mdp, closed_form(i.mdp, i.sft, i.ref, beta, beta_ref))


@pytest.mark.parametrize("beta", BETAS)
def test_dpr_converges_to_the_closed_form(make_instance, beta):
  i = make_instance()
  star = _optimum(i, beta)
  got, path = ascend(i.mdp, i.sft, i.ref, beta=beta)
  tv = [float(total_variation(i.mdp, x, star).max()) for _, x in path]
  print(f"beta={beta}: total variation {tv[0]:.3f} -> {tv[-1]:.1e}")
  assert tv[-1] == total_variation(i.mdp, got, star).max() < 1e-3
  assert tv[-1] < 0.1 * tv[0]  # sft itself is not the answer.


@pytest.mark.parametrize("beta, beta_ref", [(0.5, 0.5), (0.0, 0.5), (0.5, 2.0)])
def test_dpr_with_a_dual_kl_converges_to_its_closed_form(make_instance, beta, beta_ref):
  i = make_instance()
  got, _ = ascend(i.mdp, i.sft, i.ref, beta=beta, beta_ref=beta_ref)
  error = total_variation(i.mdp, got, _optimum(i, beta, beta_ref)).max()
  assert error < 1e-3
  if beta:  # and not to that of the KL to sft alone.
    assert total_variation(i.mdp, got, _optimum(i, beta)).max() > 10 * error


def test_the_full_return_converges_to_the_same_optimum(make_instance):
  i = make_instance()
  got, _ = ascend(i.mdp, i.sft, i.ref, beta=0.5, returns="full_return")
  assert total_variation(i.mdp, got, _optimum(i, 0.5)).max() < 1e-3


def test_the_endogenous_reward_converges_to_its_own_optimum(make_instance):
  i = make_instance()
  got, _ = ascend(i.mdp, i.sft, i.ref, beta=1.0, reward=Endogenous())
  star, _ = soft_optimum(i.mdp, endogenous(i.mdp, i.sft), i.sft, 1.0)
  assert total_variation(i.mdp, got, star).max() < 1e-3


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_per_token_returns_converge_to_contrastive_decoding(make_instance, beta):
  i = make_instance(max_length=4)
  own, star = contrastive(i.sft, i.ref, beta), _optimum(i, beta)
  got, _ = ascend(i.mdp, i.sft, i.ref, beta=beta, returns="per_token")
  error, gap = (float(total_variation(i.mdp, got, x).max()) for x in (own, star))
  print(f"beta={beta}: total variation to contrastive decoding {error:.1e}, to DPR {gap:.3f}")
  assert error < 1e-3 and gap > 10 * error
  seen = visits(i.mdp, own) > 0.01  # it is the optimum of each state, so of each one by itself.
  assert state_kl(own, got)[seen].max() < 1e-3


def test_any_start_leads_to_the_same_optimum(make_instance):
  i = make_instance()
  got, _ = ascend(i.mdp, i.sft, i.ref, beta=1.0, start_SxA=i.policy)
  assert total_variation(i.mdp, got, _optimum(i, 1.0)).max() < 1e-3


def test_ref_equal_to_sft_is_a_fixed_point(make_instance):
  i = make_instance()
  got, _ = ascend(i.mdp, i.sft, i.sft, beta=0.5, steps=3)
  # Adam scales whatever gradient there is to the learning rate, so it must be exactly 0.
  np.testing.assert_array_equal(got, np.float32(i.sft))


def _gradient(i, **kwargs):
  model = TabularModel(i.mdp)
  policy, sft, ref = (model.variables(x) for x in (i.policy, i.sft, i.ref))
  make = jax.jit(
      lambda *v: expected_batch(enumerate_rollout(model, *v), i.mdp.num_prompts, **kwargs)
  )
  batch = make(policy, sft, ref)
  loss = lambda v: make_reinforce_loss(model)(v, batch, None)[0]
  return -np.asarray(jax.jit(jax.grad(loss))(policy)["params"]["table"])


@pytest.mark.parametrize("beta, beta_ref", [(0.0, 0.0), (0.7, 0.0), (0.7, 0.4)])
@pytest.mark.parametrize("returns", ["reward_to_go", "full_return"])
def test_the_expected_gradient_is_that_of_the_regularised_return(
    make_instance, beta, beta_ref, returns
):
  i = make_instance()
  reward, step = baseline_relative(i.sft, i.ref), 1e-5
  objective = lambda x: np.mean(
      regularised_return(i.mdp, x, reward, i.sft, beta, i.ref, beta_ref)
  )
  expected = np.zeros_like(i.policy)
  for at in np.ndindex(expected.shape):
    delta = np.zeros_like(expected)
    delta[at] = step
    expected[at] = (objective(i.policy + delta) - objective(i.policy - delta)) / (2 * step)
  got = _gradient(i, beta=beta, beta_ref=beta_ref, returns=returns)
  assert np.abs(expected).max() > 1e-3
  np.testing.assert_allclose(got, expected, atol=2e-6)


def test_the_adapter_scores_like_the_tables(make_instance):
  i = make_instance(2, 3, 4)
  model = TabularModel(i.mdp)
  rollout = jax.jit(lambda p, s, r: enumerate_rollout(model, p, s, r))(
      *(model.variables(x) for x in (i.policy, i.sft, i.ref))
  )
  for got, table in (
      (rollout.policy_logp, i.policy), (rollout.sft_logp, i.sft), (rollout.ref_logp, i.ref)
  ):
    np.testing.assert_allclose(got, token_logp(i.mdp, table), atol=1e-6)
  reward = per_token(i.mdp, baseline_relative(i.sft, i.ref))
  np.testing.assert_allclose(rollout.rewards, reward, atol=2e-6)
  log_pi = log_softmax(i.policy)
  entropy_S = -np.sum(np.exp(log_pi) * log_pi, axis=1)
  np.testing.assert_allclose(
      rollout.entropy, per_token(i.mdp, np.tile(entropy_S[:, None], (1, 3))), atol=1e-6
  )


def test_the_sft_loss_on_a_table_is_that_of_the_theory(make_instance, rng):
  i = make_instance(2, 3, 3)
  model, r = TabularModel(i.mdp), i.mdp.responses
  rows = rng.integers(0, len(r.lengths_Y), 5)
  tokens = np.concatenate([i.mdp.vocab_size + r.prompts_Y[:, None], r.tokens_YxT], axis=1)[rows]
  mask = np.concatenate([np.zeros((5, 1)), r.mask_YxT[rows]], axis=1).astype(np.float32)
  batch = SFTBatch(
      tokens=tokens.astype(np.int32), loss_mask=mask,
      segment_ids=np.maximum(mask, np.eye(1, mask.shape[1])).astype(np.int32),
  )
  loss_sum, weight, _ = make_sft_loss(model)(model.variables(i.sft), batch, None)
  counts = np.bincount(rows, minlength=len(r.lengths_Y))
  assert float(weight) == r.lengths_Y[rows].sum()
  assert float(loss_sum) == pytest.approx(
      sft_loss(i.mdp, i.sft, counts) * i.mdp.num_prompts, rel=1e-5
  )


def _rollouts(i, rows_a_prompt, policy, rng):
  model = TabularModel(i.mdp)
  step = make_rollout_step(model, max_new_tokens=i.mdp.max_length, stop_ids=(i.mdp.eos,))
  prompts = np.repeat(np.arange(i.mdp.num_prompts), rows_a_prompt)
  batch = PromptBatch(
      tokens=(i.mdp.vocab_size + prompts[:, None]).astype(np.int32),
      lengths=np.ones(len(prompts), np.int32),
  )
  variables = [model.variables(x) for x in (policy, i.sft, i.ref)]
  return step(*variables, batch, jax.random.key(int(rng.integers(1 << 30))))


def test_sampled_rollouts_have_the_exact_distribution_and_an_unbiased_gradient(make_instance, rng):
  """The sampler and the loss together, against enumeration, within their exact variance."""
  i = make_instance(2, 3, 3)
  n = 4000
  rollout = _rollouts(i, n, i.policy, rng)
  key = lambda prompt, y: (int(prompt), *(int(a) for a in y))
  r = i.mdp.responses
  row_of = {
      key(p, y[:length]): k for k, (p, y, length) in enumerate(zip(
          r.prompts_Y, r.tokens_YxT, r.lengths_Y
      ))
  }
  responses, lengths = np.asarray(rollout.response_tokens), np.asarray(rollout.lengths)
  prompts = np.asarray(rollout.tokens)[:, 0] - i.mdp.vocab_size
  rows = [row_of[key(p, y[:length])] for p, y, length in zip(prompts, responses, lengths)]
  np.testing.assert_array_equal(rollout.hit_eos, r.hit_eos_Y[rows])
  p_Y = np.exp(sequence_logp(i.mdp, i.policy))
  counts = np.bincount(rows, minlength=len(p_Y))
  # Each count is binomial: seven standard deviations, plus one for the rarest.
  assert np.all(np.abs(counts - n * p_Y) <= 7 * np.sqrt(n * p_Y * (1 - p_Y)) + 1)

  batch, _ = reinforce_batch(rollout, beta=0.5)
  model = TabularModel(i.mdp)
  loss = lambda v: make_reinforce_loss(model)(v, batch, None)[0] / len(rows)
  got = -np.asarray(jax.jit(jax.grad(loss))(model.variables(i.policy))["params"]["table"])
  shaped = baseline_relative(i.sft, i.ref) - 0.5 * (log_softmax(i.policy) - log_softmax(i.sft))
  mean, variance = moments(
      i.mdp, i.policy,
      score_gradients(i.mdp, i.policy, reward_to_go(per_token(i.mdp, shaped))),
  )
  assert np.sum(np.square(got - mean)) < 36 * variance / len(rows)
  assert np.sum(np.square(mean)) > 36 * variance / len(rows)  # else the line above says little.


def test_sampled_dpr_comes_near_the_optimum(make_instance, rng):
  """The whole step: sampler, rewards, leave-one-out advantages, loss, optimizer; with noise."""
  i = make_instance(2, 3, 3)
  model, star = TabularModel(i.mdp), _optimum(i, 0.5)
  steps = 300
  optimizer = optax.adam(optax.cosine_decay_schedule(0.1, steps))
  step = DPRStep(
      rollout_step=make_rollout_step(model, max_new_tokens=3, stop_ids=(i.mdp.eos,)),
      train_step=make_train_step(
          make_reinforce_loss(model, loss_aggregation="sequences"), optimizer
      ),
      make_batch=functools.partial(
          reinforce_batch, variance_baseline="leave_one_out", group_size=64
      ),
      control=KLControl(beta=0.5), sft=model.variables(i.sft), ref=model.variables(i.ref),
      rng=jax.random.key(int(rng.integers(1 << 30))),
  )
  state = step.init(model.variables(i.sft), jax.random.key(0))
  prompts = PromptBatch(
      tokens=np.repeat([[3], [4]], 64, axis=0).astype(np.int32), lengths=np.ones(128, np.int32)
  )
  for _ in range(steps):
    state, metrics = step(state, prompts)
  got = np.asarray(state.trainable["params"]["table"], np.float64)
  before, after = (total_variation(i.mdp, x, star).max() for x in (i.sft, got))
  print(f"total variation {before:.3f} -> {after:.3f}")
  assert after < 0.25 * before


def test_the_adapter_takes_padding_and_packed_rows(make_instance):
  i = make_instance(2, 3, 3)
  model = TabularModel(i.mdp)
  go = [a for a in range(3) if a != i.mdp.eos]
  one, two = [3, go[0], go[1], i.mdp.eos], [4, go[1], i.mdp.eos]
  logp = jax.jit(lambda t, s: token_logprobs(model, model.variables(i.sft), t, s).logp)
  score = lambda *x: np.asarray(logp(*(np.array(y, np.int32) for y in x)))
  alone = [score([x], [[1] * len(x)])[0] for x in (one, two)]
  packed = score([[*one, *two, 0]], [[1] * 4 + [2] * 3 + [0]])[0]
  np.testing.assert_array_equal(packed, np.concatenate([*alone, [0.0]]))
  left = score([[0, 0, *two]], [[0, 0, 1, 1, 1]])[0]
  np.testing.assert_array_equal(left, np.concatenate([[0.0, 0.0], alone[1]]))


def test_the_dual_kl_is_a_loop_over_tokens_and_ignores_padding(make_instance, rng):
  i = make_instance()
  model = TabularModel(i.mdp)
  rollout = jax.jit(lambda *v: enumerate_rollout(model, *v))(
      *(model.variables(x) for x in (i.policy, i.sft, i.ref))
  )
  on = np.asarray(rollout.mask) > 0
  dirty = rollout.replace(ref_logp=np.where(on, rollout.ref_logp, np.nan).astype(np.float32))
  batch, _ = jax.jit(
      lambda r, b: reinforce_batch(r, beta=0.5, beta_ref=b, returns="per_token")
  )(dirty, 0.3)
  r, pi, sft, ref = (
      np.asarray(x, np.float64)
      for x in (rollout.rewards, rollout.policy_logp, rollout.sft_logp, rollout.ref_logp)
  )
  expected = np.where(on, r - 0.5 * (pi - sft) - 0.3 * (pi - ref), 0.0)
  np.testing.assert_allclose(batch.advantages, expected, atol=1e-5)
  # Without beta_ref it is what it was, bit for bit.
  plain = [reinforce_batch(x, beta=0.5)[0].advantages for x in (dirty, rollout)]
  np.testing.assert_array_equal(*plain)
  np.testing.assert_array_equal(
      plain[0], reinforce_batch(rollout, beta=0.5, beta_ref=0.0)[0].advantages
  )
