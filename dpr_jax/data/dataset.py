"""What a run is trained and evaluated on, from the `data` section of its config."""

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

from dpr_jax import fingerprints
from dpr_jax.config.sections import DataSection
from dpr_jax.data.demos import Demo, check_disjoint, split_holdout
from dpr_jax.data.formats import read_demos
from dpr_jax.data.loader import Prompts, make_prompts
from dpr_jax.data.packing import PackedRows, pack
from dpr_jax.data.records import data_files
from dpr_jax.data.tasks import SHORT_TASKS, get_task, make_demos, parse_tasks
from dpr_jax.data.templates import Example, encode_demo
from dpr_jax.paths import as_path

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

# The held-out prompts do not depend on the seed of the run: all seeds are evaluated on the same
# ones, and no seed trains on any of them.
HOLDOUT_SEED = 0


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Tokenised demonstrations and prompts; training and held-out prompts are disjoint."""

  demos: list[Demo]  # training demonstrations.
  examples: list[Example]  # the same, tokenised.
  rows: PackedRows  # the same, packed; for SFT.
  prompts: Prompts  # training prompts within the budget; for rollouts.
  heldout: Prompts  # prompts never trained on; for evaluation.
  benchmark: str  # kind of the benchmark that fits the demonstrations.
  summary: dict[str, Any]  # counts and origin, for config.json and the report.

  def arrays(self) -> dict[str, Any]:
    """All that is trained and evaluated on: arrays, or lists of arrays."""
    rows = self.rows
    return {
        "tokens": rows.tokens, "segment_ids": rows.segment_ids, "loss_mask": rows.loss_mask,
        "prompts": list(self.prompts.tokens), "heldout": list(self.heldout.tokens),
    }


def fingerprint(path: str | pathlib.Path) -> str:
  """blake2b of a file's content, 16 hex digits; of a folder, that of its data files in order."""
  if not as_path(path).is_dir():
    return fingerprints.of_file(path)
  return fingerprints.of_bytes("".join(map(fingerprint, data_files(path))).encode())


def split_demos(
    section: DataSection, seed: int
) -> tuple[list[Demo], list[Demo], str, dict[str, Any]]:
  """(demonstrations to train on, those held out, their benchmark, their origin) of a run."""
  if not section.demos:
    names = section.tasks or tuple(SHORT_TASKS)
    train = make_demos(
        names, section.num_demos, seed, corrupt=section.corrupt, corruption=section.corruption,
        minority=section.minority,
    )
    heldout = make_demos(
        names, section.holdout, HOLDOUT_SEED, split="heldout", minority=section.minority
    )
    long = any(get_task(name).trace for name in parse_tasks(names))
    summary = {"source": "built-in tasks", "tasks": list(names)}
    return train, heldout, "long_tasks" if long else "tasks", summary
  found = read_demos(
      section.demos, section.format, section.max_demos, section.on_empty, section.on_disorder,
      section.extra_fields,
  )
  train, heldout = split_holdout(found.demos, section.holdout, HOLDOUT_SEED)
  benchmark = "gsm8k" if found.format == "gsm8k" else "exact"
  summary = {
      "source": section.demos,
      "blake2b": fingerprint(section.demos),
      "format": found.format,
      "dropped_empty": found.dropped_empty,
      "dropped_disordered": found.dropped_disordered,
      "cut_off": sum(not demo.ended for demo in found.demos),
  }
  return train, heldout, benchmark, summary


def build_dataset(
    section: DataSection, tokenizer: "PreTrainedTokenizerFast", seed: int, prompts: bool = True
) -> Dataset:
  """Reads (or makes), splits, tokenises and packs.

  Args:
    seed: of the built-in tasks' training demonstrations and of the packing.
    prompts: whether something will be sampled; False leaves both lists of prompts empty, and then
      no demonstration need be held out.

  Raises:
    UserError: as the readers; naming file and line, or the field.
  """
  train, heldout, benchmark, summary = split_demos(section, seed)
  check_disjoint(train, heldout)
  examples = [encode_demo(demo, tokenizer, section.train_on, section.template) for demo in train]
  rows = pack(examples, section.row_length, section.overlong, seed)
  budget = (tokenizer, section.prompt_length, section.overlong_prompt, section.template)
  # What methods imitate and evaluation compares with is the last turn.
  own, held = (
      make_prompts([demo for demo in part if demo.trains_last], *budget) if prompts
      else Prompts([], [], 0)
      for part in (train, heldout)
  )
  summary |= {
      "demos": len(train),
      "rows": len(rows),
      "fill": round(rows.fill, 4),
      "trained_tokens": int(rows.loss_mask.sum()),
      "dropped_overlong": rows.dropped_overlong,
      "truncated": rows.truncated,
      "dropped_untrained": rows.dropped_untrained,
      "prompts": len(own.tokens),
      "dropped_prompts": own.dropped_overlong,
      "heldout": len(held.tokens),
      "dropped_heldout": held.dropped_overlong,
  }
  return Dataset(train, examples, rows, own, held, benchmark, summary)
