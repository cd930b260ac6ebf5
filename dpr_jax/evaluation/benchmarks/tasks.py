"""The built-in tasks, each with a checker of its own."""

import dataclasses

from dpr_jax.data.tasks import TASKS, verify
from dpr_jax.evaluation.benchmarks.base import Benchmark
from dpr_jax.evaluation.metrics import ACCURACY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks(Benchmark):
  """Whether the checker of the task accepts a response."""

  kind = "tasks"
  title = "built-in tasks"
  scores = {"accuracy": ACCURACY}
  max_new_tokens = 24

  def check(self, config):
    if config.data.demos:
      raise ValueError("tasks is of the built-in tasks; use exact or gsm8k with config.data.demos="
                       f"{config.data.demos}")

  def score(self, demo, text):
    return {"accuracy": float(verify(demo.task, demo.messages[0]["content"], text))}

  def groups(self, demo):
    return demo.task, "unique" if TASKS[demo.task].unique else "varied"
