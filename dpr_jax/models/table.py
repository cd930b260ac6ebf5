"""A [V, D] table of embeddings or an output head, and what moves between devices to use it.

It is stored with its rows split over the mesh axis tensor and its columns over fsdp. The rows of a
batch are split over fsdp as well, so that either the table has to be gathered or the activations
have to move. What is less moves:

- a lookup: each device looks its own columns up for all rows of its replica, then they exchange
  columns for rows (an all-to-all). It receives as much as its own activations.
- logits: all rows of a replica are gathered, and each device computes their logits over its own
  part of the vocabulary, split over tensor and fsdp. It receives the activations of a replica.

Either way the operations are as many as with a gathered table, and the gradient of the table
stays on its device. Logits are computed in chunks of columns (`logprobs.py`): a gathered head
would be gathered, and its gradient reduced, once a chunk, while activations are so once in all.

Dims: V vocabulary, D hidden, B batch, T tokens, C columns of a chunk.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpr_jax import sharding
from dpr_jax.models import products
from dpr_jax.models.attention import target_platform
from dpr_jax.models.config import ModelConfig
from dpr_jax.sharding import constrain

_STORED = ("vocab", "embed")
GATHERED_HEAD = ("batch", "sequence", "vocab")
FINE_HEAD = ("replica_batch", "sequence", "fine_vocab")


def parameter(
    module: nn.Module, name: str, init, axes: tuple[str | None, ...], shape: tuple[int, ...]
):
  """A float32 parameter of a module, with its logical axes."""
  return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


def logits_axes(batch: int, columns: int, vocab_size: int) -> tuple[str, str, str]:
  """Logical axes of logits [batch, columns, vocab_size] on the mesh that is set."""
  data, fsdp, tensor = sharding.mesh_shape()
  divides = batch % (data * fsdp) == 0 and vocab_size % (tensor * fsdp) == 0
  less = batch // data * columns < vocab_size // tensor
  return FINE_HEAD if fsdp > 1 and divides and less else GATHERED_HEAD


class Table(nn.Module):
  """Rows looked up as embeddings, or multiplied with as an output head."""

  cfg: ModelConfig

  def setup(self):
    self.table = parameter(
        self,
        "table",
        nn.initializers.normal(0.02),
        _STORED,
        (self.cfg.vocab_size, self.cfg.hidden_size),
    )

  def lookup(self, tokens_BxT):
    """[B, T] -> [B, T, D] in the compute dtype; an id outside of the vocabulary gives NaN."""
    dtype = jnp.dtype(self.cfg.dtype)
    if self._rows_move(*tokens_BxT.shape):
      table = constrain(self.table.astype(dtype), *_STORED)
      x_BxTxD = jnp.take(table, constrain(tokens_BxT, "replica_batch", "sequence"), axis=0)
      x_BxTxD = constrain(x_BxTxD, "replica_batch", "sequence", "embed")
    else:
      # Gathered before the lookup: one on a table that is split over both axes makes the
      # partitioner replicate it in full, twice.
      gathered = sharding.without_fsdp(_STORED)
      table = sharding.move(self.table, dtype, _STORED, gathered, (gathered,))
      x_BxTxD = jnp.take(table, tokens_BxT, axis=0)
    return constrain(x_BxTxD, "batch", "sequence", None)

  def _rows_move(self, batch: int, length: int) -> bool:
    data, fsdp, tensor = sharding.mesh_shape()
    if length == 1 or fsdp == 1 or self.cfg.hidden_size % fsdp:
      return False  # A step of decoding has the table gathered already.
    return batch // (data * fsdp) * length < self.cfg.vocab_size // tensor

  def logits(self, hidden):
    """[B, C, D], or [B, D] of a step of decoding, -> float32 [..., V]."""
    dtype = jnp.dtype(self.cfg.dtype)
    if hidden.ndim == 3:
      axes = logits_axes(*hidden.shape[:2], self.cfg.vocab_size)
      if axes == FINE_HEAD:
        fine = (axes[-1], None)
        table = sharding.move(self.table, dtype, _STORED, fine, (fine, _STORED))
        rows, replica = ("batch", "sequence", None), (*axes[:-1], None)
        hidden = sharding.move(hidden, dtype, rows, replica, (rows,))
        return constrain(products.logits(hidden, table), *axes)
    table = sharding.gather_weight(self.table, dtype, _STORED)
    if hidden.ndim == 2 and target_platform() == "cpu":
      # One token a row: the CPU reads a table on the left of a product once and a half as fast.
      # Without the barrier, the transpose would be folded back into the product.
      contract = (((1,), (1,)), ((), ()))
      logits_VxB = jax.lax.dot_general(table, hidden, contract, preferred_element_type=jnp.float32)
      return jax.lax.optimization_barrier(logits_VxB).T
    return products.logits(hidden, table)
