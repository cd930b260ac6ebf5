"""Demonstrations: files and built-in tasks -> tokens and masks -> packed, endless batches."""

from dpr_jax.data.batches import PromptBatch, SFTBatch
from dpr_jax.data.demos import Demo, check_disjoint, prompt_key, split_holdout
from dpr_jax.data.formats import FORMATS, DemoSet, read_demos, read_prompts
from dpr_jax.data.loader import (
  Batches,
  Prompts,
  make_prompts,
  pad_prompts,
  prompt_batches,
  sft_batches,
)
from dpr_jax.data.packing import PackedRows, pack
from dpr_jax.data.records import iter_records
from dpr_jax.data.tasks import TASKS, Task, get_task, make_demos, verify
from dpr_jax.data.templates import (
  Example,
  encode_demo,
  encode_response,
  render_prompt,
  stop_ids,
)

__all__ = [
  "FORMATS", "TASKS", "Batches", "Demo", "DemoSet", "Example", "PackedRows", "PromptBatch",
  "Prompts", "SFTBatch", "Task", "check_disjoint", "encode_demo", "encode_response", "get_task",
  "iter_records", "make_demos", "make_prompts", "pack", "pad_prompts", "prompt_batches",
  "prompt_key", "read_demos", "read_prompts", "render_prompt", "sft_batches", "split_holdout",
  "stop_ids", "verify",
]
