"""Checkpoints of a stage: the only file that imports Orbax.

A checkpoint of step s holds, atomically and together:
  variables   the trainable variables, readable on their own (as sft, as ref, for export)
  ema         their moving average, likewise, if the stage keeps one
  training    optimizer state, rng, and the scalars of the algorithm, if it has any
  meta        JSON with a checksum: step, the position of the data, fingerprints of all arrays
  files.json  sizes and fingerprints of the files
Restoring goes against an abstract tree with explicit shardings, so that any mesh reads
any checkpoint. A save that was cut off leaves a temporary folder, which is ignored.

No checkpoint is ever deleted because it cannot be read. One that is proved to be damaged
(a checksum differs, or its bytes cannot be decoded) is renamed, and an older one is taken.
Any other error may be that of the machine or of the network: reading is tried again, and
then refused with nothing changed. Several processes decide this together.
"""

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dpr_jax import fingerprints, peers, sharding
from dpr_jax.errors import UserError
from dpr_jax.paths import absolute, aside, in_bucket
from dpr_jax.training.integrity import changed_file, fingerprint, record_files, stored_dtypes
from dpr_jax.training.steps import TrainState
from dpr_jax.workdir import check_path

_policies = ocp.checkpoint_managers
_log = logging.getLogger(__name__)

RETRY_SECONDS = (0.2, 1.0, 4.0)  # waited before an error is read again.
_READ, _DAMAGED, _UNREADABLE = range(3)
# How TensorStore says that it read the bytes and could not decode them.
_DECODING = re.compile("DATA_LOSS|OUT_OF_RANGE: |Zstd-compressed stream|Data corruption detected")
# How it says that the disk, the network or the limits of the process are in the way.
_MACHINE = re.compile(
    "OS error|os_error_code|(UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED): "
)


class Damaged(RuntimeError):
  """A checkpoint does not give back what was saved."""


class DamagedCheckpoint(UserError):
  """A checkpoint that a run needs is damaged; `Checkpoints.set_aside` makes way for a new one."""

  def __init__(self, directory: Any, step: int, proof: str, earlier: bool = True):
    again = (
        "run the command of the run (python -m dpr_jax.main) again, which trains that step again "
        "from the checkpoint before it" if earlier else
        f"{aside(directory)} and run the command of the run (python -m dpr_jax.main) again, which "
        "trains the stage again"
    )
    super().__init__(
        f"{directory}: the checkpoint of step {step} cannot be read, for it is damaged ({proof}); "
        f"restore it from a copy, or {again}"
    )
    self.directory, self.step, self.proof, self.earlier = directory, step, proof, earlier


