"""What a built-in task is: prompts, right answers, and a checker."""

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Optional

from dpr_jax.errors import UserError

if TYPE_CHECKING:
  import random

  from dpr_jax.data.long_tasks import Trace


@dataclasses.dataclass(frozen=True)
class Task:
  """A kind of prompt. All text is ASCII, and within the limits of the file that declares it."""

  name: str
  unique: bool  # exactly one right answer.
  sample_prompt: Callable[["random.Random"], str]
  sample_answer: Callable[["random.Random", str], str]  # (rng, prompt) -> a right answer.
  verify: Callable[[str, str], bool]  # (prompt, response), exact: no trimming, no case folding.
  # (prompt, right answer) -> what someone answers who makes the same mistake every time.
  slip: Callable[[str, str], str]
  trace: Optional["Trace"] = None  # the steps of a task with a long answer.


def parser(name: str, pattern: str) -> Callable[[str], tuple[str, ...]]:
  """parse(prompt) -> the groups of `pattern` in a prompt of the task; UserError if it is none."""
  regex = re.compile(pattern)

  def parse(prompt: str) -> tuple[str, ...]:
    match = regex.fullmatch(prompt)
    if match is None:
      raise UserError(f"task {name}: {prompt[:40]!r} is not one of its prompts ({pattern})")
    return match.groups()

  return parse


def add_one(text: str) -> str:
  """The text with the number at its end one larger; a slip."""
  number = re.search(r"\d+$", text)[0]
  return text[: -len(number)] + str(int(number) + 1)


def swap_last(text: str) -> str:
  """The text with its last two letters exchanged, or where they are equal, the last one doubled."""
  if text[-1] == text[-2]:
    return text + text[-1]
  return text[:-2] + text[-1] + text[-2]
