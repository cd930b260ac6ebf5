"""The KV cache: keys and values of earlier tokens, in slots that are aligned across rows.

A step writes the same slot of every row, so on any mesh the write is one slice at one index.
The slots form a ring buffer. `ranks` stores, for each slot, how many tokens of its row precede
the token in it. A query sees the slots whose rank is at most its own and, in a local layer, less
than `window` below its own. Gaps, prompts admitted at different times and wrap-around
therefore need no special cases.

A prefilled cache keeps the prompt in its first P slots, and the N slots after them form the
ring. A local layer whose window is shorter than P + N has a ring of `window` slots only.

The keys and values of a group of layers are [R, B, K, S, H]; the axis R is dropped if R = 1. Heads
precede slots, so that a matmul with the cache reads one contiguous [S, H] matrix for each row and
head. With slots before heads, or with R = 1 kept, XLA on CPU copies the whole cache in every step.

Dims: R repeats of a layer in its scan, B rows, S slots, K KV heads, H head_dim, P prompt
columns, N maximum new tokens, T tokens of a step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpr_jax.models.config import LOCAL, ModelConfig
from dpr_jax.sharding import constrain


@struct.dataclass
class Slots:
  """The slots of one kind of layer."""

  ranks: jax.Array  # int32 [B, S], number of preceding tokens of the row; -1 if empty.
  fixed: int = struct.field(pytree_node=False, default=0)  # leading slots before the ring.

  def at(self, column: jax.Array) -> jax.Array:
    """Returns the slot of the `column`-th token after the prefill."""
    return self.fixed + column % (self.ranks.shape[1] - self.fixed)


@struct.dataclass
class Cache:
  """The cache of all layers; the layout is described in the module docstring."""

  kv: Any  # tuple over groups of tuples over layers of (keys, values).
  slots: dict[str, Slots]  # by kind of layer.
  lengths: jax.Array  # int32 [B], tokens stored, which is the next token's rank and position.
  index: jax.Array  # int32 [], columns written since the prefill.

  def repeat(self, n: int) -> "Cache":
    """Repeats every row n times, adjacent, so that samples of a prompt share its prefill."""
    if n == 1:
      return self
    rows = lambda x, axis: jnp.repeat(x, n, axis=axis)
    return self.replace(
        kv=jax.tree.map(lambda x: _constrain_kv(rows(x, x.ndim - 4)), self.kv),
        slots=jax.tree.map(lambda x: rows(x, 0), self.slots),
        lengths=rows(self.lengths, 0),
    )


def _constrain_kv(x: jax.Array) -> jax.Array:
  return constrain(x, *("layers", "batch", "kv_heads", "sequence", "head_dim")[-x.ndim :])


def heads_first(*kv_BxTxKxH: jax.Array) -> tuple[jax.Array, ...]:
  """Transposes keys and values of a layer into the cache's layout, [B, K, T, H]."""
  return tuple(jnp.swapaxes(x, 1, 2) for x in kv_BxTxKxH)


def layout(cfg: ModelConfig, kind: str, prompt: int, new: int) -> tuple[int, int]:
  """Returns (slots, fixed slots) of a kind of layer for P prompt columns and N new tokens."""
  if kind == LOCAL and cfg.window < prompt + new:
    return cfg.window, 0
  return prompt + new, prompt


def init_cache(cfg: ModelConfig, batch_size: int, new: int, prompt: int | None = None) -> Cache:
  """Creates an empty cache.

  Args:
    new: slots of the ring; once they are full, the oldest token is overwritten.
    prompt: columns of the prompts that `admit` will insert; local layers then allocate their
      window only. None allocates `new` slots in every layer.
  """

  def shape(kind):
    return (new, 0) if prompt is None else layout(cfg, kind, prompt, new)

  def pair(repeats, kind):
    dims = (batch_size, cfg.num_kv_heads, shape(kind)[0], cfg.head_dim)
    dims = dims if repeats == 1 else (repeats, *dims)
    return tuple(_constrain_kv(jnp.zeros(dims, cfg.dtype)) for _ in range(2))

  def slots(kind):
    n, fixed = shape(kind)
    return Slots(constrain(jnp.full((batch_size, n), -1, jnp.int32), "batch", "sequence"), fixed)

  return Cache(
      kv=tuple(tuple(pair(r, kind) for kind in pattern) for pattern, r in cfg.groups),
      slots={kind: slots(kind) for kind in sorted(set(cfg.layer_pattern))},
      lengths=jnp.zeros((batch_size,), jnp.int32),
      index=jnp.zeros((), jnp.int32),
  )


