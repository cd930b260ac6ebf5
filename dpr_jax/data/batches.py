"""The batches that the data pipeline hands to a step.

Dims: B rows of a batch, T token columns, P prompt columns.
Every array is a host (numpy) array until the loader places it on the mesh.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import struct

Array = Any  # np.ndarray on the host, jax.Array inside a jit.


@struct.dataclass
class SFTBatch:
  """Packed demonstrations. All masks refer to the token at their own position.

  The shift by one (position t predicts token t + 1) happens in
  `models/logprobs.py` and nowhere else.
  """

  tokens: Array  # int32 [B, T], token ids; 0 where padded.
  segment_ids: Array  # int32 [B, T], 0 padding, 1, 2, ... demonstrations packed in a row.
  loss_mask: Array  # float32 [B, T], 1 where the token is trained (response tokens and EOS).


@struct.dataclass
class PromptBatch:
  """Prompts to continue, left-aligned: row b is tokens[b, :lengths[b]]."""

  tokens: Array  # int32 [B, P], token ids; 0 where padded.
  lengths: Array  # int32 [B], number of prompt tokens; 0 marks a filler row.


@struct.dataclass
class Shared:
  """A pytree that all rows of a batch share, such as the frozen models that a loss reads.

  Every micro-batch has the whole of it; it is neither split, nor copied, nor donated.
  """

  value: Any


def rows_apart(batch: Any) -> tuple[list[Array], Callable[[Sequence[Array]], Any]]:
  """(the arrays of a batch that have a row for each of its rows, join).

  `join` of as many arrays in the same order is a batch of them, with what is `Shared` as it was.
  """
  is_shared = lambda x: isinstance(x, Shared)
  leaves, tree = jax.tree.flatten(batch, is_leaf=is_shared)

  def join(arrays: Sequence[Array]) -> Any:
    following = iter(arrays)
    return jax.tree.unflatten(tree, [x if is_shared(x) else next(following) for x in leaves])

  return [x for x in leaves if not is_shared(x)], join
