"""A [V, D] table of embeddings or an output head, and what moves between devices to use it.

It is stored with its rows split over the mesh axis tensor and its columns over fsdp. The rows of a
batch are split over fsdp as well, so that either the table has to be gathered or the activations
have to move. What is less moves:

- a lookup: each device looks its own columns up for all rows of its replica, then they exchange
  columns for rows (an all-to-all). It receives as much as its own activations.
- logits: all rows of a replica are gathered, and each device computes their logits over its own
  part of the vocabulary, split over tensor and fsdp. It receives the activations of a replica, and
  of the head its part of the vocabulary in exchange for its columns: 1 / fsdp of a gathered head.

Either way the operations are as many as with a gathered table. Logits are computed in chunks of
columns (`logprobs.py`), and what is received of the head, and of its gradient, is so once a chunk.

Dims: V vocabulary, D hidden, B batch, T tokens, C columns of a chunk.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpr_jax import sharding
from dpr_jax.models import matmul as matmul_lib
from dpr_jax.models.attention import target_platform
from dpr_jax.models.config import ModelConfig
from dpr_jax.models.parameters import parameter
from dpr_jax.sharding import constrain

STORED = ("vocab", "embed")
GATHERED_HEAD = ("batch", "sequence", "vocab")
FINE_HEAD = ("replica_batch", "sequence", "fine_vocab")


def logits_axes(batch: int, columns: int, vocab_size: int) -> tuple[str, str, str]:
  """Logical axes of logits [batch, columns, vocab_size] on the mesh that is set."""
  data, fsdp, tensor = sharding.mesh_shape()
  if fsdp == 1 or batch % (data * fsdp) or vocab_size % (tensor * fsdp):
    return GATHERED_HEAD
  # In rows of D columns that a device receives: activations and exchanged head, or whole head.
  fine = batch // data * columns + vocab_size // (tensor * fsdp)
  return FINE_HEAD if fine < vocab_size // tensor else GATHERED_HEAD


def rows_move(batch: int, length: int, table: jax.Array, dtype: jnp.dtype) -> bool:
  """Whether a lookup of [batch, length] tokens moves activations of `dtype`, not the table."""
  data, fsdp, _ = sharding.mesh_shape()
  vocab_size, hidden_size = table.shape
  if fsdp == 1 or batch % (data * fsdp) or hidden_size % fsdp:
    return False
  moved = batch // (data * fsdp) * length * dtype.itemsize
  return moved < vocab_size // sharding.vocab_ways(vocab_size) * table.dtype.itemsize


class Embedding(nn.Module):
  """Rows looked up as embeddings, or multiplied with as an output head."""

  cfg: ModelConfig

  def setup(self):
    self.table = parameter(
        self,
        "table",
        nn.initializers.normal(0.02),
        STORED,
        (self.cfg.vocab_size, self.cfg.hidden_size),
    )

  def lookup(self, tokens_BxT, gathered: bool = False):
    """[B, T] -> [B, T, D] in the compute dtype; an id outside of the vocabulary gives NaN.

    Cast after the lookup, so that the gradient of a token sums in the dtype of the table: in
    bfloat16 the sum over the many places of a frequent token would stop to grow.

    Args:
      gathered: the table lies on all of fsdp already, as while decoding.
    """
    dtype = jnp.dtype(self.cfg.dtype)
    if not gathered and rows_move(*tokens_BxT.shape, self.table, dtype):
      tokens_BxT = constrain(tokens_BxT, "replica_batch", "sequence")
      x_BxTxD = jnp.take(constrain(self.table, *STORED), tokens_BxT, axis=0).astype(dtype)
      x_BxTxD = constrain(x_BxTxD, "replica_batch", "sequence", "embed")
    else:
      # Gathered before the lookup: one on a table that is split over both axes makes the
      # partitioner replicate it in full, twice.
      table = constrain(self.table, *sharding.without_fsdp(STORED))
      x_BxTxD = jnp.take(table, tokens_BxT, axis=0).astype(dtype)
    return constrain(x_BxTxD, "batch", "sequence", None)

  def logits(self, hidden):
    """[B, C, D], or [B, D] of a step of decoding, -> float32 [..., V]."""
    dtype = jnp.dtype(self.cfg.dtype)
    if hidden.ndim == 3:
      axes = logits_axes(*hidden.shape[:2], self.cfg.vocab_size)
      if axes == FINE_HEAD:
        fine = (axes[-1], None)
        table = sharding.reshard(self.table, dtype, STORED, fine, (fine, STORED))
        rows, replica = ("batch", "sequence", None), (*axes[:-1], None)
        hidden = sharding.reshard(hidden, dtype, rows, replica, (rows,))
        return constrain(matmul_lib.logits(hidden, table), *axes)
    table = sharding.gather_weight(self.table, dtype, STORED)
    if hidden.ndim == 2 and target_platform() == "cpu":
      # One token a row: a CPU reads a table on the left of a product faster, 1.2 to 1.5 times.
      # Without the barrier, the transpose would be folded back into the product.
      contract = (((1,), (1,)), ((), ()))
      logits_VxB = jax.lax.dot_general(table, hidden, contract, preferred_element_type=jnp.float32)
      return jax.lax.optimization_barrier(logits_VxB).T
    return matmul_lib.logits(hidden, table)
