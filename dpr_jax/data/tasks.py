"""Built-in tasks: short prompts whose answers a program can check.

They let a byte-level decoder of about a million parameters learn something in
minutes on a CPU. Half of the kinds have exactly one right answer; the other half
have many, sampled uniformly (free order, free choice, free phrasing), because an
expert who answers in many ways is where imitation and reward differ.

Which prompts are held out is a property of the prompt alone, a hash of its
text, so training and held-out prompts are disjoint for every seed and size.
"""

import dataclasses
import hashlib
import itertools
import random
import re
import string
from collections.abc import Callable, Mapping, Sequence

from dpr_jax.data.demos import Demo
from dpr_jax.errors import UserError

MAX_PROMPT_BYTES, MAX_ANSWER_BYTES = 24, 16

_HELDOUT_SHARE = 8  # One prompt in eight is held out.
_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
_GREETINGS = (
  "hi {}", "hello {}", "hey {}", "hi there {}", "good day {}", "welcome {}", "howdy {}",
  "{}, hello!",
)


@dataclasses.dataclass(frozen=True)
class Task:
  """A kind of prompt. All text is ASCII, within MAX_PROMPT_BYTES and MAX_ANSWER_BYTES."""

  name: str
  unique: bool  # exactly one right answer.
  sample_prompt: Callable[[random.Random], str]
  sample_answer: Callable[[random.Random, str], str]  # (rng, prompt), uniform over right answers.
  verify: Callable[[str, str], bool]  # (prompt, response), exact: no trimming, no case folding.


def _word(rng: random.Random, letters: str, shortest: int, longest: int) -> str:
  return "".join(rng.choices(letters, k=rng.randint(shortest, longest)))


def _name(rng: random.Random) -> str:
  name = rng.choice(_CONSONANTS) + rng.choice(_VOWELS) + rng.choice(_CONSONANTS)
  return name + rng.choice(_VOWELS) if rng.random() < 0.5 else name


def _unique(name: str, pattern: str, sample_prompt, solve) -> Task:
  """A task whose answer is solve(*groups of the prompt)."""
  parse = _parser(name, pattern)
  return Task(
    name=name,
    unique=True,
    sample_prompt=sample_prompt,
    sample_answer=lambda rng, prompt: solve(*parse(prompt)),
    verify=lambda prompt, response: response == solve(*parse(prompt)),
  )


def _varied(name: str, pattern: str, sample_prompt, sample, accept) -> Task:
  """A task answered by sample(rng, *groups) and checked by accept(response, *groups)."""
  parse = _parser(name, pattern)
  return Task(
    name=name,
    unique=False,
    sample_prompt=sample_prompt,
    sample_answer=lambda rng, prompt: sample(rng, *parse(prompt)),
    verify=lambda prompt, response: bool(accept(response, *parse(prompt))),
  )


def _parser(name: str, pattern: str) -> Callable[[str], tuple[str, ...]]:
  regex = re.compile(pattern)

  def parse(prompt: str) -> tuple[str, ...]:
    match = regex.fullmatch(prompt)
    if match is None:
      raise UserError(f"task {name}: {prompt[:40]!r} is not one of its prompts ({pattern})")
    return match.groups()

  return parse


def _sample_range(rng: random.Random) -> str:
  low, high = 10, 99
  while (low, high) == (10, 99):  # It has no wrong answer.
    low, high = sorted(rng.sample(range(10, 100), 2))
  return f"from {low} to {high}"


_TASKS = (
  # One right answer.
  _unique(
    "add", r"add (\d+) (\d+)",
    lambda rng: f"add {rng.randrange(100)} {rng.randrange(100)}",
    lambda a, b: str(int(a) + int(b)),
  ),
  _unique(
    "reverse", r"reverse ([a-h]+)",
    lambda rng: f"reverse {_word(rng, 'abcdefgh', 3, 5)}",
    lambda word: word[::-1],
  ),
  _unique(
    "sort", r"sort ([a-h]+)",
    lambda rng: f"sort {_word(rng, 'abcdefgh', 3, 5)}",
    lambda word: "".join(sorted(word)),
  ),
  _unique(
    "upper", r"upper ([a-z]+)",
    lambda rng: f"upper {_word(rng, string.ascii_lowercase, 3, 6)}",
    lambda word: word.upper(),
  ),
  _unique(
    "count", r"count ([a-d]) in ([a-d]+)",
    lambda rng: f"count {rng.choice('abcd')} in {_word(rng, 'abcd', 3, 6)}",
    lambda letter, word: str(word.count(letter)),
  ),
  # Free order.
  _varied(
    "shuffle", r"shuffle ([a-h]+)",
    lambda rng: f"shuffle {''.join(rng.sample('abcdefgh', rng.randint(4, 5)))}",
    lambda rng, word: "".join(rng.sample(word, len(word))),
    lambda response, word: sorted(response) == sorted(word),
  ),
  # Free choice.
  _varied(
    "word", r"word of (\d) using ([a-z]+)",
    lambda rng: f"word of {rng.randint(3, 6)} using "
    + "".join(rng.sample(string.ascii_lowercase, 3)),
    lambda rng, n, letters: "".join(rng.choices(letters, k=int(n))),
    lambda response, n, letters: len(response) == int(n) and set(response) <= set(letters),
  ),
  _varied(
    "pick", r"pick (\d) from ([a-z]+)",
    lambda rng: f"pick {rng.randint(2, 4)} from "
    + "".join(rng.sample(string.ascii_lowercase, 6)),
    lambda rng, n, letters: "".join(rng.sample(letters, int(n))),
    lambda response, n, letters: len(response) == len(set(response)) == int(n)
    and set(response) <= set(letters),
  ),
  _varied(
    "range", r"from (\d\d) to (\d\d)",
    _sample_range,
    lambda rng, low, high: str(rng.randint(int(low), int(high))),
    lambda response, low, high: re.fullmatch(r"[1-9][0-9]", response) and low <= response <= high,
  ),
  # Free phrasing.
  _varied(
    "greet", r"greet ([a-z]+)",
    lambda rng: f"greet {_name(rng)}",
    lambda rng, name: rng.choice(_GREETINGS).format(name),
    lambda response, name: response in [g.format(name) for g in _GREETINGS],
  ),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _TASKS}


