"""REINFORCE against its analytic gradient, and by exact enumeration against the objective."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.losses import ReinforceBatch, make_reinforce_loss, reinforce_batch
from dpr_jax.models import token_logprobs
from dpr_jax.rewards import transforms
from dpr_jax.rollout import Rollout

# Numpy warns of the garbage that the tests put into the padding.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

BAD = np.array([np.nan, np.inf, -np.inf], np.float32)


def _rollout(rng, batch=6, p=3, n=4, vocab=5):
  prompts = rng.integers(1, p + 1, batch).astype(np.int32)
  lengths = rng.integers(1, n + 1, batch).astype(np.int32)
  prompts[1] = lengths[1] = 0  # a filler row.
  mask = (np.arange(n) < lengths[:, None]).astype(np.float32)
  segments = np.concatenate([np.arange(p) >= p - prompts[:, None], mask > 0], axis=1)
  garbage = lambda: np.where(
      mask > 0, rng.normal(size=mask.shape), rng.choice(BAD, mask.shape)
  ).astype(np.float32)
  return Rollout(
      tokens=rng.integers(0, vocab, (batch, p + n)).astype(np.int32),
      segment_ids=segments.astype(np.int32), prompt_lengths=prompts, lengths=lengths,
      hit_eos=(lengths > 0) & (rng.random(batch) < 0.5), mask=mask, rewards=garbage(),
      policy_logp=garbage(), sft_logp=garbage(), ref_logp=garbage(), entropy=garbage(),
      decode_steps=np.int32(n),
  )


def _assert_trees_close(a, b, rtol):
  scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(b))
  assert scale > 1e-3
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=rtol * scale), a, b)


def test_advantages_of_a_batch_equal_loops(rng):
  r = _rollout(rng)
  batch, metrics = jax.jit(lambda r: reinforce_batch(r, beta=0.3, gamma=0.9))(r)
  expected, shaped = np.zeros(r.mask.shape), 0.0
  for b, t in np.ndindex(r.mask.shape):
    if t < r.lengths[b]:
      tilde = [float(r.rewards[b, k] - 0.3 * (r.policy_logp[b, k] - r.sft_logp[b, k]))
               for k in range(t, r.lengths[b])]
      expected[b, t] = sum(0.9**k * x for k, x in enumerate(tilde))
      shaped += tilde[0]
  np.testing.assert_allclose(batch.advantages, expected, atol=1e-5)
  on = r.mask > 0
  assert float(metrics["shaped_reward"]) == pytest.approx(shaped / 5, abs=1e-5)
  assert float(metrics["advantage_mean"]) == pytest.approx(expected[on].mean(), abs=1e-5)
  assert float(metrics["advantage_std"]) == pytest.approx(expected[on].std(), abs=1e-5)


def test_transforms_come_before_the_kl(rng):
  r = _rollout(rng)
  clip = transforms.parse(["clip:0.1"])
  batch, _ = reinforce_batch(r, beta=2.0, returns="per_token", transform=clip)
  kl = r.policy_logp - r.sft_logp
  expected = np.where(r.mask > 0, np.clip(r.rewards, -0.1, 0.1) - 2.0 * kl, 0.0)
  np.testing.assert_allclose(batch.advantages, expected, atol=1e-5)


def test_the_external_score_comes_after_the_transforms_and_before_the_kl(rng):
  r = _rollout(rng)
  scores = rng.random(len(r.mask)).astype(np.float32)
  batch, _ = reinforce_batch(
      r, beta=2.0, returns="per_token", transform=transforms.parse(["clip:0.1"]),
      external=scores, external_weight=0.4,
  )
  last = np.arange(r.mask.shape[1]) == r.lengths[:, None] - 1
  rewards = 0.6 * np.clip(r.rewards, -0.1, 0.1) + 0.4 * last * scores[:, None]
  expected = np.where(r.mask > 0, rewards - 2.0 * (r.policy_logp - r.sft_logp), 0.0)
  np.testing.assert_allclose(batch.advantages, expected, atol=1e-5)


def test_a_rollout_without_an_external_score_is_masked_and_the_others_are_standardized(rng):
  r = _rollout(rng)  # Row 1 is a filler.
  scores = rng.normal(3, 5, 6).astype(np.float32)
  scores[[1, 4]] = np.nan
  batch, metrics = jax.jit(lambda r, x: reinforce_batch(
      r, beta=0.0, returns="full_return", external=x, external_weight=1.0,
      external_transform=transforms.parse(("zscore", "scale:2", "clip:2.5")),
  ))(r, scores)
  rows = [0, 2, 3, 5]
  expected = np.zeros(6)
  expected[rows] = np.clip(2 * (scores[rows] - scores[rows].mean()) / scores[rows].std(), -2.5, 2.5)
  on = np.where(np.isin(np.arange(6), rows)[:, None], r.mask, 0)
  np.testing.assert_array_equal(batch.mask, on)
  np.testing.assert_allclose(batch.advantages, expected[:, None] * on, atol=1e-5)
  assert float(metrics["trained_share"]) == pytest.approx(on.sum() / r.mask.sum())
  assert all(np.isfinite(x) for x in metrics.values())


def test_truncated_rollouts_are_kept_or_masked(rng):
  r = _rollout(rng)
  kept, _ = reinforce_batch(r, beta=1.0, truncated="keep")
  np.testing.assert_array_equal(kept.mask, r.mask)
  masked, _ = reinforce_batch(r, beta=1.0, truncated="mask", variance_baseline="position_mean")
  np.testing.assert_array_equal(masked.mask, r.mask * r.hit_eos[:, None])
  # A masked row does not even move the baseline of the others.
  only = jax.tree.map(lambda x: x[r.hit_eos], r.replace(decode_steps=None))
  alone, _ = reinforce_batch(only, beta=1.0, variance_baseline="position_mean")
  np.testing.assert_allclose(
      np.asarray(masked.advantages)[r.hit_eos], alone.advantages, atol=1e-5
  )
  with pytest.raises(ValueError, match="truncated='drop'"):
    reinforce_batch(r, beta=1.0, truncated="drop")


def test_gradient_equals_minus_the_sum_of_advantage_times_score(make_model, budget_of, rng):
  model, variables = make_model(
      int(rng.integers(1 << 30)), vocab_size=5, num_layers=1, logits_budget=budget_of(3, 6, 5)
  )
  batch, _ = reinforce_batch(_rollout(rng), beta=0.5)
  loss = make_reinforce_loss(model)
  grads = jax.jit(jax.grad(lambda v: loss(v, batch, None)[0]))(variables)
  scores = jax.jit(jax.jacrev(
      lambda v: token_logprobs(model, v, batch.tokens, batch.segment_ids, start=3).logp
  ))(variables)  # d logp[b, t] / d parameters.
  expected = jax.tree.map(
      lambda s: -np.tensordot(np.asarray(batch.advantages), np.asarray(s), axes=2), scores
  )
  _assert_trees_close(grads, expected, 1e-5)


def test_aggregations(make_model, rng):
  """They are weights beside the sum, which is the same for all."""
  model, variables = make_model(int(rng.integers(1 << 30)), vocab_size=5, num_layers=1)
  batch, _ = reinforce_batch(_rollout(rng), beta=0.5)
  tokens, sums = float(np.sum(batch.mask)), []
  for name, expected in (("tokens", tokens), ("sequences", 5.0), ("constant", 20.0)):
    loss_sum, weight, metrics = make_reinforce_loss(model, loss_aggregation=name)(
        variables, batch, None
    )
    assert float(weight) == expected and float(metrics["tokens"]) == tokens
    sums.append(float(loss_sum))
  assert len(set(sums)) == 1


def test_drift_and_gap_are_means_over_tokens(make_model, rng):
  model, variables = make_model(int(rng.integers(1 << 30)), vocab_size=5, num_layers=1)
  batch, _ = reinforce_batch(_rollout(rng), beta=0.5)
  out = token_logprobs(model, variables, batch.tokens, batch.segment_ids, start=3)
  off = rng.normal(size=batch.mask.shape)
  behaviour = np.where(batch.mask > 0, np.asarray(out.logp) - off, np.nan).astype(np.float32)
  metrics = make_reinforce_loss(model)(
      variables, batch.replace(behaviour_logp=behaviour), None
  )[2]
  on = np.asarray(batch.mask) > 0
  for name, expected in (("on_policy_drift", off[on]), ("decode_gap", np.abs(off[on]))):
    total, weight = metrics[name]
    assert float(total) / float(weight) == pytest.approx(expected.mean(), abs=1e-5)


def test_advantages_are_constants_for_the_gradient(make_model, rng):
  """Also when they were computed from the variables that are trained."""
  model, variables = make_model(int(rng.integers(1 << 30)), vocab_size=5, num_layers=1)
  r = _rollout(rng)
  loss = make_reinforce_loss(model)

  def through(v):
    logp = token_logprobs(model, v, r.tokens, r.segment_ids, start=3).logp
    batch, _ = reinforce_batch(r.replace(policy_logp=logp), beta=0.5)
    return loss(v, batch, None)[0]

  def apart(v):
    logp = token_logprobs(model, variables, r.tokens, r.segment_ids, start=3).logp
    batch, _ = reinforce_batch(r.replace(policy_logp=logp), beta=0.5)
    return loss(v, batch, None)[0]

  def injected(v):  # whoever builds the batch by hand is protected as well.
    logp = token_logprobs(model, v, r.tokens, r.segment_ids, start=3).logp
    batch, _ = reinforce_batch(r.replace(policy_logp=jax.lax.stop_gradient(logp)), beta=0.5)
    nothing = jnp.where(r.mask > 0, logp - jax.lax.stop_gradient(logp), 0.0)
    return loss(v, batch.replace(advantages=batch.advantages + nothing), None)[0]

  expected = jax.jit(jax.grad(apart))(variables)
  for other in (through, injected):
    _assert_trees_close(jax.jit(jax.grad(other))(variables), expected, 1e-6)


EOS, VOCAB, LENGTH = 0, 3, 3


def _all_responses():
  """Every response of at most 3 tokens over 3 ids: it ends at EOS or is cut."""
  done = [y for n in (1, 2) for y in itertools.product(range(VOCAB), repeat=n)
          if y[-1] == EOS and EOS not in y[:-1]]
  return done + [y for y in itertools.product(range(VOCAB), repeat=LENGTH) if EOS not in y[:-1]]


@pytest.fixture
def enumeration(make_model, rng):
  """(model, policy, exact rollout of all 15 responses to one prompt, log p(y) as a function)."""
  made = [make_model(int(s), vocab_size=VOCAB, num_layers=1) for s in rng.integers(0, 1 << 30, 3)]
  model, (policy, sft, ref) = made[0][0], (v for _, v in made)
  responses = _all_responses()
  assert len(responses) == 15
  lengths = np.array([len(y) for y in responses], np.int32)
  mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.float32)
  padded = [[2, 1, *y, *[0] * (LENGTH - len(y))] for y in responses]
  tokens = np.array(padded, np.int32)
  segments = np.concatenate([np.ones((15, 2)), mask], axis=1).astype(np.int32)
  logp = jax.jit(
      lambda v: token_logprobs(model, v, tokens, segments, start=2).logp * mask
  )
  scored = {name: logp(v) for name, v in (("policy", policy), ("sft", sft), ("ref", ref))}
  rollout = Rollout(
      tokens=tokens, segment_ids=segments, prompt_lengths=np.full(15, 2, np.int32),
      lengths=lengths, hit_eos=np.array([y[-1] == EOS for y in responses]), mask=mask,
      rewards=scored["sft"] - scored["ref"], policy_logp=scored["policy"],
      sft_logp=scored["sft"], ref_logp=scored["ref"], entropy=np.zeros_like(mask),
      decode_steps=np.int32(0),
  )
  return model, policy, rollout, logp


@pytest.fixture
def expected_gradient(enumeration):
  """(**keywords of reinforce_batch) -> E_{y ~ policy}[gradient of the loss of y], exactly."""
  model, policy, rollout, _ = enumeration
  p = jnp.exp(jnp.sum(rollout.policy_logp, axis=1, keepdims=True))
  assert float(p.sum()) == pytest.approx(1.0, abs=1e-5)
  grad = jax.jit(jax.grad(lambda v, batch: make_reinforce_loss(model)(v, batch, None)[0]))

  def expected(**kwargs):
    batch, _ = reinforce_batch(rollout, **kwargs)
    return grad(policy, batch.replace(advantages=batch.advantages * p))  # each row weighs p(y).

  return expected


def test_expected_gradient_is_that_of_the_objective(enumeration, expected_gradient):
  """- d/dtheta { E[sum r] - beta KL(pi || pi_sft) - beta_ref KL(pi || pi_ref) }.

  The KL included, though it is not differentiated; and with either return.
  """
  _, policy, rollout, logp = enumeration

  def objective(v, beta, beta_ref):
    log_p = jnp.sum(logp(v), axis=1)
    kl = beta * (log_p - jnp.sum(rollout.sft_logp, axis=1))
    kl += beta_ref * (log_p - jnp.sum(rollout.ref_logp, axis=1))
    return -jnp.sum(jnp.exp(log_p) * (jnp.sum(rollout.rewards, axis=1) - kl))

  exact = jax.jit(jax.grad(objective))
  for beta, beta_ref in ((0.0, 0.0), (0.7, 0.0), (0.4, 0.3)):
    for returns in ("reward_to_go", "full_return"):
      got = expected_gradient(beta=beta, beta_ref=beta_ref, returns=returns)
      _assert_trees_close(got, exact(policy, beta, beta_ref), 2e-5)


def test_per_token_returns_are_another_objective(expected_gradient):
  a = expected_gradient(beta=0.0, returns="reward_to_go")
  b = expected_gradient(beta=0.0, returns="per_token")
  scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(a))
  gap = max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
  assert gap > 0.01 * scale


def test_an_unknown_aggregation_is_refused():
  with pytest.raises(ValueError, match="loss_aggregation='mean'"):
    make_reinforce_loss(None, loss_aggregation="mean")


def test_a_batch_is_a_pytree_that_splits_into_rows(rng):
  batch, _ = reinforce_batch(_rollout(rng), beta=1.0)
  assert isinstance(batch, ReinforceBatch)
  assert {x.shape[0] for x in jax.tree.leaves(batch)} == {6}