def from_prefill(cfg: ModelConfig, made: Any, segment_ids_BxP: jax.Array, new: int) -> Cache:
  """Builds the cache that follows right-aligned prompts.

  Args:
    made: keys and values of the prompts by group and layer, [R, B, K, P, H] each.
    new: maximum number of tokens N to decode; 0 for prompts that `admit` will copy.
  """
  prompt = segment_ids_BxP.shape[1]
  present = segment_ids_BxP != 0
  ranks_BxP = jnp.where(present, jnp.cumsum(present, axis=1, dtype=jnp.int32) - 1, -1)

  def lay_out(x, kind, axis, fill):
    n, fixed = layout(cfg, kind, prompt, new)
    if fixed:  # [prompt | ring of N]
      return _pad(x, axis, 0, new, fill)
    tail = jax.lax.slice_in_dim(x, max(prompt - n, 0), prompt, axis=axis)
    return _pad(tail, axis, n - tail.shape[axis], 0, fill)  # The oldest is overwritten first.

  def pair(kv, kind, repeats):
    kv = [x[0] if repeats == 1 else x for x in kv]
    return tuple(_constrain_kv(lay_out(x, kind, x.ndim - 2, 0)) for x in kv)

  def slots(kind):
    ranks = constrain(lay_out(ranks_BxP, kind, 1, -1), "batch", "sequence")
    return Slots(ranks, layout(cfg, kind, prompt, new)[1])

  return Cache(
      kv=tuple(
          tuple(pair(kv, kind, repeats) for kv, kind in zip(group, pattern, strict=True))
          for group, (pattern, repeats) in zip(made, cfg.groups, strict=True)
      ),
      slots={kind: slots(kind) for kind in sorted(set(cfg.layer_pattern))},
      lengths=jnp.sum(present, axis=1, dtype=jnp.int32),
      index=jnp.zeros((), jnp.int32),
  )


def admit(
    cfg: ModelConfig, cache: Cache, prompts: Cache, take: Callable[[jax.Array, int], jax.Array],
    new_B: jax.Array,
) -> Cache:
  """Replaces rows of a running cache by prefilled prompts.

  Args:
    cache: from `init_cache`, called with the number of prompt columns.
    prompts: from `from_prefill` with new=0; its rows differ from those of `cache`.
    take: (array, axis of the prompts) -> the array with a prompt for each of the B rows of
      `cache` on that axis.
    new_B: bool [B], the rows to replace; the output of `take` for other rows is ignored.
  """

  def put(x, source, kind, fill, rows=0, axis=1):
    n, fixed = x.shape[axis], cache.slots[kind].fixed
    source = take(source, rows)
    new = jnp.expand_dims(new_B, tuple(i for i in range(x.ndim) if i != rows))
    if fixed:
      old = jax.lax.slice_in_dim(x, 0, fixed, axis=axis)
      return jax.lax.dynamic_update_slice_in_dim(x, jnp.where(new, source, old), 0, axis)
    # Consecutive in the ring, ending just before the slot that is written next.
    source = _pad(source, axis, n - source.shape[axis], 0, fill)
    return jnp.where(new, jnp.roll(source, cache.index % n, axis=axis), x)

  def ranks(kind):
    slots = cache.slots[kind]
    emptied = jnp.where(new_B[:, None], -1, slots.ranks)
    return slots.replace(ranks=put(emptied, prompts.slots[kind].ranks, kind, -1))

  def put_kv(x, source, kind):
    return _constrain_kv(put(x, source, kind, 0, rows=x.ndim - 4, axis=x.ndim - 2))

  kv = tuple(
      tuple(
          tuple(put_kv(x, y, kind) for x, y in zip(*pair, strict=True))
          for *pair, kind in zip(group, source, pattern, strict=True)
      )
      for group, source, (pattern, _) in zip(cache.kv, prompts.kv, cfg.groups, strict=True)
  )
  return cache.replace(
      kv=kv,
      slots={kind: ranks(kind) for kind in cache.slots},
      lengths=jnp.where(new_B, take(prompts.lengths, 0), cache.lengths),
  )


def _pad(x, axis, before, after, fill):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (before, after)
  return jnp.pad(x, widths, constant_values=fill)


