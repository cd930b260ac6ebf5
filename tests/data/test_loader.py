"""Batches: a pure function of (seed, step), whatever the restarts."""

import json

import jax
import numpy as np
import pytest

from dpr_jax.data.demos import Demo
from dpr_jax.data.loader import (
  Batches,
  make_prompts,
  pad_prompts,
  prompt_batches,
  prompt_width,
  sft_batches,
)
from dpr_jax.data.packing import pack
from dpr_jax.data.templates import Example, encode_demo, render_prompt
from dpr_jax.errors import UserError
from dpr_jax.weights.byte_tokenizer import byte_tokenizer


def make_rows(n: int, row_length: int = 8, seed: int = 0):
  """n rows that differ from one another."""
  rng = np.random.default_rng(seed)
  examples = [
    Example(rng.integers(1, 1000, row_length).astype(np.int32), np.ones(row_length, np.float32))
    for _ in range(n)
  ]
  return pack(examples, row_length, packed=False)


def make_token_prompts(n: int, seed: int = 0):
  rng = np.random.default_rng(seed)
  return [rng.integers(1, 1000, int(rng.integers(1, 9))).astype(np.int32) for _ in range(n)]


def take(batches, n):
  return [next(batches) for _ in range(n)]


def assert_equal(a, b):
  a, b = jax.tree.leaves(a), jax.tree.leaves(b)
  assert len(a) == len(b) > 0
  for x, y in zip(a, b):
    assert x.dtype == y.dtype and x.shape == y.shape
    np.testing.assert_array_equal(x, y)


def sft_maker(**kwargs):
  return sft_batches(make_rows(21), 8, **kwargs)


def prompt_maker(**kwargs):
  return prompt_batches(make_token_prompts(21), 8, 8, **kwargs)


@pytest.mark.parametrize("maker", [sft_maker, prompt_maker])
def test_batches_are_a_function_of_seed_and_step(maker):
  want = take(maker(seed=3), 12)
  assert_equal(want, take(maker(seed=3), 12))
  with pytest.raises(AssertionError):
    assert_equal(want, take(maker(seed=4), 12))
  for step in (0, 1, 7, 11):
    assert_equal(want[step:], take(maker(seed=3, start_step=step), 12 - step))
  # Far away costs nothing and needs nothing before it.
  far = maker(seed=3, start_step=10**6)
  assert_equal(next(far), next(maker(seed=3, start_step=10**6)))
  assert far.get_state() == {"next_step": 10**6 + 1}


@pytest.mark.parametrize("maker", [sft_maker, prompt_maker])
def test_a_resumed_run_gets_the_batches_of_one_that_was_not(maker):
  want = take(maker(seed=5), 9)
  resumed = maker(seed=5)
  resumed.set_state(json.loads(json.dumps(take_and_state(maker(seed=5), 4))))
  assert_equal(want[4:], take(resumed, 5))


def take_and_state(batches, n):
  take(batches, n)
  return batches.get_state()


def test_state_can_move_back_and_forth_in_one_iterator():
  batches = sft_maker(seed=1)
  want = take(batches, 10)
  batches.set_state({"next_step": 2})
  assert_equal(want[2:5], take(batches, 3))
  batches.set_state({"next_step": np.int64(9)})
  assert_equal(want[9], next(batches))
  for bad in (None, {}, {"next_step": -1}, {"next_step": "3"}, {"next_step": 1.0},
              {"next_step": True}, 7):
    with pytest.raises(UserError, match="next_step"):
      batches.set_state(bad)


@pytest.mark.parametrize("n, batch_size", [(20, 4), (21, 8), (3, 8), (1, 4), (7, 7), (5, 1)])
def test_every_epoch_is_a_permutation_and_epochs_differ(n, batch_size):
  batches = Batches(lambda index: index, n, batch_size, seed=2)
  steps = 10 * n // batch_size + 1
  stream = np.concatenate(take(batches, steps))
  np.testing.assert_array_equal(
    stream, np.concatenate([batches.item_indices(s) for s in range(steps)]))
  epochs = stream[: 10 * n].reshape(10, n)
  for epoch in epochs:
    assert sorted(epoch.tolist()) == list(range(n))
  if n > 5:
    assert len({tuple(e) for e in epochs.tolist()}) == 10


def test_the_first_item_of_an_epoch_is_uniform():
  """Over 240 seeds: chi-square over 6 items, 5 degrees of freedom."""
  counts = np.zeros(6)
  for seed in range(240):
    counts[Batches(lambda i: i, 6, 1, seed=seed).item_indices(0)[0]] += 1
  assert ((counts - 40) ** 2 / 40).sum() < 20.5  # p = 0.001


