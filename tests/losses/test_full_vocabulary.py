"""The exact gradient of a random Transformer against all logits at once, and its bookkeeping."""

import copy
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.programs import largest_logits
from dpr_jax.data.batches import Shared
from dpr_jax.losses import full_vocabulary_batch, make_full_vocabulary_loss
from dpr_jax.losses.full_vocabulary import attach
from dpr_jax.models.lora import LoRA, split_trainable
from dpr_jax.references.base import Reference
from dpr_jax.rewards import Endogenous, LogLikelihood, transforms
from dpr_jax.rewards.baseline_relative import BASELINE_RELATIVE
from dpr_jax.training import TrainState, make_train_step

B, P, N = 4, 3, 8


@pytest.fixture
def sampled(bigram, make_model, rng):
  """sampled(combine=None, fields=None) -> (model, policy, sft, Reference, rollout with states).

  Of a bigram model, or with `fields` of a Transformer. The tokens are random. With `combine` the
  reference has two members. Logits of all columns fit at once.
  """

  def make(combine=None, fields=None):
    if fields is None:
      model, (vocab, width) = bigram[0], bigram[1]["params"]["table"].shape
      normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
      members = [{"params": {"table": normal(vocab, width), "head": normal(width, vocab)}}
                 for _ in range(4)]
      model.cfg = dataclasses.replace(model.cfg, logits_budget=1.0)
    else:
      made = [make_model(int(seed), vocab_size=11, num_layers=1, **fields)
              for seed in rng.integers(0, 1 << 30, 4)]
      model, members = made[0][0], [variables for _, variables in made]
      if "lora" in fields:  # One base, as in a run.
        members = [{**v, "params": members[0]["params"]} for v in members]
    members = jax.tree.map(jnp.asarray, members)
    tokens = rng.integers(0, model.cfg.vocab_size, (B, P + N)).astype(np.int32)
    prompts, lengths = np.array([3, 1, 0, 2]), np.array([8, 2, 0, 4])
    mask = (np.arange(N) < lengths[:, None]).astype(np.float32)
    segments = np.concatenate([np.arange(P) >= P - prompts[:, None], mask > 0], axis=1)
    segments = jnp.asarray(segments, jnp.int32)
    hidden = jax.jit(lambda v: model.apply(v, tokens, None, segments)[0])
    states = [hidden(v)[:, P - 1 : -1] for v in members]
    policy, sft, *refs = members
    logp = jax.nn.log_softmax(model.apply(policy, states[0], method="unembed"))
    ref = Reference(tuple(refs if combine else refs[:1]), combine or "logmeanexp")
    rollout = types.SimpleNamespace(
        tokens=jnp.asarray(tokens), segment_ids=segments, mask=jnp.asarray(mask),
        policy_logp=jnp.take_along_axis(logp, tokens[:, P:, None], axis=-1)[..., 0] * mask,
        states=tuple(states[1 : 2 + len(ref.members)]),
        hit_eos=jnp.array([True, False, False, True]),
    )
    return model, policy, sft, ref, rollout

  return make


def _chunked(model, columns, models):
  """The model, with a budget for so many columns of the logits of so many models."""
  model = copy.copy(model)
  budget = 3 * 4 * columns * models * B * model.cfg.vocab_size / 2**30
  object.__setattr__(model, "cfg", dataclasses.replace(model.cfg, logits_budget=budget))
  return model


def _naive(model, policy, sft, ref, rollout, mask, xp, *, reward=BASELINE_RELATIVE, low=-np.inf,
           high=np.inf, factor=1.0, beta, beta_ref=0.0, divergence="reverse_kl"):
  """(loss summed over the mask, KL to the target summed), from [B, N, V] and the definitions."""

  def log_p(variables):
    hidden, _ = model.apply(variables, rollout.tokens, None, rollout.segment_ids)
    logits = model.apply(variables, hidden, method="unembed")[:, P - 1 : -1]
    logits = np.asarray(logits, np.float64) if xp is np else logits
    return logits - xp.log(xp.sum(xp.exp(logits), axis=-1, keepdims=True))

  log_pi, log_sft, *refs = (log_p(v) for v in (policy, sft, *ref.members))
  log_ref = sum(refs) / len(refs)
  if ref.combine == "logmeanexp":
    log_ref = xp.log(sum(xp.exp(x) for x in refs) / len(refs))
  r = log_sft - log_ref if reward is BASELINE_RELATIVE else log_sft
  r = xp.clip(factor * r, low, high)
  p, b = xp.exp(log_pi), beta + beta_ref
  expect = lambda x: xp.sum(mask * xp.sum(x, axis=-1))
  kl = 0.0
  if isinstance(b, jax.Array) or b > 0:
    scores = (r + beta * log_sft + beta_ref * log_ref) / b
    tau = xp.exp(scores) / xp.sum(xp.exp(scores), axis=-1, keepdims=True)
    kl = expect(p * (log_pi - xp.log(tau)))
    if divergence == "forward_kl":
      return b * expect(tau * (xp.log(tau) - log_pi)), kl
  objective = p * (r - beta * (log_pi - log_sft) - beta_ref * (log_pi - log_ref))
  return -expect(objective), kl


