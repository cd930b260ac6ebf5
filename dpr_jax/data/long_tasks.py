"""Built-in tasks with long answers: every step is written down, 20 to 80 tokens with EOS.

An answer is a sequence of lines, separated by ';'. What may follow a line is a function of the
prompt, the number of lines so far and that line alone, so each line can be judged given the one
before it *as written*: an answer with one slip that is right otherwise has one wrong step, and in
general a wrong result. Where several lines may follow, one is sampled uniformly.

  scratchpad  sum 03 05 01 04           08;09;13            numbers added one after another
  bubble      bubble dcba               cdba;cbda;...       two neighbours in wrong order exchanged
  edits       edit db.a. del b put f    d..a.;df.a.         a letter taken out, put into any free
                                                            slot, or exchanged with another
  program     run 3 5 a+2 b-1 b=a       5 5;5 4;5 5         values of a and b after each statement

What a line depends on stands at a fixed distance before it (but in the first line): a decoder of
half a million parameters learns to copy from a distance long before it learns to count or search.
"""

import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Callable, Sequence

from dpr_jax.data.task import Task, add_one, parser, swap_last

MAX_LONG_PROMPT_BYTES, MAX_LONG_ANSWER_BYTES = 40, 79
SEPARATOR = ";"
_LETTERS = "abcdef"
_FREE = "."  # a slot of a list.


@dataclasses.dataclass(frozen=True)
class Trace:
  """How a long answer is written and judged, line by line."""

  # (prompt, number of lines so far, the last one, "" before the first) -> all lines that may
  # follow: () where the answer is complete, None where the last line cannot be read.
  following: Callable[[str, int, str], Sequence[str] | None]
  # A right line -> lines that look like it and can be gone on from; some may be right as well.
  alike: Callable[[str], Sequence[str]]

  def complete(self, rng: random.Random, prompt: str, lines: Sequence[str] = ()) -> list[str]:
    """`lines` and what follows from the last of them, to the end; a random choice at each line."""
    lines = list(lines)
    while options := self.following(prompt, len(lines), lines[-1] if lines else ""):
      lines.append(rng.choice(options))
    return lines

  def right_steps(self, prompt: str, response: str) -> list[bool]:
    """Of each line, whether it follows from the one before it as written; False of missing lines.

    Those are missing that would follow from the last line, or where it cannot be read, those that
    a right answer has more.
    """
    lines = response.split(SEPARATOR)
    right = [
        line in (self.following(prompt, i, before) or ())
        for i, (before, line) in enumerate(zip(["", *lines], lines))
    ]
    unread = self.following(prompt, len(lines), lines[-1]) is None
    whole = self.complete(random.Random(0), prompt, () if unread else lines)
    return right + [False] * (len(whole) - len(lines))

  def step_accuracy(self, prompt: str, response: str) -> float:
    """The share of right lines."""
    right = self.right_steps(prompt, response)
    return sum(right) / len(right)

  def verify(self, prompt: str, response: str) -> bool:
    """Whether all lines are right, and none is missing."""
    return all(self.right_steps(prompt, response))

  def right_result(self, prompt: str, response: str) -> bool:
    """Whether the last line is that of a right answer, whatever precedes it."""
    return response.split(SEPARATOR)[-1] in _last_lines(self.following, prompt)

  def with_wrong_step(self, rng: random.Random, prompt: str, answer: str) -> str | None:
    """An answer as long in which one line, not the last, is wrong and all others follow from it.

    Its result is wrong too. None where there is no such answer.
    """
    lines = answer.split(SEPARATOR)
    for i in rng.sample(range(len(lines) - 1), len(lines) - 1):
      right = self.following(prompt, i, lines[i - 1] if i else "")
      options = [line for line in self.alike(lines[i]) if line not in right]
      for line in rng.sample(options, len(options)):
        whole = self.complete(rng, prompt, [*lines[:i], line])
        if len(whole) == len(lines) and not self.right_result(prompt, whole[-1]):
          return SEPARATOR.join(whole)
    return None


@functools.lru_cache(maxsize=4096)
def _last_lines(following: Callable[..., Sequence[str] | None], prompt: str) -> frozenset[str]:
  """The last lines of all right answers."""
  reached, last = {""}, []
  for number in itertools.count():
    after = {line: following(prompt, number, line) for line in reached}
    last += [line for line, options in after.items() if not options]
    reached = {line for options in after.values() for line in options}
    if not reached:
      return frozenset(last)


def _task(name: str, unique: bool, pattern: str, sample_prompt, following, slip, **trace) -> Task:
  """A task whose lines follow as in `following(number, line, *groups of the prompt)`."""
  parse = parser(name, pattern)
  steps = Trace(lambda prompt, number, line: following(number, line, *parse(prompt)), **trace)
  return Task(
      name=name,
      unique=unique,
      sample_prompt=sample_prompt,
      sample_answer=lambda rng, prompt: SEPARATOR.join(steps.complete(rng, prompt)),
      verify=steps.verify,
      slip=lambda prompt, answer: slip(answer),
      trace=steps,
  )


def _last_line(change: Callable[[str], str]) -> Callable[[str], str]:
  """A slip in the last line of an answer."""

  def slip(answer: str) -> str:
    *lines, last = answer.split(SEPARATOR)
    return SEPARATOR.join([*lines, change(last)])

  return slip


# --- Additions -----------------------------------------------------------------------------------


def _sample_sum(rng: random.Random) -> str:
  return " ".join(["sum", *(f"{rng.randint(1, 5):02d}" for _ in range(8))])


