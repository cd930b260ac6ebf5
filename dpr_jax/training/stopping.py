"""stopped.json in the folder of a stage that ended before its last step, and what it means.

    {"step": 40, "steps": 100, "reason": "..."}

The stage's result is its checkpoint of `step`. It is finished: a resumed run does not continue it.
"""

import json
import os
from typing import Any

import jax

from dpr_jax.paths import as_path, write_atomically

FILE = "stopped.json"


def read_stopped(directory: str | os.PathLike) -> dict[str, Any] | None:
  """The content of a stage's stopped.json, None if it did not end early."""
  path = as_path(directory) / FILE
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def last_step(directory: str | os.PathLike, steps: int) -> int:
  """The step of a stage's result: `steps`, unless it ended before."""
  stopped = read_stopped(directory)
  return stopped["step"] if stopped else steps


def write_stopped(directory: str | os.PathLike, step: int, steps: int, reason: str) -> None:
  """Records, atomically and from process 0, that a stage of `steps` ended after `step`."""
  if jax.process_index() == 0:
    record = {"step": step, "steps": steps, "reason": reason}
    write_atomically(as_path(directory) / FILE, json.dumps(record, indent=2) + "\n")