def get_task(name: str) -> Task:
  """The task of that name; UserError lists the known names."""
  if name not in TASKS:
    raise UserError(f"task {name!r} is unknown; known: {', '.join(TASKS)}")
  return TASKS[name]


def verify(task_name: str, prompt: str, response: str) -> bool:
  """Whether `response` is a right answer to `prompt`, compared exactly.

  Raises:
    UserError: no such task, or `prompt` is not one of its prompts.
  """
  return get_task(task_name).verify(prompt, response)


def is_heldout(prompt: str) -> bool:
  """The side of the train/held-out split a prompt lies on: a fixed hash of its text."""
  digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "big") % _HELDOUT_SHARE == 0


def _sample_prompts(task: Task, n: int, rng: random.Random, heldout: bool) -> list[str]:
  """n prompts of one side; distinct ones if held out."""
  prompts, seen, attempts = [], set(), 0
  while len(prompts) < n:
    attempts += 1
    if attempts > 10_000 + 200 * n:
      raise UserError(f"task {task.name}: {n} distinct held-out prompts are needed, found "
                      f"{len(prompts)}; ask for fewer")
    prompt = task.sample_prompt(rng)
    if is_heldout(prompt) != heldout or (heldout and prompt in seen):
      continue
    seen.add(prompt)
    prompts.append(prompt)
  return prompts


def _wrong_answer(task: Task, prompt: str, rng: random.Random) -> str:
  """A right answer to another prompt of the task that is wrong for this one."""
  while True:
    answer = task.sample_answer(rng, task.sample_prompt(rng))
    if not task.verify(prompt, answer):
      return answer


def make_demos(
  names: Sequence[str], n: int, seed: int, split: str = "train", corrupt: float = 0.0
) -> list[Demo]:
  """n demonstrations of the named tasks, in turn: names[0], names[1], ..., names[0], ...

  Held-out prompts are distinct, and no training prompt is ever one of them, whatever the seed.
  Training prompts may repeat, with another answer where there are many. A larger n only appends.

  Args:
    split: "train" or "heldout".
    corrupt: share, in [0, 1], of demonstrations (rounded to whole ones) whose answer is replaced by
      a wrong one of the same kind; `meta["corrupted"]` tells which, and `answer` stays right. All
      else is the same for every value of `corrupt`, and what is wrong at one value is wrong, in the
      same way, at every larger one.

  Raises:
    UserError: unknown task or split, `corrupt` outside [0, 1], or fewer held-out prompts than n
      asks for.
  """
  if split not in ("train", "heldout"):
    raise UserError(f"split={split!r} is unknown; known: train, heldout")
  if not 0 <= corrupt <= 1:
    raise UserError(f"corrupt={corrupt} must be a share in [0, 1]")
  if n < 0:
    raise UserError(f"n={n} must be at least 0, a number of demonstrations")
  if not names:
    raise UserError(f"no task named; known: {', '.join(TASKS)}")
  tasks = [get_task(name) for name in dict.fromkeys(names)]
  pairs = {}
  for i, task in enumerate(tasks):
    count = len(range(i, n, len(tasks)))
    # Streams of its own per task, so that naming another task changes nothing here, nor does n.
    prompt_rng, answer_rng = (random.Random(f"{seed}/{split}/{task.name}/{stream}")
                              for stream in ("prompts", "answers"))
    prompts = _sample_prompts(task, count, prompt_rng, heldout=split == "heldout")
    pairs[task.name] = [(prompt, task.sample_answer(answer_rng, prompt)) for prompt in prompts]
  order = list(range(n))
  random.Random(f"{seed}/{split}/corrupt").shuffle(order)
  corrupted = set(order[: round(corrupt * n)])
  demos = []
  for i, task in zip(range(n), itertools.cycle(tasks)):
    prompt, answer = pairs[task.name][i // len(tasks)]
    response = answer
    if i in corrupted:
      response = _wrong_answer(task, prompt, random.Random(f"{seed}/{split}/corrupt/{i}"))
    messages = (
      {"role": "user", "content": prompt},
      {"role": "assistant", "content": response},
    )
    meta = {"corrupted": i in corrupted}
    demos.append(Demo(messages, answer, task.name, meta, source=f"tasks/{split}[{i}]"))
  return demos
