"""The built-in tasks: right answers verify, wrong ones do not, and the split never leaks."""

import collections
import random
import re

import pytest

from dpr_jax.data.demos import check_disjoint
from dpr_jax.data.tasks import (
  MAX_ANSWER_BYTES,
  MAX_PROMPT_BYTES,
  TASKS,
  get_task,
  is_heldout,
  make_demos,
  verify,
)
from dpr_jax.errors import UserError

# An answer that is wrong for every prompt of the task, whatever the prompt.
NONSENSE = ("", " ", "no!", "0" * 20, "-1", "\n")


@pytest.mark.parametrize("name", TASKS)
def test_answers_verify_and_altered_ones_do_not(name):
  task = TASKS[name]
  assert task.name == name
  rng = random.Random(f"verify {name}")
  for _ in range(400):
    prompt = task.sample_prompt(rng)
    answer = task.sample_answer(rng, prompt)
    assert verify(name, prompt, answer)
    assert prompt.isascii() and answer.isascii() and prompt and answer
    assert len(prompt) <= MAX_PROMPT_BYTES and len(answer) <= MAX_ANSWER_BYTES
    # Exact: no white space around, nothing more, nothing less, no other case.
    for altered in (answer + " ", " " + answer, answer + "\n", answer + answer[-1] + "x",
                    answer[:-1], answer + "0", "x" + answer, *NONSENSE):
      assert not verify(name, prompt, altered), (prompt, altered)
    if answer.swapcase() != answer:
      assert not verify(name, prompt, answer.swapcase())


def test_answers_of_unique_tasks_by_another_route():
  rng = random.Random(9)
  for _ in range(300):
    a = TASKS["add"].sample_prompt(rng)
    _, x, y = a.split()
    total = len("." * int(x) + "." * int(y))
    for guess in range(200):
      assert verify("add", a, str(guess)) == (guess == total)
    r = TASKS["reverse"].sample_prompt(rng)
    word = r.split()[1]
    assert verify("reverse", r, "".join(word[len(word) - 1 - i] for i in range(len(word))))
    s = TASKS["sort"].sample_prompt(rng)
    word = s.split()[1]
    assert verify("sort", s, "".join(c * word.count(c) for c in "abcdefgh"))
    u = TASKS["upper"].sample_prompt(rng)
    assert verify("upper", u, "".join(chr(ord(c) - 32) for c in u.split()[1]))
    c = TASKS["count"].sample_prompt(rng)
    _, letter, _, word = c.split()
    for guess in range(8):
      assert verify("count", c, str(guess)) == (len(re.findall(letter, word)) == guess)


@pytest.mark.parametrize("name, prompt, right, wrong", [
  ("shuffle", "shuffle abcd", ["abcd", "dcba", "bdac"],
   ["abc", "abcda", "abce", "aabc", "a b c d"]),
  ("word", "word of 3 using xyz", ["xyz", "xxx", "zzy"], ["xy", "xyzx", "xya", "XYZ"]),
  ("pick", "pick 2 from abcdef", ["ab", "fa", "ec"], ["aa", "a", "abc", "ag", "a b"]),
  ("range", "from 10 to 12", ["10", "11", "12"],
   ["9", "13", "09", "010", "1", "10.5", "ten", "١٠"]),
  ("greet", "greet bob", ["hi bob", "bob, hello!", "good day bob"],
   ["hi", "hi bobo", "Hi bob", "hi  bob", "hello! bob", "bob"]),
  ("count", "count a in bcd", ["0"], ["", "1", "00", "zero"]),
  ("add", "add 0 0", ["0"], ["", "00", "+0", "1"]),
])
def test_many_answers(name, prompt, right, wrong):
  for answer in right:
    assert verify(name, prompt, answer)
  for answer in wrong:
    assert not verify(name, prompt, answer)


def test_exactly_the_unique_tasks_have_one_answer():
  for task in TASKS.values():
    rng = random.Random(f"unique {task.name}")
    prompt = max((task.sample_prompt(rng) for _ in range(20)), key=len)
    if task.name == "range":
      prompt = "from 10 to 90"
    answers = {task.sample_answer(rng, prompt) for _ in range(200)}
    assert (len(answers) == 1) == task.unique, task.name
  assert 0 < sum(t.unique for t in TASKS.values()) < len(TASKS)


def chi_square(counts, total, outcomes):
  expected = total / outcomes
  missing = outcomes - len(counts)
  return sum((c - expected) ** 2 / expected for c in counts.values()) + missing * expected


