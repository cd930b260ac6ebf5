"""Packed rows against a naive reading of them."""

import numpy as np
import pytest

from dpr_jax.data.packing import PackedRows, pack
from dpr_jax.data.templates import Example
from dpr_jax.errors import UserError


def make_examples(rng: np.random.Generator, n: int, longest: int, trained: bool = True):
  """Examples whose tokens are unique over all of them, so that each can be found again."""
  examples, start = [], 1
  for i in range(n):
    length = int(rng.integers(1, longest + 1))
    tokens = np.arange(start, start + length, dtype=np.int32)
    mask = (rng.random(length) < 0.5).astype(np.float32)
    if trained:
      mask[rng.integers(length)] = 1  # at least one
    examples.append(Example(tokens, mask, source=f"e{i}"))
    start += length
  return examples


def unpack(rows: PackedRows) -> list[tuple[list[int], list[float]]]:
  """The examples of the rows, read position by position."""
  found = []
  for tokens, segments, mask in zip(rows.tokens, rows.segment_ids, rows.loss_mask):
    previous = None
    for token, segment, trained in zip(tokens.tolist(), segments.tolist(), mask.tolist()):
      if segment == 0:
        assert token == 0 and trained == 0
        previous = 0
        continue
      assert previous != 0, "a token follows padding"
      if segment != previous:
        assert segment == (previous or 0) + 1, "segments count 1, 2, ..."
        found.append(([], []))
        previous = segment
      found[-1][0].append(token)
      found[-1][1].append(trained)
  return found


def as_pairs(examples, cut=None):
  return sorted((e.tokens[:cut].tolist(), e.loss_mask[:cut].tolist()) for e in examples)


