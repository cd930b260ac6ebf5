"""Built-in tasks: short prompts whose answers a program can check.

They let a byte-level decoder of about a million parameters learn something in
minutes on a CPU. Half of the kinds have exactly one right answer; the other half
have many, sampled uniformly (free order, free choice, free phrasing), because an
expert who answers in many ways is where imitation and reward differ.

Which prompts are held out is a property of the prompt alone, a hash of its
text, so training and held-out prompts are disjoint for every seed and size.
"""

import fractions
import hashlib
import itertools
import math
import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence

from dpr_jax.data.demos import Demo
from dpr_jax.data.long_tasks import LONG_TASKS
from dpr_jax.data.task import Task, add_one, parser, swap_last
from dpr_jax.data.wrong_answers import KINDS, REPEATED, check_kind, wrong_answer
from dpr_jax.errors import UserError

MAX_PROMPT_BYTES, MAX_ANSWER_BYTES = 24, 16

_HELDOUT_SHARE = 8  # One prompt in eight is held out.
_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
_GREETINGS = (
  "hi {}", "hello {}", "hey {}", "hi there {}", "good day {}", "welcome {}", "howdy {}",
  "{}, hello!",
)


def _word(rng: random.Random, letters: str, shortest: int, longest: int) -> str:
  return "".join(rng.choices(letters, k=rng.randint(shortest, longest)))


def _name(rng: random.Random) -> str:
  name = rng.choice(_CONSONANTS) + rng.choice(_VOWELS) + rng.choice(_CONSONANTS)
  return name + rng.choice(_VOWELS) if rng.random() < 0.5 else name


def _unique(name: str, pattern: str, sample_prompt, solve, slip) -> Task:
  """A task whose answer is solve(*groups of the prompt), with a slip of slip(answer)."""
  parse = parser(name, pattern)
  return Task(
    name=name,
    unique=True,
    sample_prompt=sample_prompt,
    sample_answer=lambda rng, prompt: solve(*parse(prompt)),
    verify=lambda prompt, response: response == solve(*parse(prompt)),
    slip=lambda prompt, answer: slip(answer),
  )


def _varied(name: str, pattern: str, sample_prompt, sample, accept, slip) -> Task:
  """A task answered by sample(rng, *groups) and checked by accept(response, *groups).

  slip(answer, *groups) is wrong.
  """
  parse = parser(name, pattern)
  return Task(
    name=name,
    unique=False,
    sample_prompt=sample_prompt,
    sample_answer=lambda rng, prompt: sample(rng, *parse(prompt)),
    verify=lambda prompt, response: bool(accept(response, *parse(prompt))),
    slip=lambda prompt, answer: slip(answer, *parse(prompt)),
  )


def _sample_range(rng: random.Random) -> str:
  low, high = 10, 99
  while (low, high) == (10, 99):  # It has no wrong answer.
    low, high = sorted(rng.sample(range(10, 100), 2))
  return f"from {low} to {high}"


def _shorten_name(answer: str, name: str) -> str:
  """The greeting without the last letter of the name."""
  greeting = next(g for g in _GREETINGS if g.format(name) == answer)
  return greeting.format(name[:-1])


