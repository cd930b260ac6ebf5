"""The fused step: what it returns is what scoring the finished rows on their own gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.data.batches import PromptBatch
from dpr_jax.losses import make_reinforce_loss, reinforce_batch
from dpr_jax.models import token_logprobs
from dpr_jax.references import Reference
from dpr_jax.rewards import BaselineRelative, Endogenous, LogLikelihood
from dpr_jax.rollout import make_rollout_step
from dpr_jax.rollout.step import EXTRAS

N, P, EOS = 6, 4, 1
LENGTHS = np.array([4, 1, 0, 3, 2, 4], np.int32)


@pytest.fixture
def models(make_model, budget_of, rng):
  """(model, policy, sft, ref), three parameter sets over one model; chunks of 4 columns."""
  seeds = [int(s) for s in rng.integers(0, 1 << 30, 3)]
  how = dict(vocab_size=5, num_layers=1, logits_budget=budget_of(4, len(LENGTHS), 5))
  made = [make_model(s, **how) for s in seeds]
  return made[0][0], *(variables for _, variables in made)


def _prompts(rng):
  tokens = rng.integers(0, 5, (6, P)).astype(np.int32)
  return PromptBatch(tokens=np.where(np.arange(P) < LENGTHS[:, None], tokens, 0), lengths=LENGTHS)


def _key(rng):
  return jax.random.key(int(rng.integers(1 << 30)))


@pytest.mark.parametrize("how", [{}, dict(rescore=True), dict(extras=EXTRAS)],
                         ids=["decoded", "rescored", "extras"])
def test_a_rollout_is_consistent_with_scoring_its_rows(models, rng, how):
  model, policy, sft, ref = models
  step = make_rollout_step(model, max_new_tokens=N, stop_ids=(EOS,), **how)
  rollout = step(policy, sft, ref, _prompts(rng), _key(rng))
  lengths = np.asarray(rollout.lengths)
  mask = np.arange(N) < lengths[:, None]
  np.testing.assert_array_equal(rollout.mask, mask)
  np.testing.assert_array_equal(rollout.prompt_lengths, LENGTHS)
  np.testing.assert_array_equal(lengths == 0, LENGTHS == 0)
  np.testing.assert_array_equal(rollout.response_tokens, rollout.tokens[:, P:])

  logp = {}
  for name, variables in (("policy", policy), ("sft", sft), ("ref", ref)):
    out = token_logprobs(model, variables, rollout.tokens, rollout.segment_ids, with_entropy=True)
    logp[name] = np.where(mask, np.asarray(out.logp)[:, P:], 0.0)
    np.testing.assert_allclose(getattr(rollout, f"{name}_logp"), logp[name], atol=1e-4)
    entropy = np.where(mask, np.asarray(out.entropy)[:, P:], 0.0)
    if name == "policy":
      np.testing.assert_allclose(rollout.entropy, entropy, atol=1e-4)
    elif how.get("extras"):
      np.testing.assert_allclose(getattr(rollout, f"{name}_entropy"), entropy, atol=1e-4)
  for name in EXTRAS:
    assert (getattr(rollout, name) is not None) == ("extras" in how)
  if how.get("extras"):  # The states in which the tokens of the response are chosen.
    for states, variables in zip(rollout.states, (sft, ref), strict=True):
      hidden, _ = model.apply(variables, rollout.tokens, None, rollout.segment_ids)
      np.testing.assert_allclose(states, hidden[:, P - 1 : -1], atol=1e-4)
  # Token rewards sum to the log-ratio of the sequences.
  np.testing.assert_allclose(
      np.asarray(rollout.rewards).sum(1), (logp["sft"] - logp["ref"]).sum(1), atol=1e-5
  )
  assert np.abs(rollout.rewards).max() > 0.1
  np.testing.assert_array_equal(np.asarray(rollout.rewards)[~mask], 0.0)


@pytest.mark.parametrize("reward", [LogLikelihood(), Endogenous()], ids=lambda r: r.kind)
def test_other_rewards_of_the_package(models, rng, reward):
  model, policy, sft, ref = models
  step = make_rollout_step(model, max_new_tokens=N, stop_ids=(EOS,), reward=reward)
  rollout = step(policy, sft, ref, _prompts(rng), _key(rng))
  total = np.asarray(rollout.rewards).sum(1)
  expected = np.asarray(rollout.sft_logp).sum(1)
  if isinstance(reward, Endogenous):  # telescopes: V(s_0) comes on top.
    out = token_logprobs(model, sft, rollout.tokens, rollout.segment_ids, start=P)
    expected = expected + np.where(LENGTHS > 0, np.asarray(out.logsumexp)[:, 0], 0.0)
  np.testing.assert_allclose(total, expected, atol=2e-5)


def test_ref_equal_to_sft_gives_no_reward_and_no_gradient(models, rng):
  model, policy, sft, _ = models
  step = make_rollout_step(model, max_new_tokens=N, stop_ids=(EOS,))
  rollout = step(policy, sft, sft, _prompts(rng), _key(rng))
  np.testing.assert_array_equal(np.asarray(rollout.rewards), 0.0)
  loss = make_reinforce_loss(model)
  grad = jax.jit(jax.grad(lambda v, b: loss(v, b, None)[0]))
  batch, _ = reinforce_batch(rollout, beta=0.0)
  assert all(not np.any(g) for g in jax.tree.leaves(grad(policy, batch)))
  # With a KL the gradient is that of the KL alone, which is not zero.
  batch, _ = reinforce_batch(rollout, beta=1.0)
  assert max(np.abs(g).max() for g in jax.tree.leaves(grad(policy, batch))) > 1e-2


def test_the_same_key_gives_the_same_rollout_and_another_another(models, rng):
  model, policy, sft, ref = models
  step = make_rollout_step(model, max_new_tokens=N, stop_ids=(EOS,))
  prompts, key = _prompts(rng), _key(rng)
  first, again = (step(policy, sft, ref, prompts, key) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  other = step(policy, sft, ref, prompts, jax.random.fold_in(key, 1))
  assert not np.array_equal(first.tokens, other.tokens)


def test_without_end_tokens_it_is_refused(models):
  with pytest.raises(ValueError, match="stop_ids"):
    make_rollout_step(models[0], max_new_tokens=N, stop_ids=())


def _log_softmax(model, variables, rollout):
  hidden, _ = model.apply(variables, rollout.tokens, None, rollout.segment_ids)
  logits = np.asarray(model.apply(variables, hidden, method="unembed"), np.float64)[:, P - 1 : -1]
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("reward", [BaselineRelative(), LogLikelihood()], ids=lambda r: r.kind)
@pytest.mark.parametrize("combine", ["logmeanexp", "mean_logp"])
def test_expected_rewards_are_exact_sums_over_the_vocabulary(models, rng, reward, combine):
  """Of an ensemble of two references, and the reward itself too."""
  model, policy, sft, ref = models
  refs = (ref, jax.tree.map(lambda a, b: 0.3 * a + 0.7 * b, sft, ref))
  step = make_rollout_step(
      model, max_new_tokens=N, stop_ids=(EOS,), reward=reward, extras=("expected_rewards",)
  )
  rollout = step(policy, sft, Reference(refs, combine), _prompts(rng), _key(rng))
  log_policy, log_sft, first, second = (
      _log_softmax(model, v, rollout) for v in (policy, sft, *refs)
  )
  log_ref = (first + second) / 2
  if combine == "logmeanexp":
    log_ref = np.log((np.exp(first) + np.exp(second)) / 2)
  full = log_sft - (log_ref if isinstance(reward, BaselineRelative) else 0.0)
  mask = np.asarray(rollout.mask)
  expected = (np.exp(log_policy) * full).sum(-1) * mask
  np.testing.assert_allclose(rollout.expected_rewards, expected, atol=2e-5)
  taken = np.take_along_axis(full, np.asarray(rollout.response_tokens)[:, :, None], -1)[..., 0]
  np.testing.assert_allclose(rollout.rewards, taken * mask, atol=2e-5)


@pytest.mark.parametrize("rescore", [False, True], ids=["decoded", "rescored"])
def test_a_reward_of_ones_own_gets_every_score_it_names(models, rng, rescore):
  """None of them zeros, and nothing more is kept in the rollout than was asked for."""
  model, policy, sft, ref = models
  refs = (ref, jax.tree.map(lambda a, b: 0.3 * a + 0.7 * b, sft, ref))
  weights = dict(sft_logp=1.0, sft_logsumexp=-2.0, sft_entropy=3.0, ref_logp=-4.0, ref_entropy=5.0,
                 policy_logp=-6.0, mask=7.0)

  def mine(sft_logp, sft_logsumexp, sft_entropy, ref_logp, ref_entropy, policy_logp, mask):
    scores = dict(locals())
    return sum(weight * scores[name] for name, weight in weights.items())

  step = make_rollout_step(
      model, max_new_tokens=N, stop_ids=(EOS,), reward=mine, rescore=rescore
  )
  rollout = step(policy, sft, Reference(refs, "mean_logp"), _prompts(rng), _key(rng))
  assert rollout.sft_entropy is None and rollout.ref_entropy is None
  log_p = {"policy": policy, "sft": sft, "first": refs[0], "second": refs[1]}
  log_p = {name: _log_softmax(model, v, rollout) for name, v in log_p.items()}
  entropy = {name: -(np.exp(x) * x).sum(-1) for name, x in log_p.items()}
  taken = {name: np.take_along_axis(x, np.asarray(rollout.response_tokens)[:, :, None], -1)[..., 0]
           for name, x in log_p.items()}
  lse = token_logprobs(model, sft, rollout.tokens, rollout.segment_ids, start=P).logsumexp
  naive = dict(
      sft_logp=taken["sft"], sft_logsumexp=np.asarray(lse), sft_entropy=entropy["sft"],
      ref_logp=(taken["first"] + taken["second"]) / 2,
      ref_entropy=(entropy["first"] + entropy["second"]) / 2, policy_logp=taken["policy"], mask=1.0,
  )
  assert all(np.abs(x).max() > 0.1 for x in naive.values())
  expected = sum(weight * naive[name] for name, weight in weights.items())
  mask = np.asarray(rollout.mask)
  np.testing.assert_allclose(rollout.rewards, np.where(mask > 0, expected, 0.0), atol=2e-3)


def test_plain_variables_are_a_reference_of_one_member(models, rng):
  model, policy, sft, ref = models
  step = make_rollout_step(model, max_new_tokens=N, stop_ids=(EOS,), extras=EXTRAS)
  prompts, key = _prompts(rng), _key(rng)
  plain, wrapped = (step(policy, sft, r, prompts, key) for r in (ref, Reference.of(ref)))
  jax.tree.map(np.testing.assert_array_equal, plain, wrapped)


@pytest.mark.parametrize("how, message", [
    (dict(reward=lambda sft_logp, base_logp: sft_logp), "'base_logp', which is no score"),
    (dict(extras=("entropies",)), "extras: 'entropies' is not one of expected_rewards"),
    (dict(reward=Endogenous(), extras=("expected_rewards",)), "'endogenous' has no exact expect"),
    (dict(reward=lambda sft_logp: jnp.tanh(sft_logp), extras=("expected_rewards",)),
     "no exact expectation"),
])
def test_a_reward_that_cannot_be_computed_is_refused_before_any_rollout(models, how, message):
  with pytest.raises(ValueError, match=message):
    make_rollout_step(models[0], max_new_tokens=N, stop_ids=(EOS,), **how)


def test_samples_of_a_prompt_stand_in_adjacent_rows(models, rng):
  model, policy, sft, ref = models
  prompts, key = _prompts(rng), _key(rng)
  how = dict(max_new_tokens=N, stop_ids=(EOS,), samples_per_prompt=3)
  rollout = make_rollout_step(model, **how)(policy, sft, ref, prompts, key)
  np.testing.assert_array_equal(rollout.prompt_lengths, np.repeat(LENGTHS, 3))
  assert rollout.tokens.shape == (18, P + N)
  refilled = make_rollout_step(model, slots=4, **how)(policy, sft, ref, prompts, key)
  np.testing.assert_array_equal(rollout.tokens, refilled.tokens)
  np.testing.assert_allclose(rollout.rewards, refilled.rewards, atol=2e-5)
