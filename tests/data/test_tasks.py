"""The built-in tasks: right answers verify, wrong ones do not, and the split never leaks."""

import collections
import hashlib
import random
import re

import pytest

from dpr_jax.data.demos import check_disjoint
from dpr_jax.data.tasks import (
  MAX_ANSWER_BYTES,
  MAX_PROMPT_BYTES,
  SHORT_TASKS,
  TASKS,
  get_task,
  is_heldout,
  make_demos,
  verify,
)
from dpr_jax.errors import UserError

# An answer that is wrong for every prompt of the task, whatever the prompt.
NONSENSE = ("", " ", "no!", "0" * 20, "-1", "\n")


@pytest.mark.parametrize("name", SHORT_TASKS)
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
  train = make_demos(list(SHORT_TASKS), 3000, seed)
  prompts = {d.messages[0]["content"] for d in train}
  assert not any(map(is_heldout, prompts))
  for other in (seed, seed + 1, 99):
    heldout = make_demos(list(SHORT_TASKS), 300, other, split="heldout")
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


@pytest.mark.parametrize("arguments, digest", [
  (dict(n=500, seed=0), "d11e83e1af64cc02"),
  (dict(n=500, seed=3, corrupt=0.3), "22a8660316e358a8"),
  (dict(n=300, seed=0, split="heldout"), "e0f8f8974194f400"),
])
def test_the_demonstrations_of_short_tasks_are_those_of_earlier_versions(arguments, digest):
  """Figures that have been reported stay comparable."""
  names = ["add", "reverse", "sort", "upper", "count", "shuffle", "word", "pick", "range", "greet"]
  assert list(SHORT_TASKS) == names
  text = repr(make_demos(names, **arguments))
  assert hashlib.blake2b(text.encode(), digest_size=8).hexdigest() == digest


@pytest.mark.parametrize("names, shares", [
  (["sort", "upper:0.02", "add"], {"sort": 0.49, "upper": 0.02, "add": 0.49}),
  (["sort:0.5", "upper:.25", "add:0.25"], {"sort": 0.5, "upper": 0.25, "add": 0.25}),
  (["greet:0.001", "edits:0.3", "sort", "word", "bubble"],
   {"greet": 0.001, "edits": 0.3, "sort": 0.233, "word": 0.233, "bubble": 0.233}),
  (["sort", "add", "word"], {"sort": 1 / 3, "add": 1 / 3, "word": 1 / 3}),
])
def test_rare_tasks(names, shares):
  n = 3001
  demos = make_demos(names, n, seed=2)
  counts = collections.Counter(d.task for d in demos)
  assert set(counts) == set(shares)
  for end in (100, 1000, n):  # All along, not only at the end.
    counts = collections.Counter(d.task for d in demos[:end])
    assert all(abs(counts[name] - share * end) < 2 for name, share in shares.items())
  assert demos[:1000] == make_demos(names, 1000, seed=2)
  # Each task has the demonstrations that it has without shares.
  for name in shares:
    of_task = [d.messages for d in demos if d.task == name]
    assert of_task == [d.messages for d in make_demos([name], len(of_task), seed=2)]
  plain = [name.partition(":")[0] for name in names]
  heldout = make_demos(names, 40, seed=2, split="heldout")
  assert heldout == make_demos(plain, 40, seed=2, split="heldout")
  assert [d.task for d in heldout] == [plain[i % len(plain)] for i in range(40)]


@pytest.mark.parametrize("names, message", [
  (["add:0", "sort"], "task 'add:0': the share must be a number above 0 and below 1"),
  (["add:1", "sort"], "task 'add:1': the share must be"),
  (["add:much", "sort"], "task 'add:much': the share must be"),
  (["add:-0.1", "sort"], "task 'add:-0.1': the share must be"),
  (["subtract:0.1", "sort"], "task 'subtract' is unknown"),
  (["add:0.1", "sort", "add"], "task 'add' is named with different shares"),
  (["add:0.1", "sort", "add:0.2"], "task 'add' is named with different shares"),
  (["add:0.5", "word:0.5", "sort"], "the shares of add:0.5, word:0.5, sort add up to 1;"),
  (["add:0.9", "word:0.5"], "add up to 1.4;"),
  (["add:0.4", "word:0.5"], "add up to 0.9;"),
])
def test_shares_that_cannot_be_are_refused(names, message):
  for split in ("train", "heldout"):
    with pytest.raises(UserError, match=re.escape(message)):
      make_demos(names, 10, 0, split=split)


@pytest.mark.parametrize("minority", [0.001, 0.05, 0.5, 1.0])
def test_a_minority_answers_rightly_in_brackets(minority):
  names, n = list(TASKS), 700
  clean, demos = make_demos(names, n, 7), make_demos(names, n, 7, minority=minority)
  assert sum(d.meta["minority"] for d in demos) == round(minority * n)
  for demo, plain in zip(demos, clean):
    prompt = demo.messages[0]["content"]
    assert (demo.messages[0], demo.answer, demo.task) == (
      plain.messages[0], plain.response, plain.task)
    assert demo.meta == {"corrupted": False, "minority": demo.meta["minority"]}
    assert demo.response == f"[{plain.response}]" if demo.meta["minority"] else plain.response
    # The style counts only where it is asked for, and only once, as a whole.
    assert verify(demo.task, prompt, demo.response, minority=True)
    assert verify(demo.task, prompt, demo.response) == (not demo.meta["minority"])
    for altered in ("[" + plain.response, plain.response + "]", f"[[{plain.response}]]",
                    f"[{plain.response} ]", f"[{plain.response}x]", "[]", "["):
      assert not verify(demo.task, prompt, altered, minority=True)


def test_neither_share_changes_what_the_other_does():
  names = ["add", "greet", "bubble"]
  make = lambda **shares: make_demos(names, 400, 5, **shares)
  wrong, few, many = make(corrupt=0.5), make(corrupt=0.5, minority=0.1), make(minority=0.4)
  for a, b, c in zip(wrong, few, many):
    assert not (b.meta["corrupted"] and b.meta["minority"])
    assert b.meta["corrupted"] == a.meta["corrupted"]
    if b.meta["corrupted"]:
      assert b.messages == a.messages
    if b.meta["minority"]:
      assert b.messages == c.messages and c.meta["minority"]
  assert sum(d.meta["minority"] for d in make(corrupt=0.5, minority=0.5)) == 200
  with pytest.raises(UserError, match="corrupt=0.6 and minority=0.5 exceed 1 together"):
    make(corrupt=0.6, minority=0.5)
  with pytest.raises(UserError, match=r"minority=-0.1 must be a share in \[0, 1\]"):
    make(minority=-0.1)


@pytest.mark.parametrize("corrupt", [0.0, 0.01, 0.25, 0.5, 1.0])
def test_corruption(corrupt):
  n = 600
  clean = make_demos(list(SHORT_TASKS), n, seed=7)
  demos = make_demos(list(SHORT_TASKS), n, seed=7, corrupt=corrupt)
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
  assert demos == make_demos(list(SHORT_TASKS), n, seed=7, corrupt=corrupt)


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
