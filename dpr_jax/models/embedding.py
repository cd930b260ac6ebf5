"""The [V, D] table of an embedding or an output head, and the communication that its use requires.

The table's rows are sharded over the mesh axis tensor and its columns over fsdp. The rows of a
batch are sharded over fsdp as well, so either the table must be gathered or the activations must
be resharded. The cheaper of the two, in bytes moved, is chosen:

- Lookup: each device looks up its own columns for all rows of its replica; an all-to-all then
  exchanges columns for rows. A device receives as many bytes as its own activations have.
- Logits: all rows of a replica are gathered, and each device computes their logits over its part
  of the vocabulary, which is split over tensor and fsdp. A device receives the activations of its
  replica and, in exchange for its columns of the head, its part of the vocabulary: 1 / fsdp of
  a gathered head.

The FLOPs are those of a gathered table. Logits are computed in chunks of columns (`logprobs.py`),
and each chunk exchanges the head and its gradient anew.

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
  """Returns the logical axes of logits [batch, columns, vocab_size] on the current mesh."""
  data, fsdp, tensor = sharding.mesh_shape()
  if fsdp == 1 or batch % (data * fsdp) or vocab_size % (tensor * fsdp):
    return GATHERED_HEAD
  # Counted in rows of D columns that a device receives: activations and exchanged head, or head.
  fine = batch // data * columns + vocab_size // (tensor * fsdp)
  return FINE_HEAD if fine < vocab_size // tensor else GATHERED_HEAD


def rows_move(batch: int, length: int, table_VxD: jax.Array, dtype: jnp.dtype) -> bool:
  """Whether a lookup of [batch, length] tokens moves activations of `dtype`, not the table."""
  data, fsdp, _ = sharding.mesh_shape()
  vocab_size, hidden_size = table_VxD.shape
  if fsdp == 1 or batch % (data * fsdp) or hidden_size % fsdp:
    return False
  moved = batch // (data * fsdp) * length * dtype.itemsize
  return moved < vocab_size // sharding.vocab_ways(vocab_size) * table_VxD.dtype.itemsize


class Embedding(nn.Module):
  """A table used for lookups (embedding) or for logits (output head)."""

  cfg: ModelConfig

  def setup(self):
    shape = (self.cfg.vocab_size, self.cfg.hidden_size)
    self.table = parameter(self, "table", nn.initializers.normal(0.02), STORED, shape)

  def lookup(self, tokens_BxT, gathered: bool = False):
    """Looks up embeddings [B, T, D] in the compute dtype; ids outside the vocabulary give NaN.

    The cast follows the lookup, so that the gradient accumulates in the dtype of the table. In
    bfloat16, the sum over the many occurrences of a frequent token would stop growing.

    Args:
      gathered: the table is already gathered over fsdp, as in decoding.
    """
    dtype = jnp.dtype(self.cfg.dtype)
    if not gathered and rows_move(*tokens_BxT.shape, self.table, dtype):
      tokens_BxT = constrain(tokens_BxT, "replica_batch", "sequence")
      x_BxTxD = jnp.take(constrain(self.table, *STORED), tokens_BxT, axis=0).astype(dtype)
      x_BxTxD = constrain(x_BxTxD, "replica_batch", "sequence", "embed")
    else:
      # Gathered before the lookup: if the table is split over both axes, the partitioner
      # replicates it in full, twice.
      table_VxD = constrain(self.table, *sharding.without_fsdp(STORED))
      x_BxTxD = jnp.take(table_VxD, tokens_BxT, axis=0).astype(dtype)
    return constrain(x_BxTxD, "batch", "sequence", None)

  def logits(self, hidden):
    """Logits, float32 [..., V], of hidden states [B, C, D], or [B, D] in a decoding step."""
    dtype = jnp.dtype(self.cfg.dtype)
    if hidden.ndim == 3:
      axes = logits_axes(*hidden.shape[:2], self.cfg.vocab_size)
      if axes == FINE_HEAD:
        fine = (axes[-1], None)
        table_VxD = sharding.reshard(self.table, dtype, STORED, fine, (fine, STORED))
        rows, replica = ("batch", "sequence", None), (*axes[:-1], None)
        hidden_BxCxD = sharding.reshard(hidden, dtype, rows, replica, (rows,))
        return constrain(matmul_lib.logits(hidden_BxCxD, table_VxD), *axes)
    table_VxD = sharding.gather_weight(self.table, dtype, STORED)
    if hidden.ndim == 2 and target_platform() == "cpu":
      # One token per row: a CPU is 1.2 to 1.5 times faster with the table as the left operand.
      # Without the barrier, XLA would fold the transpose back into the matmul.
      contract = (((1,), (1,)), ((), ()))
      logits_VxB = jax.lax.dot_general(
          table_VxD, hidden, contract, preferred_element_type=jnp.float32
      )
      return jax.lax.optimization_barrier(logits_VxB).T
    return matmul_lib.logits(hidden, table_VxD)
