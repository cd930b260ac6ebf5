"""Checkpoints of a stage: the only file that imports Orbax.

A checkpoint of step s holds, atomically and together:
  variables   the trainable variables, readable on their own (as sft, as ref, for export)
  ema         their moving average, likewise, if the stage keeps one
  training    optimizer state, rng, and the scalars of the algorithm, if it has any
  meta        JSON: step, the position of the data, and fingerprints of all arrays
Restoring goes against an abstract tree with explicit shardings, so that any mesh reads
any checkpoint. A save that was cut off leaves a temporary folder, which is ignored. A
finished checkpoint that cannot be read, or whose values are not those that were saved, is
passed over for an older one, with a warning.
"""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dpr_jax.errors import UserError
from dpr_jax.training.integrity import fingerprint, stored_dtypes
from dpr_jax.training.steps import TrainState

_policies = ocp.checkpoint_managers
_log = logging.getLogger(__name__)


class Damaged(RuntimeError):
  """A checkpoint does not give back what was saved."""


class Checkpoints:
  """The checkpoints of one stage, in `directory`; a context manager."""

  def __init__(
      self, directory, *, keep: int = 1, keep_steps: Sequence[int] = (), read_only: bool = False
  ):
    """Args: keep, latest checkpoints kept; keep_steps, steps never deleted (milestones)."""
    # Orbax logs every file it opens, and warns about what read_only means.
    logging.getLogger("absl").setLevel(logging.ERROR if read_only else logging.WARNING)
    self.directory = epath.Path(directory)
    if "://" not in str(directory):
      self.directory = self.directory.absolute()
    self._read_only = read_only
    self._manager = ocp.CheckpointManager(
        self.directory,
        item_names=("variables", "training", "ema", "meta"),
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
    """Starts saving (asynchronously) unless this step is saved already."""
    if step in self._manager.all_steps():
      return
    items = _items(state)
    hashes = {name: fingerprint(tree) for name, tree in items.items()}
    saved = self._manager.save(
        step,
        args=ocp.args.Composite(
            meta=ocp.args.JsonSave({"step": step, "data": data_state, "hashes": hashes}),
            **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
        ),
    )
    if not saved:
      raise RuntimeError(f"{self.directory}: step {step} was not saved; it holds {self.steps()}")

  def wait(self) -> None:
    self._manager.wait_until_finished()

  def _meta(self, step: int) -> dict[str, Any]:
    return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

  def _restore(
      self, step: int, abstract: TrainState, frozen: Any
  ) -> tuple[TrainState, dict[str, Any]]:
    meta = self._meta(step)
    items = _items(abstract)
    out = self._manager.restore(
        step,
        args=ocp.args.Composite(
            **{name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        ),
    )
    for name in items:
      _check(meta["hashes"][name], out[name])
    state = TrainState(
        step=jax.device_put(jax.numpy.int32(step), abstract.step.sharding),
        trainable=out.variables,
        opt_state=out.training["opt_state"],
        rng=out.training["rng"],
        frozen=frozen or {},
        ema=out.ema if abstract.ema else {},
        control=out.training.get("control", {}),
    )
    return state, meta["data"]

  def restore(
      self, abstract: TrainState, frozen: Any = None
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """(state, data position) of the newest checkpoint that is whole, or None if there is none.

    Newer ones that are damaged are logged, and removed (unless read-only): their steps will
    be saved again.

    Raises:
      UserError: there are checkpoints, and none can be read.
    """
    failed: dict[int, Exception] = {}
    for step in reversed(self.steps()):
      try:
        out = self._restore(step, abstract, frozen)
      except Exception as e:  # Orbax and TensorStore raise what they like for a torn file.
        if isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e):
          raise  # The file may be whole; it is the machine that is too small.
        failed[step] = e
        continue
      for bad, error in failed.items():
        _log.warning(
            "%s: the checkpoint of step %d is damaged (%s); going on from step %d",
            self.directory, bad, _first_line(error), step,
        )
        if not self._read_only:
          self._manager.delete(bad)
      return out
    if failed:
      newest = max(failed)
      raise UserError(
          f"{self.directory}: no checkpoint of steps {sorted(failed)} can be read into this model "
          f"(step {newest}: {_first_line(failed[newest])}); restore the folder from a copy, or "
          "remove it to start the stage again"
      )
    return None

  def restore_variables(self, step: int, abstract: Any, part: str = "variables") -> Any:
    """The variables of one checkpoint, or their moving average, cast and laid out like `abstract`.

    Args:
      part: "variables" or "ema".

    Raises:
      UserError: there is no finished checkpoint of that step, it has no such part, or it is
        damaged.
    """
    if step not in self._manager.all_steps():
      raise UserError(
          f"{self.directory}: no checkpoint of step {step}; it holds {self.steps() or 'none'}"
      )
    try:
      hashes = self._meta(step)["hashes"]
      if part == "ema" and part not in hashes:
        raise UserError(
            f"{self.directory}: the stage kept no moving average of its weights; it does for a "
            "reference of kind ema"
        )
      hashes = hashes[part]
      # In the dtype of the file, to be checked, and then cast leaf by leaf.
      stored = self._manager.restore(
          step,
          args=ocp.args.Composite(
              **{part: ocp.args.StandardRestore(stored_dtypes(hashes, abstract))}
          ),
      )[part]
      _check(hashes, stored)
    except UserError:
      raise
    except Exception as e:
      raise UserError(
          f"{self.directory}: the checkpoint of step {step} cannot be read into this model "
          f"({_first_line(e)}); restore the folder {step} from a copy, or remove it and run the "
          "stage again, which resumes from the checkpoint before it"
      ) from e

    def cast(x, like):
      return x if x.dtype == like.dtype else jax.device_put(x.astype(like.dtype), like.sharding)

    return jax.tree.map(cast, stored, abstract)


def _items(state: TrainState) -> dict[str, Any]:
  """What is saved of a state, by item; a stage that keeps no average has no such item."""
  training = {"opt_state": state.opt_state, "rng": state.rng}
  if state.control:
    training["control"] = state.control
  items = {"variables": state.trainable, "training": training}
  return {**items, "ema": state.ema} if state.ema else items


def _check(hashes: dict[str, str], restored: Any) -> None:
  """Raises Damaged where an array differs from the one that was saved."""
  now = fingerprint(restored)
  bad = sorted(path for path in {*hashes, *now} if hashes.get(path) != now.get(path))
  if bad:
    raise Damaged(f"{bad[0]} is not what was saved ({len(bad)} of {len(now)} arrays differ)")


def _first_line(error: Exception) -> str:
  text = str(error).strip().splitlines()
  return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