CASES = {
    "plain": (dict(beta=0.7), None),
    "no_kl": (dict(beta=0.0), "logmeanexp"),
    "dual": (dict(beta=0.7, beta_ref=0.4), "mean_logp"),
    "forward": (dict(beta=0.5, divergence="forward_kl"), "logmeanexp"),
    "forward_dual": (dict(beta=0.0, beta_ref=0.6, divergence="forward_kl"), "mean_logp"),
    "log_likelihood": (dict(beta=0.3, reward=LogLikelihood()), None),
    "transformed": (dict(beta=1.0, factor=0.5, low=-0.4, high=0.3), None),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_those_of_all_logits_at_once(sampled, case):
  how, combine = CASES[case]
  model, policy, sft, ref, rollout = sampled(combine)
  mask = np.asarray(rollout.mask)
  expected, kl = _naive(model, policy, sft, ref, rollout, mask, np, **how)
  slope = jax.jit(jax.grad(
      lambda v: _naive(model, v, sft, ref, rollout, mask, jnp, **how)[0]
  ))(policy)
  scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(slope))
  assert scale > 1e-2
  named = {k: v for k, v in how.items() if k in ("reward", "beta_ref", "divergence")}
  if case == "transformed":
    named["transform"] = transforms.parse(("scale:0.5", "clip:-0.4:0.3"))
  batch, _ = full_vocabulary_batch(rollout, beta=how["beta"])
  batch = attach(batch, rollout, sft, ref)
  for columns in (N, 3):  # Of all models together; eight columns are then three chunks.
    has_target = how["beta"] + how.get("beta_ref", 0.0) > 0
    chunked = _chunked(model, columns, 2 + len(ref.members))
    loss = make_full_vocabulary_loss(chunked, has_target=has_target, **named)
    step = jax.jit(jax.value_and_grad(
        lambda v, loss=loss: (lambda s, w, m: (s, (w, m)))(*loss(v, batch, None)), has_aux=True
    ))
    (loss_sum, (weight, metrics)), grads = step(policy)
    assert float(loss_sum) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert float(weight) == mask.sum() == float(metrics["tokens"])
    assert ("kl_to_target" in metrics) == has_target
    if has_target:
      assert float(metrics["kl_to_target"][0]) == pytest.approx(kl, rel=1e-5, abs=1e-5)
    assert float(metrics["decode_gap"][0]) < 1e-4 * mask.sum()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), grads, slope)


def test_values_outside_of_the_mask_and_truncated_rollouts_do_not_count(sampled):
  model, policy, sft, ref, rollout = sampled()
  bad = jnp.where(rollout.mask[:, :, None] > 0, 0.0, jnp.nan)
  off = types.SimpleNamespace(**{**vars(rollout), "states": [x + bad for x in rollout.states]})
  loss = make_full_vocabulary_loss(model)
  sums = []
  for one, truncated in ((rollout, "keep"), (off, "keep"), (rollout, "mask")):
    batch, metrics = full_vocabulary_batch(one, beta=0.5, truncated=truncated)
    loss_sum, weight, _ = loss(policy, attach(batch, one, sft, ref), None)
    sums.append((float(loss_sum), float(weight), float(metrics["trained_share"])))
  mask = np.asarray(rollout.mask)
  assert sums[0] == sums[1] and sums[0][1:] == (mask.sum(), 1.0)
  ended = mask * np.array([1, 0, 0, 1])[:, None]
  expected, _ = _naive(model, policy, sft, ref, rollout, ended, np, beta=0.5)
  assert sums[2] == pytest.approx((expected, ended.sum(), ended.sum() / mask.sum()), rel=1e-5)
  for how, weight in (("sequences", 3), ("constant", 3 * N)):
    batch = attach(full_vocabulary_batch(rollout, beta=0.5)[0], rollout, sft, ref)
    _, found, _ = make_full_vocabulary_loss(model, loss_aggregation=how)(policy, batch, None)
    assert float(found) == weight


