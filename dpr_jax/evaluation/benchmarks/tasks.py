"""The built-in tasks, each with a checker of its own."""

import dataclasses

from dpr_jax.config.fields import setting
from dpr_jax.data.dataset import HOLDOUT_SEED
from dpr_jax.data.tasks import TASKS, make_demos, verify
from dpr_jax.evaluation.benchmarks.base import Benchmark
from dpr_jax.evaluation.metrics import ACCURACY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks(Benchmark):
  """Whether the checker of the task accepts a response."""

  kind = "tasks"
  title = "built-in tasks"
  scores = {"accuracy": ACCURACY}
  needs_data = False
  max_new_tokens = 24
  tasks: tuple[str, ...] = setting(
      (), "names of data/tasks.py, used in turn; () takes all", choices=lambda: tuple(TASKS)
  )

  def check(self, config):
    if self.tasks:
      raise ValueError("tasks are those of config.data.tasks in a run, and chosen here only for "
                       "python -m dpr_jax.evaluate")
    if config.data.demos:
      raise ValueError("tasks scores the built-in tasks only; use exact or gsm8k with "
                       f"config.data.demos={config.data.demos}")

  def read(self, path, limit=0):
    """The first held-out prompts of a run on these tasks; 256 unless `limit` says otherwise."""
    return make_demos(self.tasks or tuple(TASKS), limit or 256, HOLDOUT_SEED, split="heldout")

  def score(self, demo, text):
    return {"accuracy": float(verify(demo.task, demo.messages[0]["content"], text))}

  def groups(self, demo):
    return demo.task, "unique" if TASKS[demo.task].unique else "varied"