class Checkpoints:
  """The checkpoints of one stage, in `directory`; a context manager."""

  def __init__(
      self, directory, *, keep: int = 1, keep_steps: Sequence[int] = (), read_only: bool = False
  ):
    """Args: keep, latest checkpoints kept; keep_steps, steps never deleted (milestones)."""
    # Orbax logs every file it opens, and warns about what read_only means.
    logging.getLogger("absl").setLevel(logging.ERROR if read_only else logging.WARNING)
    self.directory = epath.Path(absolute(directory))
    if not read_only:
      check_path(self.directory)
    self._read_only, self._saving = read_only, 0
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
            async_options=ocp.AsyncOptions(post_finalization_callback=self._record_files),
        ),
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    with self._writing():
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
    meta = fingerprints.seal({"step": step, "data": data_state, "hashes": hashes})
    self.wait()  # The step before is recorded under its own number.
    self._saving = step
    with self._writing():
      saved = self._manager.save(
          step,
          args=ocp.args.Composite(
              meta=ocp.args.JsonSave(meta),
              **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
          ),
      )
    if not saved:
      raise RuntimeError(f"{self.directory}: step {step} was not saved; it holds {self.steps()}")

  def _record_files(self) -> None:
    """Called when all files of a save are written, just before their folder gets its name.

    In a bucket it has its name, but not yet the mark that it is finished.
    """
    if jax.process_index() == 0:
      name = str(self._saving) if in_bucket(self.directory) else f"{self._saving}.*tmp*"
      for folder in self.directory.glob(name):
        record_files(folder)

  def wait(self) -> None:
    """Returns when the save that was started is finished.

    Raises:
      UserError: it could not be written.
    """
    with self._writing():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Makes a UserError of what the machine refuses; TensorStore has no error of its own for it."""
    try:
      yield
    except Exception as e:
      if isinstance(e, OSError) or not _MACHINE.search(_whole_text(e)):
        raise
      raise UserError(
          f"{self.directory}: the checkpoint of step {self._saving} cannot be written "
          f"({_first_line(e)}); those before it are whole: rerun the same command to resume"
      ) from e

  def position(self, step: int) -> dict[str, Any]:
    """The data position of a checkpoint; {} if it cannot be read, as whoever restores it says."""
    out, decision, _ = self._try(lambda: self._meta(step)["data"])
    return out if decision == _READ else {}

  def set_aside(self, step: int) -> list[str]:
    """Renames a damaged checkpoint, and those of later steps, which are trained again after it.

    Returns:
      The new names. Called by every process.
    """
    names = []
    if jax.process_index() == 0:
      for other in reversed(self.steps()):  # The damaged one last: it is seen again until then.
        if other >= step:
          suffix = "damaged" if other == step else "replaced"
          names.append(fingerprints.set_aside(self.directory / str(other), suffix).name)
    sharding.barrier(f"set aside {step}")
    self._manager.reload()
    return names

  def _meta(self, step: int) -> dict[str, Any]:
    folder = self.directory / str(step)
    if found := changed_file(folder, ("meta",)):
      raise Damaged(found)
    try:
      meta = json.loads((folder / "meta" / "metadata").read_text())
      whole = fingerprints.is_whole(meta) or set(meta) == {"step", "data", "hashes"}
    except ValueError as e:  # No JSON, or no text.
      raise Damaged(f"meta: {e}") from None
    if not whole or meta["step"] != step:
      raise Damaged(f"meta is not what was saved for step {step}")
    return meta

  def _read(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
    """Items of a checkpoint; without any communication, so that one process may fail alone."""
    handler, folder = ocp.StandardCheckpointHandler(), self.directory / str(step)
    if found := changed_file(folder, items):  # Before Orbax falls over it.
      raise Damaged(found)
    return {
        name: handler.restore(folder / name, args=ocp.args.StandardRestore(tree))
        for name, tree in items.items()
    }

  def _restore(self, step: int, abstract: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """(meta, items) as this process reads them."""
    return self._meta(step), self._read(step, _items(abstract))

  def _try(self, read: Callable[[], Any]) -> tuple[Any, int, str]:
    """(what `read` gives, what all processes make of it, why); tried several times.

    Every process comes here, and every one leaves with the same decision.
    """
    out, decision, why = None, _READ, ""
    for seconds in (*RETRY_SECONDS, None):
      try:
        out, decision, why = read(), _READ, ""
        break
      except UserError:
        raise
      except Exception as e:  # Orbax and TensorStore raise what they like.
        why = str(e) if isinstance(e, Damaged) else _first_line(e)
        text = _whole_text(e)
        if isinstance(e, Damaged) or _DECODING.search(text) and not _MACHINE.search(text):
          decision = _DAMAGED
          break
        decision = _UNREADABLE
      if seconds is not None:
        time.sleep(seconds)
    worst, process = _agreed(decision)
    if worst > decision:
      why = f"process {process} could not read it, and says why"
    return out, worst, why

  def restore(
      self, abstract: TrainState, frozen: Any = None
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """(state, data position) of the newest checkpoint that is whole, or None if there is none.

    Newer ones that are damaged are logged, and renamed (unless read-only): their steps will be
    saved again.

    Raises:
      UserError: the newest cannot be read though nothing proves that it is damaged, or all are
        damaged. Nothing is changed then.
    """
    failed: dict[int, str] = {}
    for step in reversed(self.steps()):
      out, decision, why = self._try(lambda s=step: self._restore(s, abstract))
      if decision == _UNREADABLE:
        raise UserError(
            f"{self.directory}: no checkpoint of step {step} can be read into this model ({why}); "
            "nothing shows that it is damaged, and nothing was changed: run the same command "
            "again when the file system answers, with the model that was saved"
        )
      if decision == _READ:
        meta, items = out
        try:
          for name in items:
            _check(meta["hashes"][name], items[name])
        except Damaged as e:  # In every process: the fingerprint is of the whole arrays.
          decision, why = _DAMAGED, str(e)
      if decision == _DAMAGED:
        failed[step] = why
        continue
      for bad, proof in failed.items():
        _log.warning(
            "%s: the checkpoint of step %d is damaged (%s); going on from step %d",
            self.directory, bad, proof, step,
        )
      if failed and not self._read_only:
        self.set_aside(min(failed))
      training = items["training"]
      state = TrainState(
          step=jax.device_put(jax.numpy.int32(step), abstract.step.sharding),
          trainable=items["variables"],
          opt_state=training["opt_state"],
          rng=training["rng"],
          frozen=frozen or {},
          ema=items.get("ema", {}),
          control=training.get("control", {}),
      )
      return state, meta["data"]
    if failed:
      newest = max(failed)
      raise UserError(
          f"{self.directory}: no checkpoint of steps {sorted(failed)} can be read, for they are "
          f"damaged (step {newest}: {failed[newest]}); restore the folder from a copy, or start "
          f"the stage again: {aside(self.directory)} and run the same command"
      )
    return None

  def restore_variables(self, step: int, abstract: Any, part: str = "variables") -> Any:
    """The variables of one checkpoint, or their moving average, cast and laid out like `abstract`.

    Args:
      part: "variables" or "ema".

    Raises:
      UserError: there is no finished checkpoint of that step, or it has no such part, or it cannot
        be read.
      DamagedCheckpoint: it is damaged.
    """
    if step not in self._manager.all_steps():
      raise UserError(
          f"{self.directory}: no checkpoint of step {step}; it holds {self.steps() or 'none'}"
      )

    def read():
      hashes = self._meta(step)["hashes"]
      if part not in hashes:
        return None
      # In the dtype of the file, to be checked, and then cast leaf by leaf.
      like = stored_dtypes(hashes[part], abstract)
      return hashes[part], self._read(step, {part: like})[part]

    out, decision, why = self._try(read)
    if decision == _UNREADABLE:
      raise UserError(
          f"{self.directory}: the checkpoint of step {step} cannot be read into this model "
          f"({why}); nothing shows that it is damaged: try again when the file system answers"
      )
    if decision == _READ and out is None:
      raise UserError(
          f"{self.directory}: the stage kept no moving average of its weights; it does for a "
          "reference of kind ema"
      )
    try:
      if decision == _DAMAGED:
        raise Damaged(why)
      hashes, stored = out
      _check(hashes, stored)
    except Damaged as e:
      earlier = min(self.steps()) < step
      raise DamagedCheckpoint(self.directory, step, str(e), earlier) from None

    def cast(x, like):
      return x if x.dtype == like.dtype else jax.device_put(x.astype(like.dtype), like.sharding)

    return jax.tree.map(cast, stored, abstract)


def make_way(damaged: DamagedCheckpoint) -> None:
  """Sets a damaged checkpoint of a stage aside, so that the stage trains that step again.

  Raises:
    DamagedCheckpoint: there is no earlier one to go on from. Nothing is changed.
  """
  if not damaged.earlier:
    raise damaged
  with Checkpoints(damaged.directory) as checkpoints:
    names = checkpoints.set_aside(damaged.step)
  _log.warning(
      "%s: the checkpoint of step %d is damaged (%s); renamed to %s, and trained again",
      damaged.directory, damaged.step, damaged.proof, ", ".join(names),
  )


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


def _agreed(decision: int) -> tuple[int, int]:
  """The worst that any process has decided, and the first that has. All must call it."""
  if jax.process_count() == 1:
    return decision, 0
  from jax.experimental import multihost_utils

  with peers.waiting():
    found = np.reshape(multihost_utils.process_allgather(np.int32(decision)), -1)
  return int(found.max()), int(found.argmax())


def _whole_text(error: BaseException | None) -> str:
  """What an error and its causes say."""
  text = ""
  while error is not None:
    text, error = f"{text}\n{error}", error.__cause__ or error.__context__
  return text


def _first_line(error: Exception) -> str:
  name, text = type(error).__name__, (str(error).strip().splitlines() or [""])[0]
  if len(text) > 200:  # TensorStore begins with the status and ends with the reason.
    text = f"{text[:50]} ... {text[-145:]}"
  return f"{name}: {text}" if text else name
