"""The one training loop. It knows no algorithm: a step function maps (state, batch) to
(state, metrics), and every stage (SFT, DPR, baselines) is such a function.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax

from dpr_jax import sharding
from dpr_jax.errors import Preempted, StageEnded
from dpr_jax.training.checkpoints import Checkpoints
from dpr_jax.training.metrics import MetricsWriter
from dpr_jax.training.profiling import trace_steps
from dpr_jax.training.steps import TrainState
from dpr_jax.training.stopping import last_step, write_stopped


class Batches(Protocol):
  """A batch source whose content is a pure function of (seed, step)."""

  def __iter__(self) -> Iterator[Any]: ...
  def __next__(self) -> Any: ...
  def get_state(self) -> dict[str, Any]: ...
  def set_state(self, state: dict[str, Any]) -> None: ...


def run_stage(
    name: str,
    step_fn: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]],
    *,
    make_state: Callable[[], TrainState],
    abstract: TrainState,
    batches: Batches,
    steps: int,
    directory,
    mesh: jax.sharding.Mesh,
    checkpoint_every: int,
    checkpoint_keep: int = 1,
    keep_steps: Sequence[int] = (),
    log_every: int = 1,
    progress: bool = True,
    tensorboard_dir=None,
    frozen: Any = None,
    schedule: Callable[[int], Any] | None = None,
    profile_steps: tuple[int, int] | None = None,
    profile_dir=None,
) -> TrainState:
  """Runs a stage to its last step, from its newest checkpoint if it has one.

  Args:
    name: of the stage, for logs.
    step_fn: the algorithm.
    make_state: the state at step 0; called only if there is no checkpoint.
    abstract: the state's shapes and shardings.
    batches: yields this process's rows of each batch; set to the restored position.
    directory: of the stage; checkpoints/ and metrics.jsonl go here.
    keep_steps: steps whose checkpoint is kept for ever.
    schedule: learning rate by step, to be logged.
    profile_steps: first and last step of a profiler trace, written to `profile_dir`.

  A step function may end the stage by raising `StageEnded`: the state before that step is saved
  as the stage's last, and stopped.json says why; the stage does not go on when it is run again.

  Returns:
    The state after `steps` updates, or where the stage ended; it is saved.

  Raises:
    Diverged: the loss or the gradient was not finite. Nothing of that step is saved.
    Preempted: a process got SIGTERM (in a distributed run); the step is saved.
  """
  with Checkpoints(
      directory / "checkpoints", keep=checkpoint_keep, keep_steps=keep_steps
  ) as checkpoints:
    restored = checkpoints.restore(abstract, frozen)
    if restored is None:
      state, start = make_state(), 0
    else:
      state, data_state = restored
      start = int(state.step)
      batches.set_state(data_state)
    if start >= last_step(directory, steps):
      return state
    due = {*keep_steps, steps}
    writer = MetricsWriter(
        directory,
        stage=name,
        steps=steps,
        start_step=start,
        every=log_every,
        tensorboard_dir=tensorboard_dir,
        progress=progress,
    )
    with writer, trace_steps(profile_steps, profile_dir) as trace:
      for step in range(start + 1, steps + 1):
        position = batches.get_state()
        try:
          with trace.step(step) as results:
            batch = sharding.place(next(batches), mesh)
            state, metrics = step_fn(state, batch)
            results.append(state)
        except StageEnded as end:
          writer.flush()
          checkpoints.save(state, step - 1, position)
          checkpoints.wait()
          write_stopped(directory, step - 1, steps, str(end))
          break
        if schedule is not None:
          metrics = {**metrics, "learning_rate": schedule(step - 1)}
        writer.write(step, metrics)
        preempted = checkpoints.reached_preemption(step)
        if step in due or step % checkpoint_every == 0 or preempted:
          # Metrics first: a step that is not finite raises here, and is not saved; and no
          # checkpoint is ahead of its metrics.
          writer.flush()
          checkpoints.save(state, step, batches.get_state())
        if preempted:
          checkpoints.wait()
          raise Preempted(f"{name}: told to end; step {step} is saved, the same command goes on")
    checkpoints.wait()
  return state