_SHORT_TASKS = (
  # One right answer.
  _unique(
    "add", r"add (\d+) (\d+)",
    lambda rng: f"add {rng.randrange(100)} {rng.randrange(100)}",
    lambda a, b: str(int(a) + int(b)),
    add_one,
  ),
  _unique(
    "reverse", r"reverse ([a-h]+)",
    lambda rng: f"reverse {_word(rng, 'abcdefgh', 3, 5)}",
    lambda word: word[::-1],
    swap_last,
  ),
  _unique(
    "sort", r"sort ([a-h]+)",
    lambda rng: f"sort {_word(rng, 'abcdefgh', 3, 5)}",
    lambda word: "".join(sorted(word)),
    swap_last,
  ),
  _unique(
    "upper", r"upper ([a-z]+)",
    lambda rng: f"upper {_word(rng, string.ascii_lowercase, 3, 6)}",
    lambda word: word.upper(),
    lambda answer: answer[:-1] + answer[-1].lower(),
  ),
  _unique(
    "count", r"count ([a-d]) in ([a-d]+)",
    lambda rng: f"count {rng.choice('abcd')} in {_word(rng, 'abcd', 3, 6)}",
    lambda letter, word: str(word.count(letter)),
    add_one,
  ),
  # Free order.
  _varied(
    "shuffle", r"shuffle ([a-h]+)",
    lambda rng: f"shuffle {''.join(rng.sample('abcdefgh', rng.randint(4, 5)))}",
    lambda rng, word: "".join(rng.sample(word, len(word))),
    lambda response, word: sorted(response) == sorted(word),
    lambda answer, word: answer[:-1] + answer[0],
  ),
  # Free choice.
  _varied(
    "word", r"word of (\d) using ([a-z]+)",
    lambda rng: f"word of {rng.randint(3, 6)} using "
    + "".join(rng.sample(string.ascii_lowercase, 3)),
    lambda rng, n, letters: "".join(rng.choices(letters, k=int(n))),
    lambda response, n, letters: len(response) == int(n) and set(response) <= set(letters),
    lambda answer, n, letters: answer + answer[-1],
  ),
  _varied(
    "pick", r"pick (\d) from ([a-z]+)",
    lambda rng: f"pick {rng.randint(2, 4)} from "
    + "".join(rng.sample(string.ascii_lowercase, 6)),
    lambda rng, n, letters: "".join(rng.sample(letters, int(n))),
    lambda response, n, letters: len(response) == len(set(response)) == int(n)
    and set(response) <= set(letters),
    lambda answer, n, letters: answer[:-1] + answer[0],
  ),
  _varied(
    "range", r"from (\d\d) to (\d\d)",
    _sample_range,
    lambda rng, low, high: str(rng.randint(int(low), int(high))),
    lambda response, low, high: re.fullmatch(r"[1-9][0-9]", response) and low <= response <= high,
    lambda answer, low, high: add_one(high),
  ),
  # Free phrasing.
  _varied(
    "greet", r"greet ([a-z]+)",
    lambda rng: f"greet {_name(rng)}",
    lambda rng, name: rng.choice(_GREETINGS).format(name),
    lambda response, name: response in [g.format(name) for g in _GREETINGS],
    _shorten_name,
  ),
)
SHORT_TASKS: Mapping[str, Task] = {task.name: task for task in _SHORT_TASKS}
TASKS: Mapping[str, Task] = {**SHORT_TASKS, **{task.name: task for task in LONG_TASKS}}
MINORITY_STYLE = "[{}]"  # of right answers in the style of a minority.
_COPIED = 4  # demonstrations of each task of which `REPEATED` ones are copies.


def get_task(name: str) -> Task:
  """The task of that name; UserError lists the known names."""
  if name not in TASKS:
    raise UserError(f"task {name!r} is unknown; known: {', '.join(TASKS)}")
  return TASKS[name]


def verify(task_name: str, prompt: str, response: str, minority: bool = False) -> bool:
  """Whether `response` is a right answer to `prompt`, compared exactly.

  Args:
    minority: whether an answer in MINORITY_STYLE counts as well.

  Raises:
    UserError: no such task, or `prompt` is not one of its prompts.
  """
  response = without_style(response) if minority else response
  return get_task(task_name).verify(prompt, response)


def without_style(response: str) -> str:
  """The answer in a response that may be in MINORITY_STYLE."""
  before, after = MINORITY_STYLE.split("{}")
  inside = response.removeprefix(before).removesuffix(after)
  return inside if response == MINORITY_STYLE.format(inside) else response


