"""A small model that can be differentiated in float64, demonstrations, and shared checks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpr_jax.data.batches import SFTBatch
from dpr_jax.models import ModelConfig
from dpr_jax.training import TrainState, make_train_step

VOCAB = 7


class Bigram:
  """Next-token logits from the last token alone, with the interface of `Transformer`.

  Six rows of logits are computed in chunks of 3 columns.
  """

  cfg = ModelConfig(vocab_size=VOCAB, logits_budget=3 * 4 * 6 * VOCAB * 3 / 2**30)

  def apply(self, variables, x, positions=None, segment_ids=None, cache=None, *, method=None,
            rngs=None):
    if method == "unembed":
      return x @ variables["params"]["head"]
    return jnp.tanh(jnp.asarray(variables["params"]["table"])[x]), cache


@pytest.fixture
def bigram(rng):
  """(model, variables as numpy float64): float64 under jax.enable_x64(True), else float32."""
  params = {"table": rng.normal(size=(VOCAB, 4)), "head": 1.5 * rng.normal(size=(4, VOCAB))}
  return Bigram(), {"params": params}


def logits_of(variables, tokens):
  """float64 [T, V] of one row, by numpy: row t - 1 chooses token t."""
  params = variables["params"]
  return np.tanh(np.asarray(params["table"], np.float64)[tokens]) @ np.asarray(params["head"])


def naive_logp(variables, tokens, t):
  """log p(token t | token t - 1)."""
  row = logits_of(variables, tokens)[t - 1]
  return row[tokens[t]] - np.log(np.sum(np.exp(row)))


@pytest.fixture
def naive():
  """The functions logits_of and naive_logp."""
  return logits_of, naive_logp


@pytest.fixture
def make_rows(rng):
  """make_rows(count, width) -> SFTBatch, one demonstration a row, right- or left-padded with
  garbage tokens, the response 1 to 4 tokens after a prompt of 1 to 3."""

  def make(count=6, width=9, left=False):
    tokens = rng.integers(0, VOCAB, (count, width)).astype(np.int32)
    segments, mask = np.zeros((count, width), np.int32), np.zeros((count, width), np.float32)
    for b in range(count):
      prompt, response = int(rng.integers(1, 4)), int(rng.integers(1, 5))
      start = width - prompt - response if left else 0
      segments[b, start : start + prompt + response] = 1
      mask[b, start + prompt : start + prompt + response] = 1.0
    return SFTBatch(tokens=tokens, segment_ids=segments, loss_mask=mask)

  return make


@pytest.fixture
def check_gradient(rng):
  """check_gradient(loss, surrogate, variables): grad(loss) equals differences of surrogate."""

  def check(loss, surrogate, variables, directions=4, step=1e-5):
    with jax.enable_x64(True):
      variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables)
      grads, surrogate = jax.jit(jax.grad(loss))(variables), jax.jit(surrogate)
      for _ in range(directions):
        way = jax.tree.map(lambda x: rng.normal(size=x.shape), variables)
        move = lambda h, way=way: jax.tree.map(lambda x, d: x + h * d, variables, way)
        slope = float(surrogate(move(step)) - surrogate(move(-step))) / (2 * step)
        dots = jax.tree.map(lambda g, d: float(np.sum(np.asarray(g) * d)), grads, way)
        scale = np.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(grads)))
        assert sum(jax.tree.leaves(dots)) == pytest.approx(slope, abs=1e-6 * max(scale, 1.0))
        assert scale > 1e-6

  return check


@pytest.fixture
def check_accumulation():
  """check_accumulation(loss_fn, variables, batch): three micro-batches equal the whole batch."""

  def check(loss_fn, variables, batch):
    results = []
    for parts in (1, 3):
      state = TrainState.create(
          jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), variables), optax.sgd(0.1),
          jax.random.key(0),
      )
      step = make_train_step(loss_fn, optax.sgd(0.1), accumulation=parts)
      state, metrics = step(state, jax.tree.map(jnp.asarray, batch))
      results.append((state.variables, metrics))
    (one, one_metrics), (three, three_metrics) = results
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), one, variables)
    assert min(jax.tree.leaves(moved)) > 1e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, three)
    assert set(one_metrics) == set(three_metrics)
    for name in one_metrics:
      assert float(one_metrics[name]) == pytest.approx(float(three_metrics[name]), rel=1e-4), name

  return check


@pytest.fixture
def pack_rows():
  """pack_rows(SFTBatch of one demonstration a row) -> all of them in one row."""

  def pack(rows):
    on = rows.segment_ids > 0
    join = lambda x: np.concatenate([x[b, on[b]] for b in range(len(on))])[None]
    ids = np.arange(1, len(on) + 1, dtype=np.int32)[:, None] * rows.segment_ids
    return SFTBatch(
        tokens=join(rows.tokens), segment_ids=join(ids), loss_mask=join(rows.loss_mask)
    )

  return pack
