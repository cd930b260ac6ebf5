"""Every kind of wrong demonstrations is wrong, and in the way that it says."""

import collections
import random
import re

import pytest

from dpr_jax.data.tasks import SHORT_TASKS, TASKS, Task, make_demos, verify
from dpr_jax.data.wrong_answers import KINDS, check_kind, wrong_answer
from dpr_jax.errors import UserError

# Answers of one character cannot be cut short, and a short answer has no steps.
LACKING = {("truncated", "count"), *(("step", name) for name in SHORT_TASKS)}
WRONG = [(kind, name) for kind in KINDS for name in TASKS
         if kind != "repeated" and (kind, name) not in LACKING]


@pytest.mark.parametrize("kind, name", WRONG)
def test_wrong_answers_are_wrong(kind, name, dice):
  task, missing = TASKS[name], 0
  for _ in range(150):
    prompt = task.sample_prompt(dice)
    answer = task.sample_answer(dice, prompt)
    seed = dice.random()
    wrong = wrong_answer(kind, random.Random(seed), task, prompt, answer)
    assert wrong == wrong_answer(kind, random.Random(seed), task, prompt, answer)
    if wrong is None:
      assert kind == "truncated" and len(answer) == 1
      missing += 1
      continue
    assert wrong and wrong.isascii() and not verify(name, prompt, wrong)
    if kind == "token":
      assert len(wrong) == len(answer) and sum(a != b for a, b in zip(answer, wrong)) == 1
    if kind == "truncated":
      assert answer.startswith(wrong) and len(wrong) < len(answer)
    if kind == "slip":
      assert wrong == wrong_answer("slip", random.Random(1), task, prompt, answer)
    if kind == "step":
      right = task.trace.right_steps(prompt, wrong)
      assert len(wrong.split(";")) == len(answer.split(";")) == len(right)
      assert right.count(False) == 1 and right[-1]
      assert not task.trace.right_result(prompt, wrong)
  assert missing < 10


@pytest.mark.parametrize("kind, name", sorted(LACKING))
def test_a_task_without_such_wrong_answers_is_refused(kind, name):
  with pytest.raises(UserError, match=f"task {name}: corruption='{kind}'"):
    check_kind(kind, TASKS[name])
  with pytest.raises(UserError, match=f"task {name}: corruption='{kind}'"):
    make_demos(["edits", name], 100, 0, corrupt=0.1, corruption=kind)
  # Without a share nothing is made wrong.
  assert make_demos([name], 10, 0, corruption=kind) == make_demos([name], 10, 0)


def test_a_task_that_accepts_everything_has_no_wrong_answer():
  gentle = Task("gentle", False, lambda rng: f"say {rng.random()}", lambda rng, prompt: "yes",
                lambda prompt, response: True, lambda prompt, answer: "no")
  for kind in ("answer", "token", "truncated", "slip"):
    with pytest.raises(UserError, match=f"task gentle: corruption='{kind}' makes none"):
      check_kind(kind, gentle)


@pytest.mark.parametrize("name, prompt, answer, slip", [
  ("add", "add 9 90", "99", "100"),
  ("reverse", "reverse abc", "cba", "cab"),
  ("reverse", "reverse aab", "baa", "baaa"),
  ("sort", "sort cab", "abc", "acb"),
  ("upper", "upper abc", "ABC", "ABc"),
  ("count", "count a in bcd", "0", "1"),
  ("shuffle", "shuffle abcd", "dbca", "dbcd"),
  ("word", "word of 3 using xyz", "xyy", "xyyy"),
  ("pick", "pick 2 from abcdef", "fb", "ff"),
  ("range", "from 10 to 99", "40", "100"),
  ("greet", "greet wel", "welcome wel", "welcome we"),
  ("greet", "greet bob", "bob, hello!", "bo, hello!"),
  ("scratchpad", "sum 08 05 06", "13;19", "13;20"),
  ("bubble", "bubble cba", "bca;bac;abc", "bca;bac;acb"),
  ("edits", "edit ab.. put d", "ab.d", "d.ba"),
  ("program", "run 3 5 a+b b-6", "8 5;8 9", "8 5;8 0"),
])
def test_slips(name, prompt, answer, slip):
  assert verify(name, prompt, answer) and not verify(name, prompt, slip)
  assert wrong_answer("slip", random.Random(0), TASKS[name], prompt, answer) == slip


def test_a_replaced_character_is_of_the_same_class_where_that_is_wrong():
  classes = lambda text: re.sub(r"[^a-zA-Z0-9]", "-", re.sub(
    r"\d", "0", re.sub(r"[A-Z]", "A", re.sub(r"[a-z]", "a", text))))
  for name in ("add", "sort", "upper", "greet", "edits", "program"):
    places = collections.Counter()
    for demo in make_demos([name], 300, 1, corrupt=1.0, corruption="token"):
      assert classes(demo.response) == classes(demo.answer)
      places.update(i for i, (a, b) in enumerate(zip(demo.response, demo.answer)) if a != b)
    assert places[0] and len(places) > 2  # Any place.


@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_every_kind(kind):
  names = [n for n in TASKS if (kind, n) not in LACKING]
  n = 520
  clean = make_demos(names, n, seed=7)
  few, many = (make_demos(names, n, 7, corrupt=c, corruption=kind) for c in (0.1, 0.3))
  mark = "repeated" if kind == "repeated" else "corrupted"
  for share, demos in ((0.1, few), (0.3, many)):
    assert sum(d.meta[mark] for d in demos) == round(share * n)
    for demo, plain in zip(demos, clean):
      assert demo.task == plain.task and demo.source == plain.source
      prompt = demo.messages[0]["content"]
      assert verify(demo.task, prompt, demo.answer)
      assert verify(demo.task, prompt, demo.response) == (not demo.meta["corrupted"])
      if not demo.meta[mark]:
        assert demo.messages == plain.messages and demo.answer == plain.answer
  assert all(a == b for a, b in zip(few, many) if a.meta[mark])


def test_repeated_demonstrations_are_copies_of_few():
  names = ["greet", "edits", "sort"]
  demos = make_demos(names, 900, 3, corrupt=0.4, corruption="repeated")
  clean = make_demos(names, 900, 3)
  copies = [d for d in demos if d.meta["repeated"]]
  assert len(copies) == 360 and not any(d.meta["corrupted"] for d in demos)
  for name in names:
    first = [d.messages for d in clean if d.task == name][:4]
    found = collections.Counter(str(d.messages) for d in copies if d.task == name)
    assert set(found) == set(map(str, first)) and min(found.values()) > 10
  with pytest.raises(UserError, match="held-out ones are distinct"):
    make_demos(names, 30, 3, "heldout", corrupt=0.1, corruption="repeated")


def test_another_takes_the_place_of_an_answer_that_cannot_be_wrong():
  """Sums below 10 have one digit, and cannot be cut short."""
  demos = make_demos(["add"], 2000, 0, corrupt=0.9, corruption="truncated")
  assert sum(d.meta["corrupted"] for d in demos) == 1800
  single = [d for d in demos if len(d.answer) == 1]
  assert single and not any(d.meta["corrupted"] for d in single)
  with pytest.raises(UserError, match=r"corrupt=1.0: only \d+ of 2000 demonstrations have a wrong "
                                      r"answer of corruption='truncated'; 2000 are needed"):
    make_demos(["add"], 2000, 0, corrupt=1.0, corruption="truncated")


def test_unknown_kinds_are_refused():
  with pytest.raises(UserError, match="corruption='lies' is unknown; known: answer, token, trunc"):
    make_demos(["add"], 3, 0, corruption="lies")
