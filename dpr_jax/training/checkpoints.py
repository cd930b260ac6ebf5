"""Checkpoints of a stage: the only file that imports Orbax.

A checkpoint of step s holds, atomically and together:
  variables   the trainable variables, readable on their own (as sft, as ref, for export)
  training    optimizer state and rng
  meta        JSON: step and the position of the data
Restoring goes against an abstract tree with explicit shardings, so that any mesh reads
any checkpoint. A save that was cut off leaves a temporary folder, which is ignored.
"""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dpr_jax.errors import UserError
from dpr_jax.training.steps import TrainState

logging.getLogger("absl").setLevel(logging.WARNING)

_policies = ocp.checkpoint_managers


class Checkpoints:
  """The checkpoints of one stage, in `directory`; a context manager."""

  def __init__(self, directory, *, keep: int = 1, keep_steps: Sequence[int] = (), read_only: bool = False):
    """Args: keep, latest checkpoints kept; keep_steps, steps kept for ever (milestones)."""
    self.directory = epath.Path(directory).absolute() if "://" not in str(directory) else epath.Path(directory)
    self._manager = ocp.CheckpointManager(
        self.directory,
        item_names=("variables", "training", "meta"),
        options=ocp.CheckpointManagerOptions(
            read_only=read_only,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            preservation_policy=_policies.AnyPreservationPolicy(
                [_policies.LatestN(keep), _policies.CustomSteps(tuple(keep_steps))]
            ),
        ),
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._manager.close()

  def steps(self) -> list[int]:
    """Steps that have a finished checkpoint, ascending."""
    return sorted(self._manager.all_steps())

  def save(self, state: TrainState, step: int, data_state: dict[str, Any]) -> None:
    """Starts saving (asynchronously) unless this step is there already."""
    if step in self._manager.all_steps():
      return
    self._manager.save(
        step,
        args=ocp.args.Composite(
            variables=ocp.args.StandardSave(state.trainable),
            training=ocp.args.StandardSave({"opt_state": state.opt_state, "rng": state.rng}),
            meta=ocp.args.JsonSave({"step": step, "data": data_state}),
        ),
    )

  def wait(self) -> None:
    self._manager.wait_until_finished()

  def restore(self, abstract: TrainState, frozen: Any = None) -> tuple[TrainState, dict[str, Any]] | None:
    """(state, data position) of the newest checkpoint, or None if there is none."""
    step = self._manager.latest_step()
    if step is None:
      return None
    out = self._manager.restore(
        step,
        args=ocp.args.Composite(
            variables=ocp.args.StandardRestore(abstract.trainable),
            training=ocp.args.StandardRestore({"opt_state": abstract.opt_state, "rng": abstract.rng}),
            meta=ocp.args.JsonRestore(),
        ),
    )
    state = TrainState(
        step=jax.device_put(jax.numpy.int32(step), abstract.step.sharding),
        trainable=out.variables,
        opt_state=out.training["opt_state"],
        rng=out.training["rng"],
        frozen=frozen or {},
    )
    return state, out.meta["data"]

  def restore_variables(self, step: int, abstract: Any) -> Any:
    """The variables of one checkpoint, cast and laid out like `abstract`.

    Raises:
      UserError: there is no finished checkpoint of that step.
    """
    if step not in self._manager.all_steps():
      raise UserError(
          f"{self.directory}: no checkpoint of step {step}; it holds {self.steps() or 'none'}"
      )
    return self._manager.restore(
        step, args=ocp.args.Composite(variables=ocp.args.StandardRestore(abstract))
    ).variables
