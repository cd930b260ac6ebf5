"""A jax.profiler trace of a few steps of a stage, for TensorBoard or xprof."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from dpr_jax.paths import Mirror, Path


class StepTrace:
  """Starts and stops the trace of steps first..last of one stage; see `trace_steps`."""

  def __init__(self, steps: tuple[int, int] | None, directory: Path | None):
    self.first, self.last = steps or (1, 0)
    self.directory, self.active, self.stack = directory, False, contextlib.ExitStack()

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[list[Any]]:
    """Around one step; append to the list it yields what must be ready before the trace ends."""
    results: list[Any] = []
    inside = self.first <= number <= self.last
    if not inside:
      yield results
      return
    if not self.active:  # At `first`, or where a resumed stage begins.
      place = self.stack.enter_context(Mirror(self.directory))  # It knows disks alone.
      place.mkdir(parents=True, exist_ok=True)
      jax.profiler.start_trace(place)
      self.active = True
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield results
    if number == self.last:
      jax.block_until_ready(results)
      self.stop()

  def stop(self) -> None:
    if self.active:
      self.active = False
      jax.profiler.stop_trace()
      self.stack.close()


@contextlib.contextmanager
def trace_steps(
    steps: tuple[int, int] | None, directory: Path | None
) -> Iterator[StepTrace]:
  """Yields a `StepTrace` that ends with the block: a stage may end, or fail, before `last`.

  Args:
    steps: first and last step traced, counted from 1; None traces nothing.
    directory: where the profile goes; made when the first of the steps begins.
  """
  trace = StepTrace(steps, directory)
  try:
    yield trace
  finally:
    trace.stop()
