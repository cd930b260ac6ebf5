"""Pairs: frozen log-probs, fillers, and rows made from rollouts."""

import jax
import numpy as np
import pytest

from dpr_jax.data.batches import PromptBatch
from dpr_jax.losses import PairBatch, generated_rows, make_pair_batch
from dpr_jax.losses.pairs import log_ratios, pair_metrics, summed_logp
from dpr_jax.rollout import make_rollout_step
from dpr_jax.theory import TokenMDP
from dpr_jax.theory.exact import TabularModel


def _loop(logp_of, variables, rows):
  return [
      sum(logp_of(variables, rows.tokens[b], t) for t in np.flatnonzero(rows.loss_mask[b]))
      for b in range(len(rows.tokens))
  ]


def _batch(bigram, make_rows, rng):
  """Pairs under a frozen model other than the policy, and that model."""
  model, variables = bigram
  frozen = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape), variables)
  return make_pair_batch(model, frozen, make_rows(6, 9), make_rows(6, 8, left=True)), frozen


def test_log_probs_are_summed_over_trained_tokens(bigram, make_rows, naive, rng):
  model, variables = bigram
  batch, frozen = _batch(bigram, make_rows, rng)
  for rows, got in ((batch.demos, batch.demo_logp), (batch.generated, batch.generated_logp)):
    np.testing.assert_allclose(got, _loop(naive[1], frozen, rows), rtol=1e-5, atol=1e-5)
  demo_B, generated_B, on_B = log_ratios(model, variables, batch, None)
  for rows, got in ((batch.demos, demo_B), (batch.generated, generated_B)):
    expected = np.subtract(_loop(naive[1], variables, rows), _loop(naive[1], frozen, rows))
    np.testing.assert_allclose(got, expected, atol=2e-5)
  np.testing.assert_array_equal(on_B, 1.0)


def test_the_frozen_model_has_ratio_zero(bigram, make_rows, rng):
  model, _ = bigram
  batch, frozen = _batch(bigram, make_rows, rng)
  demo_B, generated_B, _ = log_ratios(model, frozen, batch, None)
  np.testing.assert_allclose(demo_B, 0.0, atol=1e-6)
  np.testing.assert_allclose(generated_B, 0.0, atol=1e-6)


def test_a_row_without_a_response_is_no_pair(bigram, make_rows, rng):
  model, variables = bigram
  batch, _ = _batch(bigram, make_rows, rng)
  mask = batch.generated.loss_mask.copy()
  mask[2] = 0.0
  frozen = np.array(batch.generated_logp)
  frozen[2] = np.nan
  batch = batch.replace(
      generated=batch.generated.replace(loss_mask=mask), generated_logp=frozen
  )
  demo_B, generated_B, on_B = log_ratios(model, variables, batch, None)
  assert on_B.tolist() == [1, 1, 0, 1, 1, 1] and demo_B[2] == generated_B[2] == 0
  assert np.all(np.isfinite(generated_B))


def test_no_gradient_reaches_the_frozen_model(bigram, make_rows, rng):
  model, variables = bigram
  demos, generated = make_rows(), make_rows()
  frozen_sum = lambda v: make_pair_batch(model, v, demos, generated).demo_logp.sum()
  for g in jax.tree.leaves(jax.grad(frozen_sum)(variables)):
    np.testing.assert_array_equal(g, 0.0)
  policy = lambda v: summed_logp(model, v, demos).sum()
  assert max(float(np.abs(g).max()) for g in jax.tree.leaves(jax.grad(policy)(variables))) > 1e-2


def test_metrics_are_sums_over_pairs():
  on = np.array([1, 1, 0, 1], np.float32)
  demo, generated = np.array([2, -1, 0, 3], np.float32), np.array([1, 1, 0, -4], np.float32)
  got = pair_metrics(demo, generated, on)
  assert got["pairs"] == 3
  assert got["demo_log_ratio"] == (4, 3) and got["generated_log_ratio"] == (-2, 3)
  assert got["pair_accuracy"] == (2, 3)


def test_pairs_of_rollouts(make_rows, rng):
  """Sampled responses become the generated side; their frozen log-probs are the policy's own."""
  mdp = TokenMDP(num_prompts=3, vocab_size=4, max_length=4, eos=1)
  model = TabularModel(mdp)
  policy, other = (model.variables(mdp.random_logits(rng)) for _ in range(2))
  prompts = PromptBatch(
      tokens=np.array([[4], [5], [6], [0], [4], [5]], np.int32),
      lengths=np.array([1, 1, 1, 0, 1, 1], np.int32),
  )
  step = make_rollout_step(model, max_new_tokens=4, stop_ids=(1,))
  rollout = step(policy, other, other, prompts, jax.random.key(int(rng.integers(1 << 30))))
  batch, (_, ratio_B, on_B) = jax.jit(lambda d, g: (
      made := make_pair_batch(model, policy, d, g), log_ratios(model, other, made, None)
  ))(make_rows(6, 7), generated_rows(rollout))
  np.testing.assert_allclose(
      batch.generated_logp, np.sum(rollout.policy_logp, axis=1), atol=1e-5
  )
  assert on_B.tolist() == [1, 1, 1, 0, 1, 1]  # a filler prompt makes no pair.
  expected = np.sum(rollout.sft_logp - rollout.policy_logp, axis=1) * np.asarray(on_B)
  np.testing.assert_allclose(ratio_B, expected, atol=1e-5)


def test_rows_that_make_no_pairs_are_refused(bigram, make_rows):
  with pytest.raises(ValueError, match="6 demonstrations and 5 generated"):
    make_pair_batch(*bigram, make_rows(6), make_rows(5))


def test_a_batch_is_a_pytree_of_rows(bigram, make_rows, rng):
  batch, _ = _batch(bigram, make_rows, rng)
  assert isinstance(batch, PairBatch)
  assert {x.shape[0] for x in jax.tree.leaves(batch)} == {6} and len(jax.tree.leaves(batch)) == 8