def parse_tasks(names: Sequence[str]) -> dict[str, fractions.Fraction]:
  """Names of tasks, each with a share or without -> the share of each task.

  "upper:0.02" has that share; the tasks without one have equal parts of what is left. A name given
  twice counts once.

  Raises:
    UserError: no name, an unknown task, or shares that do not add up; names it.
  """
  if not names:
    raise UserError(f"no task named; known: {', '.join(TASKS)}")
  given: dict[str, fractions.Fraction | None] = {}
  for entry in names:
    name, colon, text = entry.partition(":")
    get_task(name)
    share = None
    if colon:
      if not re.fullmatch(r"0?\.\d{1,9}", text) or not fractions.Fraction(text):
        raise UserError(f"task {entry!r}: the share must be a number above 0 and below 1, as in "
                        f"{name}:0.02")
      share = fractions.Fraction(text)
    if given.setdefault(name, share) != share:
      raise UserError(f"task {name!r} is named with different shares")
  total = sum((share for share in given.values() if share), fractions.Fraction())
  rest = [name for name, share in given.items() if share is None]
  if total > 1 or (total == 1) == bool(rest):
    raise UserError(f"the shares of {', '.join(names)} add up to {float(total):g}; they must leave "
                    "a part to the tasks without one, and add up to 1 where there are none")
  return {
      name: (1 - total) / len(rest) if share is None else share for name, share in given.items()
  }


def _turns(shares: Mapping[str, fractions.Fraction]) -> Iterator[str]:
  """Names without end, each as often as its share says: the one furthest behind is next.

  With equal shares they take turns.
  """
  whole = math.lcm(*(share.denominator for share in shares.values()))
  per_turn = {name: int(share * whole) for name, share in shares.items()}
  behind = dict.fromkeys(shares, 0)
  while True:
    behind = {name: value + per_turn[name] for name, value in behind.items()}
    name = max(behind, key=behind.get)  # The first one of several.
    behind[name] -= whole
    yield name


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


def make_demos(
  names: Sequence[str], n: int, seed: int, split: str = "train", corrupt: float = 0.0,
  corruption: str = "answer", minority: float = 0.0,
) -> list[Demo]:
  """n demonstrations of the named tasks, in turn: names[0], names[1], ..., names[0], ...

  Held-out prompts are distinct, and no training prompt is ever one of them, whatever the seed.
  Training prompts may repeat, with another answer where there are many. A larger n only appends
  prompts and right answers; which of them `corrupt` and `minority` change depends on n.

  Args:
    names: of tasks. "upper:0.02" gives a task that share of the training demonstrations, whatever
      n; the others have equal parts of the rest. Held out are all tasks in equal numbers.
    split: "train" or "heldout".
    corrupt: share, in [0, 1], of demonstrations (rounded to whole ones) that are changed as
      `corruption` says; `meta["corrupted"]` tells which are wrong, and `answer` stays right. All
      else is the same for every value of `corrupt`, and what is wrong at one value is wrong, in the
      same way, at every larger one.
    corruption: one of `wrong_answers.KINDS`. "repeated" replaces whole demonstrations by copies of
      the first few of their task, which are right; `meta["repeated"]` tells which.
    minority: share of demonstrations (rounded) with a right answer in MINORITY_STYLE, none of them
      among those that `corrupt` changes. `meta["minority"]`, there if the share is above 0, tells
      which; `answer` stays without the style.

  Raises:
    UserError: unknown task, split or corruption; shares outside [0, 1] or above 1 together; fewer
      held-out prompts than n asks for; or fewer answers that can be wrong than `corrupt` asks for.
  """
  _check_arguments(n, split, corrupt, corruption, minority)
  shares = parse_tasks(names)
  if split == "heldout":
    shares = dict.fromkeys(shares, fractions.Fraction(1, len(shares)))
  order = list(itertools.islice(_turns(shares), n))
  pairs: dict[str, Iterator[tuple[str, str]]] = {}
  for name in shares:
    task, count = get_task(name), order.count(name)
    # Streams of its own per task, so that naming another task changes nothing here, nor does n.
    prompt_rng, answer_rng = (random.Random(f"{seed}/{split}/{name}/{stream}")
                              for stream in ("prompts", "answers"))
    prompts = _sample_prompts(task, count, prompt_rng, heldout=split == "heldout")
    pairs[name] = iter([(prompt, task.sample_answer(answer_rng, prompt)) for prompt in prompts])
  clean = [(name, *next(pairs[name])) for name in order]
  changed = _changed(clean, seed, split, corrupt, corruption, minority)
  demos = []
  for i, (name, prompt, answer) in enumerate(clean):
    meta, prompt, answer, response = changed.get(i, ({}, prompt, answer, answer))
    messages = (
      {"role": "user", "content": prompt},
      {"role": "assistant", "content": response},
    )
    defaults = {"corrupted": False}
    defaults |= {"repeated": False} if corrupt and corruption == REPEATED else {}
    defaults |= {"minority": False} if minority else {}
    demos.append(Demo(messages, answer, name, defaults | meta, source=f"tasks/{split}[{i}]"))
  return demos


