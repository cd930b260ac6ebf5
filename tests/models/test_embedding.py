"""What the embedding and the output head move between devices, and the gradient of a lookup."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.models import ModelConfig
from dpr_jax.models.embedding import FINE_HEAD, GATHERED_HEAD, Embedding, logits_axes, rows_move


def on_mesh(*shape):
  mesh = jax.sharding.AbstractMesh(
      shape, ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3
  )
  return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize("mesh, batch, columns, vocab, axes", [
    ((1, 8, 1), 8, 16, 1024, FINE_HEAD),
    ((1, 8, 1), 8, 112, 1024, GATHERED_HEAD),  # 8 * 112 + 1024 / 8 = 1024.
    ((1, 8, 1), 8, 111, 1024, FINE_HEAD),
    ((4, 2, 1), 32, 16, 1024, FINE_HEAD),  # Per replica.
    ((1, 2, 4), 8, 16, 1024, GATHERED_HEAD),  # tensor leaves 256 rows, and 128 + 128 is not less.
    ((1, 2, 4), 8, 15, 1024, FINE_HEAD),
    ((8, 1, 1), 8, 1, 1024, GATHERED_HEAD),
    ((1, 8, 1), 4, 1, 1024, GATHERED_HEAD),  # The batch or the vocabulary does not divide.
    ((1, 8, 1), 8, 1, 1023, GATHERED_HEAD),
    ((1, 4, 2), 8, 1, 1028, GATHERED_HEAD),
])
def test_the_head_is_split_finely_where_less_moves(mesh, batch, columns, vocab, axes):
  with on_mesh(*mesh):
    assert logits_axes(batch, columns, vocab) == axes


@pytest.mark.parametrize("mesh, batch, length, table, dtype, moves", [
    ((1, 8, 1), 8, 255, (128, 64), "bfloat16", True),  # Half the bytes per element of the table.
    ((1, 8, 1), 8, 256, (128, 64), "bfloat16", False),
    ((1, 8, 1), 8, 127, (128, 64), "float32", True),
    ((2, 4, 1), 16, 127, (128, 64), "float32", False),
    ((1, 4, 2), 4, 63, (128, 64), "float32", True),
    ((1, 4, 2), 4, 64, (128, 64), "float32", False),
    ((1, 4, 2), 4, 64, (129, 64), "float32", True),  # A table that tensor does not split.
    ((8, 1, 1), 8, 1, (128, 64), "float32", False),
    ((1, 8, 1), 4, 1, (128, 64), "float32", False),
    ((1, 8, 1), 8, 1, (128, 60), "float32", False),
])
def test_rows_move_to_the_table_if_they_have_fewer_bytes(mesh, batch, length, table, dtype, moves):
  with on_mesh(*mesh):
    table = jax.ShapeDtypeStruct(table, jnp.float32)
    assert rows_move(batch, length, table, jnp.dtype(dtype)) is moves


def test_without_a_mesh_nothing_moves():
  assert logits_axes(8, 1, 1024) == GATHERED_HEAD
  assert not rows_move(8, 1, jax.ShapeDtypeStruct((128, 64), jnp.float32), jnp.dtype("float32"))


def test_the_gradient_of_a_frequent_token_does_not_stop_growing():
  """In bfloat16, a sum of 4,096 times 0.01 would stop growing at 4."""
  embedding = Embedding(ModelConfig(vocab_size=5, hidden_size=16, dtype="bfloat16"))
  variables = {"params": {"table": jnp.ones((5, 16), jnp.float32)}}
  tokens = jnp.full((8, 512), 3, jnp.int32)

  def loss(variables):
    x_BxTxD = embedding.apply(variables, tokens, method="lookup")
    assert x_BxTxD.dtype == jnp.bfloat16
    return jnp.sum(x_BxTxD.astype(jnp.float32) * jnp.float32(0.01))

  gradient = jax.jit(jax.grad(loss))(variables)["params"]["table"]
  expected = np.zeros((5, 16))
  expected[3] = tokens.size * float(jnp.bfloat16(0.01))
  np.testing.assert_allclose(gradient, expected, rtol=1e-5)
