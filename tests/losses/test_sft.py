"""The SFT loss is the mean negative log-likelihood of the trained tokens, packed or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.data.batches import SFTBatch
from dpr_jax.losses import make_sft_loss

LENGTHS, TRAINED = (5, 7, 3), (2, 4, 1)  # tokens of a demonstration, and of its response.


def _demos(rng):
  return [rng.integers(0, 29, n).astype(np.int32) for n in LENGTHS]


def _separate(demos, width=16):
  tokens, segments = np.zeros((2, 3, width), np.int32)
  mask = np.zeros((3, width), np.float32)
  for b, (demo, trained) in enumerate(zip(demos, TRAINED)):
    n = len(demo)
    tokens[b, :n], segments[b, :n], mask[b, n - trained : n] = demo, 1, 1.0
  return SFTBatch(tokens=tokens, segment_ids=segments, loss_mask=mask)


def _packed(demos, width=16):
  one = _separate(demos, width)
  take = lambda x, scale=(1, 1, 1): np.concatenate(
      [s * row[:n] for row, n, s in zip(x, LENGTHS, scale)]
      + [np.zeros(width - sum(LENGTHS), x.dtype)]
  )[None]
  return SFTBatch(
      tokens=take(one.tokens), segment_ids=take(one.segment_ids, (1, 2, 3)),
      loss_mask=take(one.loss_mask),
  )


@pytest.fixture
def model(make_model, budget_of, rng):
  """Logits of a packed row are computed in chunks of 5 columns, those of three rows one by one."""
  return make_model(int(rng.integers(1 << 30)), logits_budget=budget_of(5, 1, 29))


def test_loss_equals_a_naive_mean_nll(model, rng):
  model, variables = model
  demos = _demos(rng)
  logits = jax.jit(
      lambda v, t: model.apply(v, model.apply(v, t)[0], method="unembed")
  )
  nll = []
  for demo, trained in zip(demos, TRAINED):
    row = np.asarray(logits(variables, np.resize(demo, (1, 16)).astype(np.int32))[0], np.float64)
    for t in range(len(demo) - trained, len(demo)):  # the state before token t chooses it.
      nll.append(np.log(np.exp(row[t - 1]).sum()) - row[t - 1, demo[t]])
  for batch in (_separate(demos), _packed(demos)):
    loss_sum, weight, metrics = make_sft_loss(model)(variables, batch, None)
    assert float(weight) == len(nll) == float(metrics["tokens"])
    assert float(loss_sum) / float(weight) == pytest.approx(np.mean(nll), abs=2e-5)


def test_packing_changes_neither_loss_nor_gradient(model, rng):
  model, variables = model
  demos = _demos(rng)
  loss = jax.jit(jax.value_and_grad(lambda v, b: make_sft_loss(model)(v, b, None)[0]))
  (a, a_grads), (b, b_grads) = loss(variables, _separate(demos)), loss(variables, _packed(demos))
  assert float(a) == pytest.approx(float(b), rel=1e-5)
  scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(a_grads))
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * scale), a_grads, b_grads
  )


def test_tokens_in_the_padding_do_not_matter(model, rng):
  model, variables = model
  loss = jax.jit(lambda v, b: make_sft_loss(model)(v, b, None)[0])
  batch = _packed(_demos(rng), width=20)
  noise = rng.integers(0, 29, batch.tokens.shape).astype(np.int32)
  other = batch.replace(tokens=np.where(batch.segment_ids == 0, noise, batch.tokens))
  assert float(loss(variables, batch)) == float(loss(variables, other))


def test_the_gradient_of_logits_is_softmax_minus_one_hot(model, rng):
  """dL/d(hidden of the column before a trained token) is all there is; the head gets the rest."""
  model, variables = model
  batch = _packed(_demos(rng))
  hidden, _ = model.apply(variables, batch.tokens, None, batch.segment_ids)
  table = np.asarray(variables["params"]["embed"]["table"])

  class Frozen:  # the same loss, as a function of the hidden states.
    cfg = model.cfg

    def __init__(self, hidden):
      self.hidden = hidden

    def apply(self, variables, *args, method=None, **kwargs):
      if method == "unembed":
        return model.apply(variables, args[0], method="unembed")
      return self.hidden, None

  loss = lambda h: make_sft_loss(Frozen(h))(variables, batch, None)[0]
  grad = jax.grad(loss)(hidden)
  expected = np.zeros(hidden.shape)
  for t in np.flatnonzero(batch.loss_mask[0]):
    logits = table @ np.asarray(hidden)[0, t - 1]
    p = np.exp(logits - logits.max())
    expected[0, t - 1] += table.T @ (p / p.sum() - np.eye(29)[batch.tokens[0, t]])
  np.testing.assert_allclose(grad, expected, atol=1e-5)