def advance(
    cache: Cache, segment_ids_BxT: jax.Array, window_of: Callable[[str], int]
) -> tuple[Cache, dict[str, jax.Array], dict[str, jax.Array]]:
  """Reserves slots for T more tokens per row; tokens of segment 0 are not stored.

  Returns:
    (cache, still without the new keys and values; by kind, the slots of the last new tokens,
    int32 [at most T]; by kind, the mask, bool [B, 1, T, S] for T = 1, else [B, 1, T, S + T]: the
    new tokens follow the old ones, see `store`).
  """
  tokens = segment_ids_BxT.shape[1]
  alive = segment_ids_BxT != 0
  rank_BxT = cache.lengths[:, None] + jnp.cumsum(alive, axis=1, dtype=jnp.int32) - 1
  rank_BxT = jnp.where(alive, rank_BxT, -1)
  column_T = cache.index + jnp.arange(tokens, dtype=jnp.int32)
  new_slots, targets, masks = {}, {}, {}
  for kind, slots in cache.slots.items():
    # If there are more new columns than the ring has slots, only the last ones are stored.
    kept = min(tokens, slots.ranks.shape[1] - slots.fixed)
    targets[kind] = slots.at(column_T[-kept:])
    ranks = _write(slots.ranks, rank_BxT[:, -kept:], targets[kind], axis=1)
    new_slots[kind] = slots.replace(ranks=ranks)
    seen_BxS = ranks if tokens == 1 else jnp.concatenate([slots.ranks, rank_BxT], axis=1)
    mask_BxTxS = (seen_BxS >= 0)[:, None, :] & (seen_BxS[:, None, :] <= rank_BxT[:, :, None])
    if window_of(kind):
      mask_BxTxS &= rank_BxT[:, :, None] - seen_BxS[:, None, :] < window_of(kind)
    masks[kind] = mask_BxTxS[:, None]
  lengths = cache.lengths + jnp.sum(alive, axis=1, dtype=jnp.int32)
  cache = cache.replace(slots=new_slots, lengths=lengths, index=cache.index + tokens)
  return cache, targets, masks


def _write(x, new, slot_T, axis):
  """Writes `new` to slots of `axis` of x, of any rank: a slice for one token, else a scatter."""
  if new.shape[axis] == 1:
    return jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), slot_T[0], axis)
  at = (slice(None),) * axis + (slot_T,)
  return x.at[at].set(new.astype(x.dtype), unique_indices=True)


def store(kv: Any, new: Any, layer: jax.Array, slot_T: jax.Array) -> tuple[Any, Any]:
  """Writes the new keys and values of one layer and returns those that its queries attend to.

  The scan over layers carries the cache of all repeats and updates it in place: only the new
  slots are written, and the other layers are not copied.

  Args:
    kv: (keys, values), [R, B, K, S, H], or [B, K, S, H] if the layer is not repeated.
    new: (keys, values), [B, K, T, H].
    layer: int32 [], index into R.
    slot_T: int32 [at most T], from `advance`: the slots of the last new tokens.

  Returns:
    (kv, (keys, values) to attend to). A single token is written first and then attends to the
    slots. Several tokens attend to the old slots followed by the new tokens, because in a ring
    the last of them may overwrite a slot that the first still sees.
  """
  one, alone = new[0].shape[2] == 1, kv[0].ndim == 4
  read = lambda x: x if alone else jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
  out, seen = [], []
  for x, y_BxKxTxH in zip(kv, new, strict=True):
    if one:
      if alone:
        x = _write(x, y_BxKxTxH, slot_T, axis=2)
      else:
        at = (layer, 0, 0, slot_T[0], 0)
        x = jax.lax.dynamic_update_slice(x, y_BxKxTxH[None].astype(x.dtype), at)
      seen.append(read(x))
    else:
      old_BxKxSxH = read(x)
      seen.append(jnp.concatenate([old_BxKxSxH, y_BxKxTxH.astype(x.dtype)], axis=2))
      new_BxKxSxH = _write(old_BxKxSxH, y_BxKxTxH[:, :, -slot_T.shape[0] :], slot_T, axis=2)
      x = new_BxKxSxH if alone else jax.lax.dynamic_update_index_in_dim(x, new_BxKxSxH, layer, 0)
    out.append(x)
  return tuple(out), tuple(seen)
