"""Built-in tasks with long answers, against checkers written in another way."""

import collections
import itertools
import random

import pytest

from dpr_jax.data.long_tasks import LONG_TASKS, MAX_LONG_ANSWER_BYTES, MAX_LONG_PROMPT_BYTES
from dpr_jax.data.tasks import TASKS, is_heldout, make_demos, verify
from dpr_jax.data.templates import encode_demo, encode_response
from dpr_jax.errors import UserError
from dpr_jax.weights.byte_tokenizer import byte_tokenizer

NAMES = [task.name for task in LONG_TASKS]


def scratchpad(prompt, answer):
  """Sums of all beginnings of the numbers, digit by digit."""
  numbers = prompt.split()[1:]
  expected = []
  for k in range(2, len(numbers) + 1):
    tens = sum(int(x[0]) for x in numbers[:k])
    ones = sum(int(x[1]) for x in numbers[:k])
    expected.append(str(10 * tens + ones).rjust(2, "0"))
  return answer == ";".join(expected)


def bubble(prompt, answer):
  """Each word differs from the one before in two neighbours, which then are in order."""
  words = [prompt.split()[1], *answer.split(";")]
  for before, after in itertools.pairwise(words):
    if len(before) != len(after):
      return False
    places = [i for i, (x, y) in enumerate(zip(before, after)) if x != y]
    if len(places) != 2 or places[1] != places[0] + 1:
      return False
    i, j = places
    if (before[i], before[j]) != (after[j], after[i]) or ord(after[i]) > ord(after[j]):
      return False
  return list(words[-1]) == sorted(words[0])


def edits(prompt, answer):
  """With the places of the letters instead of a text."""
  start, lines = prompt[5:10], answer.split(";")
  words = prompt[11:].replace("<->", " ").replace("del", "del -").replace("put", "put +").split()
  places = {c: i for i, c in enumerate(start) if c != "."}
  while words and lines:
    line = lines.pop(0)
    if words[0] == "del":
      del places[words[2]]
      words = words[3:]
    elif words[0] == "put":
      if words[2] not in line or line.index(words[2]) in places.values():
        return False
      places[words[2]] = line.index(words[2])
      words = words[3:]
    else:
      x, y, *words = words
      places[x], places[y] = places[y], places[x]
    shown = ["."] * 5
    for c, i in places.items():
      if i >= 5:
        return False
      shown[i] = c
    if "".join(shown) != line:
      return False
  return not words and not lines


def program(prompt, answer):
  """Python runs it."""
  _, a, b, *statements = prompt.split()
  names, lines = {"a": int(a), "b": int(b)}, []
  for s in statements:
    code = f"{s[0]} = {s[2]}" if s[1] == "=" else f"{s[0]} {s[1]}= {s[2]}"
    exec(code, {}, names)
    names = {name: value % 10 for name, value in names.items()}
    lines.append(f"{names['a']} {names['b']}")
  return answer == ";".join(lines)


CHECKERS = {"scratchpad": scratchpad, "bubble": bubble, "edits": edits, "program": program}


@pytest.mark.parametrize("name", NAMES)
def test_answers_and_altered_ones_against_another_checker(name, dice):
  task, check, judged = TASKS[name], CHECKERS[name], collections.Counter()
  for _ in range(60):
    prompt = task.sample_prompt(dice)
    answer = task.sample_answer(dice, prompt)
    assert check(prompt, answer) and verify(name, prompt, answer)
    assert task.trace.step_accuracy(prompt, answer) == task.trace.right_result(prompt, answer) == 1
    assert prompt.isascii() and answer.isascii() and len(prompt) <= MAX_LONG_PROMPT_BYTES
    assert 19 <= len(answer) <= MAX_LONG_ANSWER_BYTES
    lines = answer.split(";")
    altered = [answer + ";", ";" + answer, answer + " ", " " + answer, answer + "\n", "",
               ";".join(lines[:-1]), ";".join(lines[1:]), ";".join([*lines, lines[-1]]),
               ";".join(lines[::-1]), answer.replace(";", " "), answer.swapcase() + "x"]
    for _ in range(20):  # A replaced, removed or doubled character, or two lines exchanged.
      i, j = dice.randrange(len(answer)), dice.randrange(len(answer))
      moved = list(lines)
      a, b = dice.randrange(len(lines)), dice.randrange(len(lines))
      moved[a], moved[b] = moved[b], moved[a]
      altered += [answer[:i] + answer[j] + answer[i + 1 :], answer[:i] + answer[i + 1 :],
                  answer[:i] + answer[i:][:1] + answer[i:], ";".join(moved)]
    for text in altered:
      expected = check(prompt, text)
      judged[expected] += 1
      assert verify(name, prompt, text) == expected, (prompt, text)
      if expected:
        assert task.trace.right_result(prompt, text)
  assert judged[False] > 1500 and judged[True] > 20  # Replaced by an equal one, at least.


@pytest.mark.parametrize("name", NAMES)
def test_answers_have_20_to_80_tokens(name):
  tokenizer = byte_tokenizer()
  lengths = []
  for demo in make_demos([name], 200, 0):
    response = encode_response(demo.messages[-1], demo.prompt, tokenizer)
    assert encode_demo(demo, tokenizer, "all").loss_mask.sum() == len(response)
    lengths.append(len(response))
  assert 20 <= min(lengths) and max(lengths) <= 80


