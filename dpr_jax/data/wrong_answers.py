"""Kinds of wrong demonstrations: how an answer of a built-in task is made wrong.

A kind makes of (rng, task, prompt, right answer) an answer that the checker of the task refuses, or
None where this prompt has none. Each tries a bounded number of answers.
"""

import dataclasses
import functools
import random
from collections.abc import Callable, Mapping

from dpr_jax.data.task import Task
from dpr_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of wrong demonstrations."""

  label: str  # what demonstrations are, in the report.
  make: Callable[[random.Random, Task, str, str], str | None] | None  # None: they are right.


_ATTEMPTS = 20_000  # other prompts whose answers are tried.
_PROBES = 20  # prompts after which a task counts as one without wrong answers of a kind.


def _answer(rng: random.Random, task: Task, prompt: str, answer: str) -> str | None:
  """A right answer to another prompt of the task."""
  for _ in range(_ATTEMPTS):
    other = task.sample_answer(rng, task.sample_prompt(rng))
    if not task.verify(prompt, other):
      return other
  return None


def _token(rng: random.Random, task: Task, prompt: str, answer: str) -> str | None:
  """One character replaced, by one of its class that the task's answers have, where that is wrong.

  Only where no such character makes the answer wrong is one of another class taken.
  """
  choices = [(i, c) for i, old in enumerate(answer) for c in _alphabet(task) if c != old]
  rng.shuffle(choices)
  choices.sort(key=lambda choice: _class(answer[choice[0]]) != _class(choice[1]))  # Stable.
  changed = (answer[:i] + c + answer[i + 1 :] for i, c in choices)
  return next((text for text in changed if not task.verify(prompt, text)), None)


def _truncated(rng: random.Random, task: Task, prompt: str, answer: str) -> str | None:
  """Cut short, by at least one character, with at least one left."""
  ends = rng.sample(range(1, len(answer)), len(answer) - 1)
  return next((answer[:n] for n in ends if not task.verify(prompt, answer[:n])), None)


def _slip(rng: random.Random, task: Task, prompt: str, answer: str) -> str | None:
  """The mistake that the task declares, the same every time."""
  wrong = task.slip(prompt, answer)
  return None if task.verify(prompt, wrong) else wrong


def _step(rng: random.Random, task: Task, prompt: str, answer: str) -> str | None:
  """One step wrong, and all that follows consistent with it."""
  return task.trace and task.trace.with_wrong_step(rng, prompt, answer)


REPEATED = "repeated"  # copies of few demonstrations; `tasks.make_demos` makes them.
KINDS: Mapping[str, Kind] = {
    "answer": Kind("with a wrong answer", _answer),
    "token": Kind("with one wrong character", _token),
    "truncated": Kind("cut short", _truncated),
    "slip": Kind("with the same mistake every time", _slip),
    "step": Kind("with one wrong step", _step),
    REPEATED: Kind("copies of few demonstrations", None),
}


def wrong_answer(
    kind: str, rng: random.Random, task: Task, prompt: str, answer: str
) -> str | None:
  """`answer` made wrong; None where this prompt has no wrong answer of that kind."""
  wrong = KINDS[kind].make(rng, task, prompt, answer)
  assert wrong is None or not task.verify(prompt, wrong)
  return wrong


@functools.cache
def check_kind(kind: str, task: Task) -> None:
  """Raises UserError, naming both, where no answer of the task can be wrong in this way."""
  if kind == "step" and task.trace is None:
    raise UserError(f"task {task.name}: corruption='step' needs a task whose answers have steps")
  rng = random.Random(f"{kind}/{task.name}")
  prompts = [task.sample_prompt(rng) for _ in range(_PROBES)]
  if KINDS[kind].make and all(
      wrong_answer(kind, rng, task, prompt, task.sample_answer(rng, prompt)) is None
      for prompt in prompts
  ):
    raise UserError(f"task {task.name}: corruption={kind!r} makes none of its answers wrong; "
                    "choose another kind, or leave the task out")


@functools.cache
def _alphabet(task: Task) -> tuple[str, ...]:
  """The characters of the task's answers."""
  rng = random.Random(f"alphabet/{task.name}")
  answers = (task.sample_answer(rng, task.sample_prompt(rng)) for _ in range(200))
  return tuple(sorted({c for answer in answers for c in answer}))


def _class(character: str) -> str:
  if character.isdigit():
    return "digit"
  return "other" if not character.isalpha() else "upper" if character.isupper() else "lower"
