"""Chunked log-probabilities equal float64 numpy, and tokens are shifted by one column."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.models import ModelConfig, Transformer, token_logprobs
from dpr_jax.models.logprobs import chunk_columns, hidden_logprobs


def _naive(logits, targets):
  """(logp, logsumexp, entropy) in float64."""
  logits = logits.astype(np.float64)
  top = logits.max(-1, keepdims=True)
  lse = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[..., 0]
  log_p = logits - lse[..., None]
  logp = np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
  return logp, lse, -(np.exp(log_p) * log_p).sum(-1)


@pytest.mark.parametrize("length,chunk_size", [(1, 4), (7, 3), (8, 4), (13, 5), (13, 12), (13, 64)])
def test_chunks_equal_float64_numpy(rng, length, chunk_size):
  hidden = rng.normal(size=(3, length, 6)).astype(np.float32)
  table = (2 * rng.normal(size=(6, 11))).astype(np.float32)
  targets = rng.integers(0, 11, (3, length)).astype(np.int32)
  got = hidden_logprobs(
      lambda h: h @ jnp.asarray(table)[None], hidden, targets, chunk_size=chunk_size,
      with_entropy=True,
  )
  for ours, expected in zip(got, _naive(hidden @ table, targets)):
    assert ours.shape == (3, length) and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_greedy_is_the_first_argmax_among_equal_logits_too(rng):
  logits = rng.integers(0, 3, (4, 9, 7)).astype(np.float32)
  targets = rng.integers(0, 7, (4, 9)).astype(np.int32)
  out = hidden_logprobs(lambda h: h, logits, targets, chunk_size=4, with_greedy=True)
  np.testing.assert_array_equal(out[-1], logits.argmax(-1) == targets)
  assert 0 < out[-1].sum() < (logits.max(-1) == np.take_along_axis(logits, targets[..., None], 2)[
      ..., 0]).sum()


def test_gradients_do_not_depend_on_the_chunk_and_equal_the_analytic_one(rng):
  hidden = rng.normal(size=(2, 9, 5)).astype(np.float32)
  table = rng.normal(size=(5, 7)).astype(np.float32)
  targets = rng.integers(0, 7, (2, 9)).astype(np.int32)
  weight = rng.normal(size=(3, 2, 9)).astype(np.float32)

  def loss(hidden, table, chunk_size):
    out = hidden_logprobs(
        lambda h: jnp.einsum("btd,dv->btv", h, table), hidden, targets, chunk_size=chunk_size,
        with_entropy=True,
    )
    return sum(jnp.sum(w * x) for w, x in zip(weight, out))

  # d logp = (one_hot - p), d logsumexp = p, and the entropy has no gradient.
  p = jax.nn.softmax(hidden @ table, axis=-1)
  d_logits = weight[0][..., None] * (np.eye(7)[targets] - p) + weight[1][..., None] * p
  expected = (d_logits @ table.T, np.einsum("btd,btv->dv", hidden, d_logits))
  for chunk_size in (2, 4, 9):
    got = jax.grad(loss, argnums=(0, 1))(hidden, table, chunk_size)
    for ours, theirs in zip(got, expected):
      np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_each_token_is_scored_from_the_column_before_it(make_model, budget_of, rng):
  model, variables = make_model(int(rng.integers(1 << 30)), logits_budget=budget_of(4, 3, 29))
  tokens = rng.integers(0, 29, (3, 10)).astype(np.int32)
  segments = np.array(
      [[0, 0, 1, 1, 1, 1, 1, 2, 2, 2], [1] * 8 + [0] * 2, [1, 1, 2, 2, 2, 3, 0, 4, 4, 0]], np.int32
  )
  hidden, _ = model.apply(variables, tokens, None, segments)
  logits = np.asarray(model.apply(variables, hidden, method="unembed"))
  naive = _naive(logits[:, :-1], tokens[:, 1:])
  out = token_logprobs(
      model, variables, tokens, segments, with_entropy=True, with_greedy=True
  )
  has_past = np.zeros((3, 10), bool)
  for b, t in np.ndindex(3, 9):
    has_past[b, t + 1] = segments[b, t + 1] != 0 and segments[b, t + 1] == segments[b, t]
  naive = *naive, logits[:, :-1].argmax(-1) == tokens[:, 1:]
  for ours, expected in zip((out.logp, out.logsumexp, out.entropy, out.greedy), naive):
    ours = np.asarray(ours)
    assert ours.shape == (3, 10)
    np.testing.assert_array_equal(ours[~has_past], 0.0)
    np.testing.assert_allclose(
        ours, np.where(has_past, np.pad(expected, ((0, 0), (1, 0))), 0.0), atol=2e-5
    )

  for start in (1, 4, 9):
    part = token_logprobs(model, variables, tokens, segments, start=start, with_entropy=True)
    for ours, whole in zip(jax.tree.leaves(part), jax.tree.leaves(out)):
      assert ours.shape == (3, 10 - start)
      np.testing.assert_allclose(ours, whole[:, start:], atol=1e-5)


@pytest.mark.parametrize("columns", [1, 4, 100])
def test_entropy_is_not_there_unless_asked_for(make_model, budget_of, rng, columns):
  model, variables = make_model(0, logits_budget=budget_of(columns, 2, 29))
  tokens = rng.integers(0, 29, (2, 10)).astype(np.int32)
  assert token_logprobs(model, variables, tokens).entropy is None
  assert token_logprobs(model, variables, tokens, with_entropy=True).entropy.shape == (2, 10)


def test_a_tiny_budget_changes_neither_values_nor_gradients(make_model, budget_of, rng):
  """Of 11 columns: one at a time, three, and all at once."""
  model, variables = make_model(int(rng.integers(1 << 30)))
  tokens = rng.integers(0, 29, (2, 12)).astype(np.int32)
  segments = np.sort(rng.integers(0, 3, (2, 12)), axis=1).astype(np.int32)
  weight = rng.normal(size=(2, 2, 12)).astype(np.float32)

  def results(budget):
    cfg = dataclasses.replace(model.cfg, logits_budget=budget)
    chunked = Transformer(cfg)

    def loss(v):
      out = token_logprobs(chunked, v, tokens, segments, with_entropy=True)
      return jnp.sum(weight[0] * out.logp + weight[1] * out.logsumexp), out

    return chunk_columns(cfg, 2), jax.jit(jax.grad(loss, has_aux=True))(variables)

  columns, whole = results(0.25)
  assert columns >= 11
  scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(whole[0]))
  for budget, expected in ((1e-9, 1), (budget_of(3, 2, 29), 3)):
    columns, (grads, out) = results(budget)
    assert columns == expected
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), out, whole[1])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), grads, whole[0]
    )


def _largest(jaxpr, found=None):
  """Sizes of all floating-point arrays of a jaxpr, including those in scans and checkpoints."""
  found = set() if found is None else found
  for eqn in jaxpr.eqns:
    for var in eqn.outvars:
      if jnp.issubdtype(var.aval.dtype, jnp.floating):
        found.add(var.aval.size)
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        _largest(inner, found)
  return found


def test_logits_of_all_columns_never_exist(rng):
  """Forward and backward, peak memory depends on the chunk and not on the length."""
  batch, dim, vocab, chunk = 2, 8, 4096, 16

  def loss(hidden, table, targets):
    out = hidden_logprobs(
        lambda h: jnp.einsum("btd,dv->btv", h, table), hidden, targets, chunk_size=chunk
    )
    return jnp.sum(out[0])

  def shapes(length):
    return [
        jax.ShapeDtypeStruct((batch, length, dim), jnp.float32),
        jax.ShapeDtypeStruct((dim, vocab), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
    ]

  grad = jax.value_and_grad(loss, argnums=(0, 1))
  sizes = _largest(jax.make_jaxpr(grad)(*shapes(128)).jaxpr)
  assert max(sizes) == batch * chunk * vocab  # of one chunk: the traversal finds it.
  temp = {
      length: jax.jit(grad).lower(*shapes(length)).compile().memory_analysis().temp_size_in_bytes
      for length in (128, 512)
  }
  assert temp[512] < 1.2 * temp[128]
  assert temp[512] < 5 * batch * chunk * vocab * 4 + 4 * dim * vocab * 4


@pytest.mark.parametrize("mesh, rows, vocab_size, expected, of_three", [
    ((1, 1, 1), 4, 100, 20, 6),  # 12 bytes x 4 rows x 100 ids a column.
    ((2, 2, 1), 4, 100, 83, 27),  # A row a device: 1,200 bytes.
    ((1, 1, 4), 4, 100, 83, 27),  # A quarter of the vocabulary.
    ((1, 4, 1), 6, 100, 13, 4),  # Six rows do not divide over four devices: each is given all.
    ((1, 1, 3), 4, 100, 20, 6),  # Nor a hundred ids over three.
    ((1, 1, 1), 400, 10_000, 1, 1),  # Never none.
])
def test_chunks_fill_a_budget(mesh, rows, vocab_size, expected, of_three):
  cfg = ModelConfig(vocab_size=vocab_size, logits_budget=100_000 / 2**30)
  with jax.sharding.use_abstract_mesh(
      jax.sharding.AbstractMesh(mesh, ("data", "fsdp", "tensor"))
  ):
    assert chunk_columns(cfg, rows) == expected
    assert chunk_columns(cfg, rows, models=3) == of_three  # They share the budget.


def test_without_a_mesh_one_device_holds_all_logits():
  cfg = ModelConfig(vocab_size=100, logits_budget=100_000 / 2**30)
  assert chunk_columns(cfg, 4) == 20
