"""The built-in tasks, each with a checker of its own."""

import dataclasses
from typing import ClassVar

from dpr_jax.config.fields import setting
from dpr_jax.data.dataset import HOLDOUT_SEED
from dpr_jax.data.tasks import SHORT_TASKS, TASKS, make_demos, verify, without_style
from dpr_jax.evaluation.benchmarks.base import Benchmark
from dpr_jax.evaluation.metrics import ACCURACY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks(Benchmark):
  """Whether the checker of the task accepts a response.

  Answers in brackets count where a share of the demonstrations has such answers.
  """

  kind = "tasks"
  title = "built-in tasks"
  scores = {"accuracy": ACCURACY}
  needs_data = False
  max_new_tokens = 24
  all_tasks: ClassVar[tuple[str, ...]] = tuple(SHORT_TASKS)
  tasks: tuple[str, ...] = setting(
      (), "names of built-in tasks, used in turn; () takes all short ones, or all long ones with "
      "long_tasks", choices=lambda: tuple(TASKS),
  )
  minority: float = setting(
      0.0, "share of the demonstrations with answers in brackets, as config.data.minority of a run",
      low=0, high=1,
  )

  def check(self, config):
    for name in ("tasks", "minority"):
      if getattr(self, name):
        raise ValueError(f"{name} is that of config.data.{name} in a run, and chosen here only for "
                         "python -m dpr_jax.evaluate")
    if config.data.demos:
      raise ValueError("tasks scores the built-in tasks only; use exact or gsm8k with "
                       f"config.data.demos={config.data.demos}")

  def read(self, path, limit=0):
    """The first held-out prompts of a run on these tasks; 256 unless `limit` says otherwise."""
    return make_demos(
        self.tasks or self.all_tasks, limit or 256, HOLDOUT_SEED, split="heldout",
        minority=self.minority,
    )

  def score(self, demo, text):
    right = verify(demo.task, demo.messages[0]["content"], self.answer(demo, text))
    return {"accuracy": float(right)}

  def wrong_demos(self, demos):
    return [not self.score(demo, demo.response)["accuracy"] for demo in demos]

  def groups(self, demo):
    return demo.task, "unique" if TASKS[demo.task].unique else "varied"

  def answer(self, demo, text):
    """The response, without brackets where the demonstrations may have them."""
    return without_style(text) if "minority" in demo.meta else text