@pytest.mark.parametrize("name, prompt, following", [
  ("bubble", "bubble dcba", {"cdba", "dbca", "dcab"}),
  ("edits", "edit .a..b put c", {"ca..b", ".ac.b", ".a.cb"}),
])
def test_steps_are_sampled_uniformly(name, prompt, following):
  n = 900
  rng = random.Random(3)
  counts = collections.Counter(
    TASKS[name].sample_answer(rng, prompt).split(";")[0] for _ in range(n))
  assert set(counts) == following
  assert sum((c - n / 3) ** 2 / (n / 3) for c in counts.values()) < 13.82  # 0.999 quantile.


@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_unique_ones_have_one_answer(name, dice):
  task = TASKS[name]
  for _ in range(30):
    prompt = task.sample_prompt(dice)
    answers = {task.sample_answer(dice, prompt) for _ in range(60)}
    assert (len(answers) == 1) == task.unique, prompt


@pytest.mark.parametrize("name, prompt, response, steps, result", [
  # One slip is one wrong step; what follows from it is right, but for the result.
  ("scratchpad", "sum 08 05 09 04", "13;22;26", [1, 1, 1], 1),
  ("scratchpad", "sum 08 05 09 04", "14;23;27", [0, 1, 1], 0),
  ("scratchpad", "sum 08 05 09 04", "13;23;26", [1, 0, 0], 1),
  ("scratchpad", "sum 08 05 09 04", "13;22", [1, 1, 0], 0),
  ("scratchpad", "sum 08 05 09 04", "26", [0, 0, 0], 1),
  ("scratchpad", "sum 08 05 09 04", "13;what", [1, 0, 0], 0),
  ("scratchpad", "sum 08 05 09 04", "13;22;26;26", [1, 1, 1, 0], 1),
  ("scratchpad", "sum 08 05 09 04", "", [0, 0, 0], 0),
  ("scratchpad", "sum 01 05", "6", [0], 0),
  ("bubble", "bubble cba", "cab;acb;abc", [1, 1, 1], 1),
  ("bubble", "bubble cba", "bca;bac;abc", [1, 1, 1], 1),
  ("bubble", "bubble cba", "cab;abc", [1, 0], 1),
  ("bubble", "bubble cba", "cab;acd", [1, 0], 0),
  ("bubble", "bubble cba", "cad;acd", [0, 1], 0),
  ("bubble", "bubble cba", "cab;cba", [1, 0, 0, 0, 0], 0),
  ("bubble", "bubble cba", "cab;c-b", [1, 0, 0], 0),
  ("edits", "edit ab. del b put d a<->d", "a..;ad.;da.", [1, 1, 1], 1),
  ("edits", "edit ab. del b put d a<->d", "a..;a.d;d.a", [1, 1, 1], 1),
  ("edits", "edit ab. del b put d a<->d", "e..;e.d;e.d", [0, 1, 1], 0),  # a is not there.
  ("edits", "edit ab. del b put d a<->d", "abc;abc;abc", [0, 1, 1], 0),  # Nor is a free slot.
  ("edits", "edit ab. del b put d a<->d", "a..;a..;da.", [1, 0, 0], 1),
  ("edits", "edit ab. del b del b", "a..;a..", [1, 1], 1),
  ("program", "run 3 5 a+b b-6 b=a", "8 5;8 9;8 8", [1, 1, 1], 1),
  ("program", "run 3 5 a+b b-6 b=a", "8 5;8 0;8 8", [1, 0, 1], 1),
  ("program", "run 3 5 a+b b-6 b=a", "7 5;7 9;7 7", [0, 1, 1], 0),
  ("program", "run 3 5 a+b b-6 b=a", "8 5;8 8", [1, 0, 0], 1),
])
def test_steps_and_results_by_hand(name, prompt, response, steps, result):
  trace = TASKS[name].trace
  assert trace.right_steps(prompt, response) == [bool(s) for s in steps]
  assert trace.step_accuracy(prompt, response) == sum(steps) / len(steps)
  assert trace.right_result(prompt, response) == bool(result)
  assert verify(name, prompt, response) == (sum(steps) == len(steps))


def test_prompts_are_split_and_reproduced():
  demos = make_demos(NAMES, 2000, 4)
  heldout = make_demos(NAMES, 1024, 9, split="heldout")
  prompts = {d.messages[0]["content"] for d in heldout}
  assert len(prompts) == 1024 and all(map(is_heldout, prompts))
  assert not prompts & {d.messages[0]["content"] for d in demos}
  assert demos == make_demos(NAMES, 2500, 4)[:2000] and demos != make_demos(NAMES, 2000, 5)
  assert [d.task for d in demos[:4]] == NAMES
  # Also beside short ones, which they do not change.
  mixed = make_demos(["sort", "edits"], 200, 4)
  assert [d.messages for d in mixed[1::2]] == [d.messages for d in demos[2::4]][:100]
  with pytest.raises(UserError, match="task edits: 'edit it' is not one of its prompts"):
    verify("edits", "edit it", "")