def test_the_first_rows_are_rows_of_their_own(rng):
  rows = pack(make_examples(rng, 60, 20), 20, seed=1)
  first = rows.first(3)
  assert len(first) == 3 and unpack(first) == unpack(rows)[: len(unpack(first))]
  assert first.n_examples == rows.n_examples == 60 and len(rows.first(10**6)) == len(rows)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_every_token_occurs_exactly_once(rng, seed, packed):
  row_length = int(rng.integers(8, 40))
  examples = make_examples(rng, 120, row_length)
  rows = pack(examples, row_length, seed=seed, packed=packed)
  assert sorted(unpack(rows)) == as_pairs(examples)
  assert (rows.n_examples, rows.dropped_overlong, rows.truncated, rows.dropped_untrained) == (
    120, 0, 0, 0)
  assert (rows.tokens.dtype, rows.segment_ids.dtype, rows.loss_mask.dtype) == (
    np.int32, np.int32, np.float32)
  assert rows.tokens.shape == rows.segment_ids.shape == rows.loss_mask.shape == (
    len(rows), row_length)
  total = sum(len(e.tokens) for e in examples)
  assert rows.fill == pytest.approx(total / (len(rows) * row_length), abs=1e-12)
  assert rows.fill == pytest.approx(float((rows.segment_ids > 0).mean()), abs=1e-12)
  if packed:
    # Best fit decreasing: never more than 11/9 of the fewest rows there can be, plus one.
    assert len(rows) <= 11 / 9 * -(-total // row_length) + 1
  else:
    assert unpack(rows) == [(e.tokens.tolist(), e.loss_mask.tolist()) for e in examples]


def test_rows_are_those_of_naive_best_fit_decreasing():
  """The same multiset of row fills as a quadratic search for the fullest row that fits."""
  for seed in range(20):
    rng = np.random.default_rng(seed)
    examples = make_examples(rng, 80, 30)
    free = []
    for n in sorted((len(e.tokens) for e in examples), reverse=True):
      fitting = [i for i, room in enumerate(free) if room >= n]
      if fitting:
        free[min(fitting, key=lambda i: free[i])] -= n
      else:
        free.append(32 - n)
    rows = pack(examples, 32, seed=seed)
    assert sorted((32 - (rows.segment_ids > 0).sum(axis=1)).tolist()) == sorted(free)


def test_the_same_inputs_give_the_same_rows_and_seeds_differ():
  examples = make_examples(np.random.default_rng(0), 200, 24)
  first, again, other = (pack(examples, 32, seed=s) for s in (5, 5, 6))
  for field in ("tokens", "segment_ids", "loss_mask"):
    np.testing.assert_array_equal(getattr(first, field), getattr(again, field))
  assert first.tokens.shape != other.tokens.shape or (first.tokens != other.tokens).any()
  # The order of the rows does not follow the length of their examples.
  longest = [max(np.bincount(s)[1:]) for s in first.segment_ids]
  assert longest != sorted(longest, reverse=True)


def test_overlong_examples():
  rng = np.random.default_rng(1)
  examples = make_examples(rng, 100, 40)
  long = [e for e in examples if len(e.tokens) > 20]
  short = [e for e in examples if len(e.tokens) <= 20]
  assert 20 < len(long) < 80
  rows = pack(examples, 20, overlong="drop")
  assert sorted(unpack(rows)) == as_pairs(short)
  assert (rows.n_examples, rows.dropped_overlong, rows.truncated) == (len(short), len(long), 0)

  rows = pack(examples, 20, overlong="truncate")
  cut = [e for e in examples if e.loss_mask[:20].any()]
  assert sorted(unpack(rows)) == as_pairs(cut, 20)
  untrained = len(examples) - len(cut)
  assert rows.truncated == sum(len(e.tokens) > 20 for e in cut)
  assert (rows.n_examples, rows.dropped_overlong, rows.dropped_untrained) == (
    len(cut), 0, untrained)

  with pytest.raises(UserError, match=rf"{long[0].source}: {len(long[0].tokens)} tokens exceed "
                                      "row_length=20"):
    pack(examples, 20, overlong="error")
  assert len(pack(short, 20, overlong="error")) > 0


def test_untrained_examples_are_counted():
  mask = np.asarray([0, 0, 0, 1, 1], np.float32)
  good = Example(np.asarray([1, 2, 3, 4, 5], np.int32), mask)
  cut_away = Example(np.asarray([6, 7, 8, 9, 10], np.int32), mask)  # trained beyond the cut
  never = Example(np.asarray([11, 12], np.int32), np.zeros(2, np.float32))
  rows = pack([good, never], 5)
  assert (rows.n_examples, rows.dropped_untrained) == (1, 1)
  rows = pack([Example(good.tokens[2:], mask[2:]), cut_away, never], 3, overlong="truncate")
  assert (rows.n_examples, rows.dropped_untrained, rows.truncated) == (1, 2, 0)
  assert unpack(rows) == [([3, 4, 5], [0, 1, 1])]


def test_errors():
  example = Example(np.asarray([1, 2, 3], np.int32), np.ones(3, np.float32))
  with pytest.raises(UserError, match="overlong='cut' is unknown; known: drop, truncate, error"):
    pack([example], 8, overlong="cut")
  with pytest.raises(UserError, match="row_length=1 must be at least 2"):
    pack([example], 1)
  with pytest.raises(UserError, match="seed=-1 must be at least 0"):
    pack([example], 8, seed=-1)
  with pytest.raises(UserError, match="no demonstration left to train on: 1 given, 1 longer than"):
    pack([example], 2)
  with pytest.raises(UserError, match="no demonstration left to train on: 0 given"):
    pack([], 2)
  silent = Example(example.tokens, np.zeros(3, np.float32))
  with pytest.raises(UserError, match="1 without a trained token"):
    pack([silent], 8)


def test_fifty_thousand_examples():
  rng = np.random.default_rng(2)
  lengths = np.clip(rng.lognormal(5, 0.7, 50_000), 4, 1024).astype(int)
  pool = np.arange(1, 1025, dtype=np.int32)
  ones = np.ones(1024, np.float32)
  examples = [Example(pool[:n], ones[:n]) for n in lengths]
  rows = pack(examples, 1024)
  assert rows.n_examples == 50_000
  assert (rows.segment_ids > 0).sum() == lengths.sum()
  assert rows.fill > 0.99
