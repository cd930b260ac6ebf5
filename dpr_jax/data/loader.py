"""Rows and prompts -> endless batches.

A batch is a pure function of (seed, step): Grain shuffles and repeats by random
access, so a resumed run needs nothing but its step. Every process makes the
whole batch, a few copies out of memory, and `sharding.place` keeps the rows its
devices hold, whatever the layout of the mesh; so a batch cannot depend on the
number of processes. Prefetching happens in threads and changes nothing. Arrays
stay on the host.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

from dpr_jax.data.batches import PromptBatch, SFTBatch
from dpr_jax.data.demos import Demo
from dpr_jax.data.packing import PackedRows
from dpr_jax.data.templates import render_prompt
from dpr_jax.errors import UserError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

BatchT = TypeVar("BatchT")

_THREADS, _PREFETCH = 2, 8  # Assembling a batch is a few copies: more threads only cost.


class Batches(Generic[BatchT]):
  """Endless, resumable iterator over global batches.

  The whole state is the step of the next batch. Every item occurs once per epoch, in an order that
  changes from epoch to epoch; batches run across the border of epochs.
  """

  def __init__(
    self,
    gather: Callable[[np.ndarray], BatchT],
    n_items: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
  ):
    """Args:
      gather: item indices, int64 [batch_size] -> batch. Called from other threads.
      n_items: number of items.
      batch_size: rows of the global batch.
    """
    import grain  # Takes a second to import: only who iterates pays for it.

    if n_items < 1:
      raise UserError("no data to make batches from; expected at least one item")
    if seed < 0:
      raise UserError(f"seed={seed} must be at least 0")
    if batch_size < 1:
      raise UserError(f"batch_size={batch_size} must be at least 1")
    items = grain.MapDataset.range(n_items).seed(seed).shuffle().repeat()
    # Endless, so nothing remains; and a length rounded up would not fit an integer at batch size 1.
    self._rows = items.batch(batch_size, drop_remainder=True).map(np.asarray)
    self._batches = self._rows.map(gather).to_iter_dataset(
      grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCH)
    )
    self._next_step = 0
    self._iterator = None
    self.set_state({"next_step": start_step})

  def __iter__(self) -> Iterator[BatchT]:
    return self

  def __next__(self) -> BatchT:
    if self._iterator is None:
      # A fresh one per restart: its threads start here, after the step is known.
      self._iterator = iter(self._batches)
      self._iterator.set_state({"next_index": self._next_step})
    batch = next(self._iterator)
    self._next_step += 1
    return batch

  def item_indices(self, step: int) -> np.ndarray:
    """Which items fill the rows at `step`; int64 [batch_size]. Does not move the iterator."""
    return self._rows[step]

  def get_state(self) -> dict[str, int]:
    """{"next_step": step of the batch that `next` would return}; JSON."""
    return {"next_step": self._next_step}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues at `state["next_step"]`, also one written under another process count."""
    step = state.get("next_step") if isinstance(state, dict) else None
    if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 0:
      raise UserError(f"data state {state!r} is not {{'next_step': step >= 0}}")
    self._next_step = int(step)
    self._iterator = None


def sft_batches(
  rows: PackedRows, batch_size: int, seed: int, start_step: int = 0
) -> Batches[SFTBatch]:
  """Endless batches of packed rows, [batch_size, T] each."""

  def gather(index_B: np.ndarray) -> SFTBatch:
    return SFTBatch(
      tokens=rows.tokens[index_B],
      segment_ids=rows.segment_ids[index_B],
      loss_mask=rows.loss_mask[index_B],
    )

  return Batches(gather, len(rows), batch_size, seed, start_step)


def pad_prompts(prompts: Sequence[np.ndarray], prompt_length: int) -> PromptBatch:
  """Left-aligns prompts in int32 [len(prompts), prompt_length]; an empty one is a filler row.

  Raises:
    UserError: a prompt is longer than `prompt_length`.
  """
  tokens = np.zeros((len(prompts), prompt_length), np.int32)
  lengths = np.asarray([len(p) for p in prompts], np.int32)
  for i, prompt in enumerate(prompts):
    if len(prompt) > prompt_length:
      raise UserError(f"prompt {i} has {len(prompt)} tokens; prompt_length={prompt_length} "
                      "must be at least that")
    tokens[i, : len(prompt)] = prompt
  return PromptBatch(tokens=tokens, lengths=lengths)


_WIDTHS, _LEAST_WIDTH = 4, 64


def prompt_width(longest: int, limit: int) -> int:
  """Columns for prompts of at most `longest` tokens, up to `limit`: one of few widths.

  A program is compiled for each width, and its KV cache is as wide: at most 4 of them, in steps
  of 64 columns at least.

  Raises:
    UserError: a prompt is longer than `limit`.
  """
  if longest > limit:
    raise UserError(f"a prompt has {longest} tokens; prompt_length={limit} must be at least "
                    "that")
  step = max(-(-limit // _WIDTHS), _LEAST_WIDTH)
  return min(limit, max(1, -(-longest // step)) * step)


def prompt_batches(
  prompts: Sequence[np.ndarray],
  batch_size: int,
  prompt_length: int,
  seed: int,
  start_step: int = 0,
) -> Batches[PromptBatch]:
  """Endless batches of prompts, each once: the rollout step repeats what it has prefilled.

  `batch_size` counts prompts of the global batch. A batch has one of few widths, that of its
  longest prompt (see `prompt_width`). `Batches.item_indices(step)` tells which prompt
  a row holds, for verifiers.

  Raises:
    UserError: a prompt is longer than `prompt_length`.
  """
  padded = pad_prompts(prompts, prompt_length)

  def gather(index_B: np.ndarray) -> PromptBatch:
    lengths_B = padded.lengths[index_B]
    width = prompt_width(int(lengths_B.max()), prompt_length)
    return PromptBatch(tokens=padded.tokens[index_B, :width], lengths=lengths_B)

  return Batches(gather, len(prompts), batch_size, seed, start_step)


class Prompts(NamedTuple):
  """Tokenised prompts, aligned with the demonstrations that they come from."""

  tokens: list[np.ndarray]  # int32 [P_i] each
  demos: list[Demo]
  dropped_overlong: int


def make_prompts(
  demos: Sequence[Demo],
  tokenizer: "PreTrainedTokenizerFast",
  prompt_length: int,
  overlong: str = "error",
  template: str = "",
) -> Prompts:
  """Tokenises the prompts of demonstrations (all messages before the last assistant turn).

  Args:
    overlong: a prompt of more than `prompt_length` tokens is refused ("error") or left out
      ("drop"). It is never cut: a cut prompt is another question.

  Raises:
    UserError: an overlong prompt, naming its source and length; nothing left; or as
      `render_prompt`.
  """
  if overlong not in ("error", "drop"):
    raise UserError(f"overlong={overlong!r} is unknown; known: error, drop")
  tokens, kept = [], []
  for demo in demos:
    prompt = render_prompt(demo.prompt, tokenizer, template, source=demo.source)
    if len(prompt) <= prompt_length:
      tokens.append(prompt)
      kept.append(demo)
    elif overlong == "error":
      raise UserError(f"{demo.source or 'prompt'}: {len(prompt)} tokens exceed "
                      f"prompt_length={prompt_length}; raise it, or drop overlong prompts")
  if not kept:
    raise UserError(f"no prompt left: {len(demos)} given, none within "
                    f"prompt_length={prompt_length}")
  return Prompts(tokens, kept, len(demos) - len(kept))
