"""The built-in tasks whose answers are written step by step."""

import dataclasses

from dpr_jax.data.long_tasks import LONG_TASKS, MAX_LONG_ANSWER_BYTES
from dpr_jax.data.tasks import get_task
from dpr_jax.evaluation.benchmarks.tasks import Tasks
from dpr_jax.evaluation.metrics import Column


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongTasks(Tasks):
  """Whether the whole answer is right, how many of its steps are, and whether its result is.

  Each step is judged given the step before it as written, so one slip is one wrong step. A task
  with a short answer has one step, which is its result.
  """

  kind = "long_tasks"
  title = "built-in tasks with long answers"
  scores = {
      **Tasks.scores,
      "step_accuracy": Column("Right steps", "%", better=1, main=True),
      "result_accuracy": Column("Right result", "%", better=1, main=True),
  }
  max_new_tokens = MAX_LONG_ANSWER_BYTES + 1
  all_tasks = tuple(task.name for task in LONG_TASKS)

  def score(self, demo, text):
    scores = super().score(demo, text)
    trace = get_task(demo.task).trace
    if trace is None:
      return {name: scores["accuracy"] for name in self.scores}
    prompt, answer = demo.messages[0]["content"], self.answer(demo, text)
    return {
        **scores,
        "step_accuracy": trace.step_accuracy(prompt, answer),
        "result_accuracy": float(trace.right_result(prompt, answer)),
    }
