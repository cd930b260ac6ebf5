"""Examples of many lengths -> rows of one length.

Packing is done once, before training: the rows are a plain array, so a batch
can be a pure function of (seed, step). Dims: R rows, T tokens of a row.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dpr_jax.data.templates import Example
from dpr_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PackedRows:
  """Packed demonstrations, and how many examples were packed, cut or dropped."""

  tokens: np.ndarray  # int32 [R, T], 0 where padded.
  segment_ids: np.ndarray  # int32 [R, T], 0 padding, 1, 2, ... the examples of a row.
  loss_mask: np.ndarray  # float32 [R, T], 1 where the token is trained.
  n_examples: int  # examples in the rows.
  dropped_overlong: int  # examples left out because they exceed T.
  truncated: int  # examples in the rows that were cut to T.
  dropped_untrained: int  # examples left out because no token of them is (or stays) trained.
  fill: float  # share of the R * T positions that hold a token.

  def __len__(self) -> int:
    return len(self.tokens)

  def first(self, n: int) -> "PackedRows":
    """The first n rows; the counts stay those of all."""
    keep = {name: getattr(self, name)[:n] for name in ("tokens", "segment_ids", "loss_mask")}
    return dataclasses.replace(self, **keep)


def _best_fit(lengths: np.ndarray, row_length: int, rng: np.random.Generator) -> list[list[int]]:
  """Best-fit decreasing: each example goes to the fullest row it fits into, longest first.

  The rows with r free positions are kept in stacks[r] and the set of non-empty stacks as bits of
  an integer, so that finding a row is a shift and a lowest-set-bit: linear in the examples.
  """
  order = rng.permutation(len(lengths))  # Ties in random order, so that mates in a row vary.
  order = order[np.argsort(-lengths[order], kind="stable")]
  rows, stacks, free = [], [[] for _ in range(row_length + 1)], 0
  for i in order.tolist():
    n = int(lengths[i])
    fitting = free >> n
    if fitting:
      room = n + (fitting & -fitting).bit_length() - 1
      row = stacks[room].pop()
      if not stacks[room]:
        free &= ~(1 << room)
    else:
      room, row = row_length, len(rows)
      rows.append([])
    rows[row].append(i)
    if room > n:
      stacks[room - n].append(row)
      free |= 1 << (room - n)
  return rows


def pack(
  examples: Sequence[Example],
  row_length: int,
  overlong: str = "drop",
  seed: int = 0,
  packed: bool = True,
) -> PackedRows:
  """Packs examples into rows of `row_length` tokens; the same inputs give the same rows.

  Args:
    overlong: an example longer than a row is left out ("drop"), cut at the end ("truncate"; its EOS
      is lost, so it does not teach to stop there), or refused ("error").
    seed: of the order of equally long examples and of the rows.
    packed: False gives every example a row of its own, in the order of `examples`.

  Raises:
    UserError: an overlong example under "error", an unknown `overlong`, or nothing left to train.
  """
  if overlong not in ("drop", "truncate", "error"):
    raise UserError(f"overlong={overlong!r} is unknown; known: drop, truncate, error")
  if row_length < 2:
    raise UserError(f"row_length={row_length} must be at least 2 (a token and the next)")
  if seed < 0:
    raise UserError(f"seed={seed} must be at least 0")
  kept, dropped_overlong, truncated, dropped_untrained = [], 0, 0, 0
  for example in examples:
    n = len(example.tokens)
    if n > row_length and overlong == "error":
      raise UserError(f"{example.source or 'example'}: {n} tokens exceed row_length={row_length}; "
                      "raise it, or set overlong to drop or truncate")
    if n > row_length and overlong == "drop":
      dropped_overlong += 1
    elif not example.loss_mask[:row_length].any():
      dropped_untrained += 1
    else:
      kept.append(example)
      truncated += n > row_length
  if not kept:
    raise UserError(
      f"no demonstration left to train on: {len(examples)} given, {dropped_overlong} longer than "
      f"row_length={row_length}, {dropped_untrained} without a trained token"
    )
  lengths = np.minimum([len(e.tokens) for e in kept], row_length)
  if packed:
    rng = np.random.default_rng(seed)
    rows = _best_fit(lengths, row_length, rng)
    rows = [rows[r] for r in rng.permutation(len(rows))]  # Else the rows begin with the longest.
  else:
    rows = [[i] for i in range(len(kept))]

  tokens = np.zeros((len(rows), row_length), np.int32)
  segment_ids = np.zeros((len(rows), row_length), np.int32)
  loss_mask = np.zeros((len(rows), row_length), np.float32)
  for r, members in enumerate(rows):
    start = 0
    for segment, i in enumerate(members, start=1):
      end = start + lengths[i]
      tokens[r, start:end] = kept[i].tokens[: lengths[i]]
      loss_mask[r, start:end] = kept[i].loss_mask[: lengths[i]]
      segment_ids[r, start:end] = segment
      start = end
  return PackedRows(
    tokens=tokens,
    segment_ids=segment_ids,
    loss_mask=loss_mask,
    n_examples=len(kept),
    dropped_overlong=dropped_overlong,
    truncated=int(truncated),
    dropped_untrained=dropped_untrained,
    fill=float(lengths.sum() / tokens.size),
  )
