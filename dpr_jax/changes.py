"""Another optimizer for a run that goes on, as --resume_with_changes asks for.

After a divergence the run continues from its last checkpoint with a lower learning rate, say. What
a finished stage was trained with stays as it is, and config.json keeps the history.
"""

import copy
import dataclasses
import datetime
from typing import Any

from dpr_jax import config as config_lib
from dpr_jax.agreement import agree
from dpr_jax.errors import UserError
from dpr_jax.sharding import barrier
from dpr_jax.training.stopping import last_step
from dpr_jax.workdir import Workdir


def _steps(workdir: Workdir, stage: str) -> list[int]:
  """The saved steps of a stage, ascending."""
  folder = workdir.stage(stage) / "checkpoints"
  names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
  return sorted(int(name) for name in names if name.isdecimal())


def _optimizers(config: config_lib.RunConfig) -> dict[str, tuple[str, int, Any]]:
  """Stage -> (path of its own optimizer in a config, steps, optimizer)."""
  out = {"sft": ("sft.optimizer", config.sft.steps, config.sft.optimizer)}
  for name, method in config.compared().items():
    if method.trained:
      budget = method.budget(config)
      for stage in method.stages(name):
        out[stage] = f"methods.{name}.optimizer", budget.steps, budget.optimizer
  return out


def _adopt(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
  """Gives the JSON of a config the optimizers of another; path -> [before, after] of changes."""
  changed = {}
  paths = [("sft",), ("budget",), *(("methods", name) for name in new.get("methods", {}))]
  for path in paths:
    a, b = old, new
    for name in (*path, "optimizer"):
      a, b = a.get(name), b.get(name)
      if not isinstance(a, dict) or not isinstance(b, dict):
        break
    else:
      for field in a.keys() & b.keys():
        if a[field] != b[field]:
          changed[f"config.{'.'.join(path)}.optimizer.{field}"] = [a[field], b[field]]
          a[field] = b[field]
  return dict(sorted(changed.items()))


def _accept(workdir: Workdir, config: config_lib.RunConfig) -> dict[str, Any] | None:
  """The config.json of one seed with its changes; None where there is none, or nothing changed."""
  if not workdir.config_file.exists():
    return None
  record = workdir.read_config()
  before = record.get("config", {})
  after = copy.deepcopy(before)
  changed = _adopt(after, config_lib.to_json(config))
  if found := config_lib.first_difference(after, config_lib.to_json(config)):
    raise UserError(f"--workdir={workdir.path}: --resume_with_changes takes another optimizer, and "
                    f"nothing else ({found}); use a new folder for that")
  if not changed:
    return None
  saved = {}
  old, new = _optimizers(config_lib.resolve(before)), _optimizers(config)
  for stage, (path, steps, optimizer) in new.items():
    saved[stage] = (_steps(workdir, stage) or [0])[-1]
    was = old[stage][2]
    if optimizer == was or not saved[stage]:
      continue
    if saved[stage] >= last_step(workdir.stage(stage), steps):
      raise UserError(f"--workdir={workdir.path}: {stage} is finished with another optimizer; "
                      f"change config.{path} of other stages only, or use a new folder")
    if bool(optimizer.max_grad_norm) != bool(was.max_grad_norm):
      raise UserError(f"config.{path}.max_grad_norm={optimizer.max_grad_norm}: {stage} has begun "
                      f"with {was.max_grad_norm}; clipping is not switched on or off in between")
  when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
  entry = {"when": when, "steps": saved, "fields": changed}
  return {**record, "config": after, "changes": [*record.get("changes", []), entry]}


def record_changes(root: Workdir, config: config_lib.RunConfig) -> None:
  """Writes what has changed to config.json, in the workdir of every seed that has begun.

  Raises:
    UserError: something else than an optimizer differs, a stage that needs it is finished, or the
      run is a sweep. Nothing is written.
  """
  if config.sweep.field:
    raise UserError("--resume_with_changes: the points of a sweep differ in one field; it goes on "
                    "as it began")
  parts = {root: config}
  if config.seeds > 1:
    for seed in range(config.seed, config.seed + config.seeds):
      part = dataclasses.replace(config, seed=seed, seeds=1)
      parts[Workdir(root.path / f"seed_{seed}")] = part
  # All have read, and accepted, before one writes.
  records = agree(lambda: {workdir: _accept(workdir, part) for workdir, part in parts.items()})
  for workdir, record in records.items():
    if record is not None:
      workdir.write_config(record)
  barrier("changed")