@pytest.mark.parametrize("name, prompt, outcomes, limit", [
  # limit: the 0.999 quantile of chi-square with outcomes - 1 degrees of freedom.
  ("shuffle", "shuffle abcd", 24, 49.73),
  ("word", "word of 3 using xyz", 27, 54.05),
  ("pick", "pick 2 from abcdef", 30, 58.30),
  ("range", "from 20 to 39", 20, 43.82),
  ("greet", "greet bob", 8, 24.32),
])
def test_answers_are_drawn_uniformly(name, prompt, outcomes, limit):
  rng = random.Random(f"uniform {name}")
  n = 200 * outcomes
  counts = collections.Counter(TASKS[name].sample_answer(rng, prompt) for _ in range(n))
  assert len(counts) == outcomes
  assert chi_square(counts, n, outcomes) < limit


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_train_and_heldout_prompts_are_disjoint(seed):
  train = make_demos(list(TASKS), 3000, seed)
  prompts = {d.messages[0]["content"] for d in train}
  assert not any(map(is_heldout, prompts))
  for other in (seed, seed + 1, 99):
    heldout = make_demos(list(TASKS), 300, other, split="heldout")
    texts = [d.messages[0]["content"] for d in heldout]
    assert all(map(is_heldout, texts)) and len(set(texts)) == 300
    assert not prompts & set(texts)
    check_disjoint(train, heldout)
  share = sum(is_heldout(f"p{i}") for i in range(8000)) / 8000
  assert abs(share - 1 / 8) < 0.015


def test_make_demos():
  names = ["add", "greet", "sort"]
  demos = make_demos(names, 100, seed=4)
  assert [d.task for d in demos] == [names[i % 3] for i in range(100)]
  for i, demo in enumerate(demos):
    user, assistant = demo.messages
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    assert verify(demo.task, user["content"], assistant["content"])
    assert demo.answer == assistant["content"] and demo.meta == {"corrupted": False}
    assert demo.source == f"tasks/train[{i}]"
  assert demos == make_demos(names, 100, seed=4)
  assert demos != make_demos(names, 100, seed=5)
  # A name given twice counts once; a longer list begins with the shorter one's prompts; another
  # task does not change what a task gives.
  assert demos == make_demos([*names, "add"], 100, seed=4)
  assert demos == make_demos(names, 150, seed=4)[:100]
  alone = make_demos(["greet"], 33, seed=4)
  assert [d.messages for d in alone] == [d.messages for d in demos if d.task == "greet"]
  assert make_demos(names, 0, seed=4) == []


@pytest.mark.parametrize("corrupt", [0.0, 0.01, 0.25, 0.5, 1.0])
def test_corruption(corrupt):
  n = 600
  clean = make_demos(list(TASKS), n, seed=7)
  demos = make_demos(list(TASKS), n, seed=7, corrupt=corrupt)
  marked = [d.meta["corrupted"] for d in demos]
  assert sum(marked) == round(corrupt * n)
  for demo, other, bad in zip(demos, clean, marked):
    prompt, response = demo.messages[0]["content"], demo.messages[1]["content"]
    assert (prompt, demo.answer, demo.task, demo.source) == (
      other.messages[0]["content"], other.answer, other.task, other.source)
    assert verify(demo.task, prompt, demo.answer)
    assert verify(demo.task, prompt, response) == (not bad)
    if bad:
      assert len(response) <= MAX_ANSWER_BYTES and response
    else:
      assert demo == other
  assert demos == make_demos(list(TASKS), n, seed=7, corrupt=corrupt)


def test_every_prompt_has_a_wrong_answer():
  """Ranges most of all: nothing is outside of the widest one, which must not be asked for."""
  for seed in range(10):
    demos = make_demos(["range"], 2000, seed, corrupt=1.0)
    assert not any(verify(d.task, d.messages[0]["content"], d.response) for d in demos)


def test_more_corruption_contains_less():
  """`corrupt` may be swept: the demonstrations wrong at 0.1 are wrong at 0.3 as well."""
  for seed in range(5):
    few = make_demos(["add", "greet"], 400, seed, corrupt=0.1)
    many = make_demos(["add", "greet"], 400, seed, corrupt=0.3)
    both = [(a, b) for a, b in zip(few, many) if a.meta["corrupted"]]
    assert len(both) == 40 and all(a == b for a, b in both)


def test_errors():
  with pytest.raises(UserError, match="task 'subtract' is unknown; known: add, reverse"):
    get_task("subtract")
  with pytest.raises(UserError, match="task 'subtract' is unknown"):
    verify("subtract", "a", "b")
  with pytest.raises(UserError, match="task add: 'sub 1 2' is not one of its prompts"):
    verify("add", "sub 1 2", "3")
  with pytest.raises(UserError, match="split='test' is unknown; known: train, heldout"):
    make_demos(["add"], 3, 0, split="test")
  for corrupt in (-0.1, 1.1, float("nan")):
    with pytest.raises(UserError, match=r"corrupt=.* must be a share in \[0, 1\]"):
      make_demos(["add"], 3, 0, corrupt=corrupt)
  with pytest.raises(UserError, match="no task named; known: add"):
    make_demos([], 3, 0)
  with pytest.raises(UserError, match="n=-1 must be at least 0"):
    make_demos(["add"], -1, 0)
  with pytest.raises(UserError, match=r"task add: 5000 distinct held-out prompts are needed"):
    make_demos(["add"], 5000, 0, split="heldout")
