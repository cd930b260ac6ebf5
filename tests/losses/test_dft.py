"""DFT against loops, and its gradient against that of the probability itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.methods.dft import DFT
from dpr_jax.models import token_logprobs


def test_loss_equals_a_loop(bigram, make_rows, naive, rng):
  model, variables = bigram
  rows, (_, logp_of) = make_rows(left=bool(rng.integers(2))), naive
  loss_sum, weight, metrics = DFT().loss(model)(variables, rows, None)
  logps = [logp_of(variables, rows.tokens[b], t) for b, t in zip(*np.nonzero(rows.loss_mask))]
  assert float(weight) == len(logps) == float(metrics["tokens"])
  assert float(loss_sum) == pytest.approx(-sum(np.exp(l) * l for l in logps), rel=1e-5)
  total, count = metrics["nll"]
  assert float(total) == pytest.approx(-sum(logps), rel=1e-5) and float(count) == len(logps)


def test_the_weight_is_not_differentiated(bigram, make_rows, check_gradient):
  """- p grad(log p) = - grad(p): differences of the summed probability, not of the loss."""
  model, variables = bigram
  rows = make_rows()
  loss = lambda v: DFT().loss(model)(v, rows, None)[0]

  def minus_probability(v):
    logp = token_logprobs(model, v, rows.tokens, rows.segment_ids).logp
    return -jnp.sum(jnp.exp(logp) * rows.loss_mask)

  check_gradient(loss, minus_probability, variables)


def test_packing_and_padding_do_not_matter(bigram, make_rows, pack_rows, rng):
  model, variables = bigram
  rows = make_rows()
  loss = jax.jit(jax.value_and_grad(lambda v, b: DFT().loss(model)(v, b, None)[0]))
  noise = np.where(rows.segment_ids > 0, rows.tokens, rng.integers(0, 7, rows.tokens.shape))
  padded = rows.replace(tokens=noise.astype(np.int32))
  assert np.any(padded.tokens != rows.tokens)
  expected = loss(variables, rows)
  for other in (padded, pack_rows(rows)):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), loss(variables, other), expected
    )


def test_an_impossible_token_stays_finite(bigram, make_rows):
  """Probability 0 in float32: no loss and no gradient, where SFT has its largest."""
  model, variables = bigram
  params = {**variables["params"], "head": variables["params"]["head"] * 1e4}
  rows = make_rows()
  loss, grads = jax.jit(
      jax.value_and_grad(lambda v: DFT().loss(model)(v, rows, None)[0])
  )({"params": params})
  assert np.isfinite(loss) and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_micro_batches_add_up(bigram, make_rows, check_accumulation):
  model, variables = bigram
  check_accumulation(DFT().loss(model), variables, make_rows())


def test_runs_on_a_transformer(make_model, make_rows, budget_of, rng):
  model, variables = make_model(
      int(rng.integers(1 << 30)), vocab_size=7, num_layers=1, logits_budget=budget_of(4, 6, 7)
  )
  rows = make_rows()
  logp, loss_sum = jax.jit(lambda v, b: (
      token_logprobs(model, v, b.tokens, b.segment_ids).logp,
      DFT().loss(model)(v, b, jax.random.key(0))[0],
  ))(variables, rows)
  expected = -np.sum(np.exp(logp) * logp * rows.loss_mask)
  assert float(loss_sum) == pytest.approx(float(expected), rel=1e-5)
