"""The one training loop. It knows no algorithm: a step maps (state, batch) to (state, metrics), and
every stage (SFT, DPR, any other method) is such a step.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

import jax

from dpr_jax import sharding, signals
from dpr_jax.config.sections import CheckpointSection, LogSection, parse_steps
from dpr_jax.errors import StageEnded, Stopped
from dpr_jax.training.checkpoints import Checkpoints
from dpr_jax.training.metrics import MetricsWriter, read_until
from dpr_jax.training.profiling import trace_steps
from dpr_jax.training.steps import TrainState
from dpr_jax.training.stopping import last_step, write_stopped


class Batches(Protocol):
  """A batch source whose content is a pure function of (seed, step)."""

  def __iter__(self) -> Iterator[Any]: ...
  def __next__(self) -> Any: ...
  def get_state(self) -> dict[str, Any]: ...
  def set_state(self, state: dict[str, Any]) -> None: ...


class Step(Protocol):
  """An algorithm. It makes the states that it takes, so that the two always fit.

  It may end its stage by raising `StageEnded`: the state before that step is saved as the stage's
  last, and stopped.json says why; the stage stays as it is when it is run again.
  """

  def init(self, variables: Any, rng: jax.Array, frozen: Any = None) -> TrainState: ...
  def abstract(self, variables: Any, rng: jax.Array) -> TrainState: ...
  def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class Training:
  """What a stage trains: a step, what it is fed, and where it starts."""

  step: Step
  batches: Batches  # yields the whole batch; set to the restored position.
  start: Callable[[], Any]  # the trainable variables at step 0; called without a checkpoint only.
  abstract: Any  # their shapes and shardings.
  rng: jax.Array  # of the state.
  frozen: Any = None  # variables that are not trained.
  schedule: Callable[[int], Any] | None = None  # learning rate by step, to be logged.


@dataclasses.dataclass(frozen=True)
class Stage:
  """Where a stage runs, for how long, and what it keeps and logs."""

  name: str
  directory: pathlib.Path  # checkpoints/ and metrics.jsonl go here.
  mesh: jax.sharding.Mesh
  steps: int
  keep_steps: Sequence[int] = ()  # whose checkpoints are never deleted.
  checkpoint: CheckpointSection = CheckpointSection()
  log: LogSection = LogSection(tensorboard=False)
  tensorboard_dir: pathlib.Path | None = None
  profile_dir: pathlib.Path | None = None


def run_stage(stage: Stage, build: Callable[[], Training]) -> TrainState | None:
  """Runs a stage to its last step, from its newest checkpoint if it has one.

  Args:
    build: makes the training; not called if the stage is finished.

  Returns:
    The state after the last update, which is saved; None if the stage was finished before.

  Raises:
    Diverged: the loss or the gradient was not finite. Nothing of that step is saved.
    Stopped: a process got SIGTERM or SIGINT; the step that it had reached is saved.
  """
  updates = _updates(stage, build)
  while True:
    try:
      next(updates)
    except StopIteration as end:
      return end.value


def run_side_by_side(
    stages: Sequence[tuple[Stage, Callable[[], Training]]]
) -> list[TrainState | None]:
  """`run_stage` of stages whose meshes share no device, at the same time.

  They take their steps in turn: a step is only dispatched, so that all devices work at once.

  Raises:
    Diverged, Stopped: as `run_stage`; upon a signal each stage saves the step that it has reached.
  """
  out: list[TrainState | None] = [None] * len(stages)
  running = {i: _updates(*stage) for i, stage in enumerate(stages)}
  stopped = None
  with contextlib.ExitStack() as held:
    held.enter_context(signals.deferred())
    for updates in running.values():
      held.callback(updates.close)
    while running:
      for i, updates in list(running.items()):
        try:
          with jax.set_mesh(stages[i][0].mesh):
            next(updates)
        except StopIteration as end:
          out[i] = end.value
          del running[i]
        except Stopped as e:  # The others find the same signal after their next step.
          stopped = e
          del running[i]
    if stopped is not None:
      raise stopped
  return out


def _updates(
    stage: Stage, build: Callable[[], Training]
) -> Generator[None, None, TrainState | None]:
  """Makes a step of a stage each time that it is resumed; see `run_stage`."""
  directory, steps = stage.directory, stage.steps
  with Checkpoints(
      directory / "checkpoints", keep=stage.checkpoint.keep, keep_steps=stage.keep_steps
  ) as checkpoints:
    if (last := last_step(directory, steps)) in checkpoints.steps():
      read_until(directory / "metrics.jsonl", last, checkpoints.position(last).get("metrics"))
      return None
    training = build()
    step_fn, batches = training.step, training.batches
    restored = checkpoints.restore(
        step_fn.abstract(training.abstract, training.rng), training.frozen
    )
    known = None
    if restored is None:
      state, start = step_fn.init(training.start(), training.rng, training.frozen), 0
    else:
      state, position = restored
      start, known = int(state.step), position.pop("metrics", None)
      batches.set_state(position)
    due = {*stage.keep_steps, steps}
    writer = MetricsWriter(
        directory,
        stage=stage.name,
        steps=steps,
        start_step=start,
        fingerprint=known,
        every=stage.log.every,
        tensorboard_dir=stage.tensorboard_dir if stage.log.tensorboard else None,
        progress=stage.log.progress,
    )
    profiled = parse_steps(stage.log.profile_steps)
    with signals.deferred(), writer, trace_steps(profiled, stage.profile_dir) as trace:
      for step in range(start + 1, steps + 1):
        position = batches.get_state()
        try:
          with trace.step(step) as results:
            batch = sharding.place(next(batches), stage.mesh)
            state, metrics = step_fn(state, batch)
            results.append(state)
        except StageEnded as end:
          writer.flush()
          checkpoints.save(state, step - 1, {**position, "metrics": writer.fingerprint()})
          checkpoints.wait()
          write_stopped(directory, step - 1, steps, str(end))
          break
        if training.schedule is not None:
          metrics = {**metrics, "learning_rate": training.schedule(step - 1)}
        writer.write(step, metrics)
        signum = signals.reached()
        if step in due or step % stage.checkpoint.every == 0 or signum:
          # Metrics first: a step that is not finite raises here, and is not saved; and no
          # checkpoint is ahead of its metrics.
          writer.flush()
          position = {**batches.get_state(), "metrics": writer.fingerprint()}
          checkpoints.save(state, step, position)
        if signum:
          checkpoints.wait()
          raise Stopped(signum, f"{stage.name}: step {step} is saved")
        yield
      checkpoints.wait()
  return state