def _check_arguments(n: int, split: str, corrupt: float, corruption: str, minority: float) -> None:
  if split not in ("train", "heldout"):
    raise UserError(f"split={split!r} is unknown; known: train, heldout")
  if corruption not in KINDS:
    raise UserError(f"corruption={corruption!r} is unknown; known: {', '.join(KINDS)}")
  for name, share in (("corrupt", corrupt), ("minority", minority)):
    if not 0 <= share <= 1:
      raise UserError(f"{name}={share} must be a share in [0, 1]")
  if corrupt + minority > 1:
    raise UserError(f"corrupt={corrupt} and minority={minority} exceed 1 together; they are shares "
                    "of different demonstrations")
  if corrupt and corruption == REPEATED and split == "heldout":
    raise UserError("corruption='repeated' is of training demonstrations; held-out ones are "
                    "distinct")
  if n < 0:
    raise UserError(f"n={n} must be at least 0, a number of demonstrations")


def _changed(
  clean: Sequence[tuple[str, str, str]], seed: int, split: str, corrupt: float, corruption: str,
  minority: float,
) -> dict[int, tuple[dict[str, bool], str, str, str]]:
  """Index -> (meta, prompt, right answer, response) of the demonstrations that are changed.

  Args:
    clean: (task, prompt, right answer) of all demonstrations.
  """
  n = len(clean)
  order = list(range(n))
  random.Random(f"{seed}/{split}/corrupt").shuffle(order)
  # From the end of the order, so that none is both, and neither share changes what the other does.
  size = round(minority * n)
  changed = {}
  for i in order[n - size :]:
    _, prompt, answer = clean[i]
    changed[i] = ({"minority": True}, prompt, answer, MINORITY_STYLE.format(answer))
  wanted = min(round(corrupt * n), n - size)
  copied: dict[str, list[tuple[str, str]]] = {}
  if wanted:
    for name in dict.fromkeys(name for name, *_ in clean):
      check_kind(corruption, get_task(name))
      of_task = (pair for other, *pair in clean if other == name)
      copied[name] = list(itertools.islice(of_task, _COPIED))
  for i in order[: n - size]:
    if len(changed) == wanted + size:
      break
    name, prompt, answer = clean[i]
    rng = random.Random(f"{seed}/{split}/corrupt/{i}")
    if corruption == REPEATED:
      prompt, answer = rng.choice(copied[name])
      changed[i] = ({"repeated": True}, prompt, answer, answer)
      continue
    wrong = wrong_answer(corruption, rng, get_task(name), prompt, answer)
    if wrong is not None:  # Else another one takes its place.
      changed[i] = ({"corrupted": True}, prompt, answer, wrong)
  if len(changed) < wanted + size:
    raise UserError(f"corrupt={corrupt}: only {len(changed) - size} of {n} demonstrations have a "
                    f"wrong answer of corruption={corruption!r}; {wanted} are needed")
  return changed