def test_rows_are_handed_over_whole():
  rows = make_rows(13)
  batches = sft_batches(rows, 4, seed=0)
  for step in range(8):
    index = batches.item_indices(step)
    batch = next(batches)
    np.testing.assert_array_equal(batch.tokens, rows.tokens[index])
    np.testing.assert_array_equal(batch.segment_ids, rows.segment_ids[index])
    np.testing.assert_array_equal(batch.loss_mask, rows.loss_mask[index])


def test_prompts_are_handed_over_whole():
  prompts = make_token_prompts(11)
  batches = prompt_batches(prompts, 4, 8, seed=3)
  for step in range(6):
    index, batch = batches.item_indices(step), next(batches)
    for row, i in enumerate(index):
      n = batch.lengths[row]
      assert n == len(prompts[i])
      np.testing.assert_array_equal(batch.tokens[row, :n], prompts[i])
      assert not batch.tokens[row, n:].any()


def test_prompts_get_one_of_few_widths():
  assert {prompt_width(n, 400) for n in range(401)} == {100, 200, 300, 400}
  assert {prompt_width(n, 100) for n in range(101)} == {64, 100}
  assert {prompt_width(n, 7) for n in range(8)} == {7}
  assert all(n <= prompt_width(n, 333) <= 333 for n in range(334))
  with pytest.raises(UserError, match="101 tokens; prompt_length=100"):
    prompt_width(101, 100)


def test_a_batch_is_as_wide_as_its_longest_prompt_needs():
  prompts = make_token_prompts(9) + [np.arange(70, dtype=np.int32)]
  batches = prompt_batches(prompts, 2, 200, seed=3)
  seen = set()
  for step in range(10):
    index, batch = batches.item_indices(step), next(batches)
    longest = max(len(prompts[i]) for i in index)
    assert batch.tokens.shape == (2, 128 if longest == 70 else 64)
    seen.add(batch.tokens.shape[1])
  assert seen == {64, 128}


def test_pad_prompts():
  batch = pad_prompts([np.asarray([5, 6, 7]), np.asarray([], np.int32), np.asarray([8])], 4)
  np.testing.assert_array_equal(batch.tokens, [[5, 6, 7, 0], [0] * 4, [8, 0, 0, 0]])
  np.testing.assert_array_equal(batch.lengths, [3, 0, 1])
  assert batch.tokens.dtype == batch.lengths.dtype == np.int32
  assert pad_prompts([], 4).tokens.shape == (0, 4)
  with pytest.raises(UserError, match="prompt 1 has 3 tokens; prompt_length=2"):
    pad_prompts([np.asarray([1]), np.asarray([1, 2, 3])], 2)


def test_make_prompts():
  tokenizer = byte_tokenizer()
  demos = [Demo(({"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y"}),
                source=f"d:{n}") for n in (3, 9, 5, 20)]
  found = make_prompts(demos, tokenizer, 12, overlong="drop")
  assert found.dropped_overlong == 1 and [d.source for d in found.demos] == ["d:3", "d:9", "d:5"]
  for prompt, demo in zip(found.tokens, found.demos):
    np.testing.assert_array_equal(prompt, render_prompt(demo.prompt, tokenizer))
    np.testing.assert_array_equal(prompt, encode_demo(demo, tokenizer).tokens[: len(prompt)])
  with pytest.raises(UserError, match="d:20: 23 tokens exceed prompt_length=12"):
    make_prompts(demos, tokenizer, 12)
  with pytest.raises(UserError, match="no prompt left: 4 given, none within prompt_length=2"):
    make_prompts(demos, tokenizer, 2, overlong="drop")
  with pytest.raises(UserError, match="overlong='truncate' is unknown; known: error, drop"):
    make_prompts(demos, tokenizer, 12, overlong="truncate")


@pytest.mark.parametrize("kwargs, pattern", [
  ({"batch_size": 0}, "batch_size=0 must be at least 1"),
  ({"batch_size": -4}, "batch_size=-4 must be at least 1"),
  ({"batch_size": 4, "n_items": 0}, "no data to make batches from"),
  ({"batch_size": 4, "seed": -1}, "seed=-1 must be at least 0"),
  ({"batch_size": 4, "start_step": -1}, "next_step"),
])
def test_errors(kwargs, pattern):
  with pytest.raises(UserError, match=pattern):
    Batches(**{"gather": lambda i: i, "n_items": 9, "seed": 0, **kwargs})


def test_large_seeds_differ():
  streams = [np.concatenate([Batches(lambda i: i, 50, 10, seed=s).item_indices(t)
                             for t in range(5)]) for s in (0, 1, 2**31, 2**32, 2**63)]
  assert len({tuple(s) for s in streams}) == 5