def _check_steps(sampled, *, parts, betas, fields=None):
  """Train steps of SGD move the variables by the gradient of all logits at once; one program."""
  model, policy, sft, ref, rollout = sampled(fields=fields)
  mask = np.asarray(rollout.mask)
  trainable, frozen = split_trainable(policy)

  def whole(trainable, beta):
    return _naive(model, {**frozen, **trainable}, sft, ref, rollout, mask, jnp, beta=beta)

  whole, optimizer = jax.jit(jax.value_and_grad(whole, has_aux=True)), optax.sgd(1.0)
  loss = make_full_vocabulary_loss(_chunked(model, 2, 3))
  step = make_train_step(loss, optimizer, accumulation=parts)
  for beta in betas:
    state = TrainState.create(
        jax.tree.map(jnp.array, trainable), optimizer, jax.random.key(0), frozen
    )
    batch = attach(full_vocabulary_batch(rollout, beta=beta)[0], rollout, sft, ref)
    state, metrics = step(state, batch)
    (expected, kl), slope = whole(trainable, jnp.float32(beta))
    assert float(metrics["loss"]) == pytest.approx(float(expected) / mask.sum(), rel=1e-5)
    assert float(metrics["kl_to_target"]) == pytest.approx(float(kl) / mask.sum(), rel=1e-5)
    scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(slope))
    assert scale > 1e-2
    jax.tree.map(
        lambda new, old, g, scale=scale: np.testing.assert_allclose(
            old - new, g / mask.sum(), atol=1e-5 * scale
        ), state.trainable, trainable, slope,
    )
  assert step.compilations() == 1
  jax.tree.map(lambda x: x.block_until_ready(), (sft, ref))  # Not donated.
  return state


@pytest.mark.parametrize("parts", [1, 2])
def test_micro_batches_share_the_models_and_one_program_serves_every_beta(sampled, parts):
  _check_steps(sampled, parts=parts, betas=(0.5, 2.0))


@pytest.mark.parametrize("fields", [{}, dict(lora=LoRA(rank=2))], ids=["full", "lora"])
def test_steps_of_a_transformer_and_of_adapters_over_one_base(sampled, fields):
  state = _check_steps(sampled, parts=2, betas=(0.5,), fields=fields)
  assert set(state.trainable) == {"lora" if fields else "params"}


def test_logits_of_one_chunk_live_at_a_time(sampled):
  """Neither the forward nor the backward pass keeps those of sft and ref."""
  model, policy, sft, ref, rollout = sampled()
  loss = make_full_vocabulary_loss(_chunked(model, 2, 3))
  batch = attach(full_vocabulary_batch(rollout, beta=0.5)[0], rollout, sft, ref)
  grad = jax.jit(jax.grad(lambda v, batch: loss(v, batch, None)[0]))
  text, params = grad.lower(policy, batch).compile().as_text(), policy["params"]
  elements, _ = largest_logits(text, *params["table"].shape)
  assert elements == B * 2 * len(params["table"])


def test_what_it_cannot_do_is_refused(make_model):
  model, _ = make_model(0, num_layers=1)
  for how, message in (
      (dict(reward=Endogenous()), "no exact expectation"),
      (dict(divergence="jensen"), "divergence='jensen' is not one of"),
      (dict(divergence="forward_kl", has_target=False), "needs a target"),
      (dict(loss_aggregation="rows"), "loss_aggregation='rows'"),
  ):
    with pytest.raises(ValueError, match=message):
      make_full_vocabulary_loss(model, **how)


def test_a_batch_with_something_shared_must_still_divide(rng):
  """What is shared has no rows: neither the first leaf of a batch nor the last need have them."""
  step = make_train_step(
      lambda v, b, rng: (jnp.sum(b["x"] * b["a"].value["w"] * v["w"]), jnp.float32(1), {}),
      optax.sgd(1.0), accumulation=3,
  )
  batch = {"a": Shared({"w": jnp.float32(2.0)}), "x": jnp.arange(6.0), "z": Shared(jnp.ones(5))}
  state = TrainState.create({"w": jnp.float32(0.0)}, optax.sgd(1.0), jax.random.key(0))
  moved, _ = step(state, batch)
  assert float(moved.trainable["w"]) == pytest.approx(-2 * 15 / 3)
  state = TrainState.create({"w": jnp.float32(0.0)}, optax.sgd(1.0), jax.random.key(0))
  with pytest.raises(ValueError, match="accumulation=3 does not divide the batch of 5 rows"):
    step(state, {**batch, "x": jnp.arange(5.0)})