def _next_sum(number: int, line: str, numbers: str) -> Sequence[str] | None:
  first, *others = numbers.split()
  total = line if number else first
  if not re.fullmatch(r"\d{2,4}", total):
    return None
  return (f"{int(total) + int(others[number]):02d}",) if number < len(others) else ()


def _sums_alike(line: str) -> Sequence[str]:
  return [f"{int(line) + e:02d}" for e in (-10, -2, -1, 1, 2, 10) if int(line) + e > 0]


# --- Sorting by exchanges of neighbours ----------------------------------------------------------


def _sample_unsorted(rng: random.Random) -> str:
  while True:
    word = "".join(rng.choices(_LETTERS, k=5))
    # As many lines as there are pairs in the wrong order. Of up to 4 all may have one letter in
    # common, and then there is one way to sort them.
    if sum(a > b for a, b in itertools.combinations(word, 2)) >= 5:
      return f"bubble {word}"


def _next_exchange(number: int, line: str, word: str) -> Sequence[str] | None:
  word = line if number else word
  if not re.fullmatch(r"[a-z]{1,9}", word):
    return None
  return [
      word[:i] + word[i + 1] + word[i] + word[i + 2 :]
      for i in range(len(word) - 1) if word[i] > word[i + 1]
  ]


def _words_alike(line: str) -> Sequence[str]:
  """With another letter in one place."""
  return [
      line[:i] + c + line[i + 1 :]
      for i in range(len(line)) for c in _LETTERS if c not in line
  ]


# --- Edits of a list -----------------------------------------------------------------------------


def _sample_edits(rng: random.Random) -> str:
  while True:
    letters = rng.sample(_LETTERS, rng.randint(3, 4))
    slots = [*letters, *_FREE * (5 - len(letters))]
    words = ["edit", "".join(rng.sample(slots, len(slots)))]
    for _ in range(5):
      kind = rng.choice(["<->", "del" if len(letters) > 3 else "put"])
      if kind == "<->":
        words.append(kind.join(rng.sample(letters, 2)))
      elif kind == "del":
        words.append(f"del {letters.pop(rng.randrange(len(letters)))}")
      else:
        letters.append(rng.choice([c for c in _LETTERS if c not in letters]))
        words.append(f"put {letters[-1]}")
    if any(word.startswith("put") for word in words):  # Else there is one right answer.
      return " ".join(words)


def _next_edit(number: int, line: str, start: str, edits: str) -> Sequence[str] | None:
  """An edit for which a letter or a free slot is missing leaves the list as it is."""
  slots = line if number else start
  if not re.fullmatch(r"[a-z.]{1,12}", slots):
    return None
  if 6 * number >= len(edits):
    return ()
  kind, letter = edits[6 * number + 1 :][:3], edits[6 * number + 5]
  if kind == "put":
    free = [i for i, c in enumerate(slots) if c == _FREE]
    return [slots[:i] + letter + slots[i + 1 :] for i in free] or (slots,)
  if kind == "del":
    return (slots.replace(letter, _FREE, 1),)
  both = kind[0] + letter
  return (slots.translate(str.maketrans(both, both[::-1])) if {*both} <= {*slots} else slots,)


# --- Programs of two variables -------------------------------------------------------------------


def _run(statement: str, a: int, b: int) -> tuple[int, int]:
  """(a, b) after a statement such as a+b, b-2 or a=b, modulo 10."""
  target, operator, operand = statement
  left, other = (a, b) if target == "a" else (b, a)
  right = int(operand) if operand.isdigit() else other
  value = {"+": left + right, "-": left - right, "=": right}[operator] % 10
  return (value, b) if target == "a" else (a, value)


def _sample_program(rng: random.Random) -> str:
  state = rng.randrange(10), rng.randrange(10)
  words = ["run", *map(str, state)]
  while len(words) < 3 + 6:
    target, operator = rng.choice("ab"), rng.choice("+-=")
    other = "b" if target == "a" else "a"
    statement = target + operator + (other if operator == "=" else rng.choice("12"))
    if _run(statement, *state) != state:
      words.append(statement)
      state = _run(statement, *state)
  return " ".join(words)


def _next_state(number: int, line: str, start: str, statements: str) -> Sequence[str] | None:
  statements = statements.split()
  state = re.fullmatch(r"(\d) (\d)", line if number else start)
  if state is None:
    return None
  if number >= len(statements):
    return ()
  return ("{} {}".format(*_run(statements[number], int(state[1]), int(state[2]))),)


def _states_alike(line: str) -> Sequence[str]:
  a, b = line.split()
  return [f"{x} {b}" for x in "0123456789" if x != a] + [f"{a} {x}" for x in "0123456789" if x != b]


def _add_one(line: str) -> str:
  """Modulo 10."""
  return line[:-1] + str((int(line[-1]) + 1) % 10)


LONG_TASKS = (
  _task(
    "scratchpad", True, r"sum (\d\d(?: \d\d)+)",
    _sample_sum, _next_sum, add_one, alike=_sums_alike,
  ),
  _task(
    "bubble", False, r"bubble ([a-f]+)",
    _sample_unsorted, _next_exchange, _last_line(swap_last), alike=_words_alike,
  ),
  _task(
    "edits", False, r"edit ([a-f.]+)((?: (?:del [a-f]|put [a-f]|[a-f]<->[a-f]))+)",
    # The list backwards; never right, as its letters differ and at most one has just been put in.
    _sample_edits, _next_edit, _last_line(lambda slots: slots[::-1]), alike=_words_alike,
  ),
  _task(
    "program", True, r"run (\d \d)((?: [ab][+=-][ab\d])+)",
    _sample_program, _next_state, _last_line(_add_one), alike=_states_alike,
  ),
)
