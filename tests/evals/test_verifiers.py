"""Verifiers against answers judged by hand."""

import pytest

from dpr_jax.data.formats import Demo
from dpr_jax.errors import UserError
from dpr_jax.evals.verifiers import get_verifier


def demo(answer, response="", prompt="q", task=""):
  messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
  return Demo(messages, answer, task)


@pytest.mark.parametrize(
    ("answer", "response", "strict", "flexible"),
    [
        ("18", "so 9 * 2 = 18\n#### 18", 1, 1),
        ("18", "the answer is 18.", 0, 1),
        ("18", "#### 18 dollars, not 20", 1, 0),
        ("1,234", "#### 1234", 1, 1),
        ("1234", "#### $1,234.00", 1, 1),
        ("-3", "#### -3", 1, 1),
        ("3", "#### -3", 0, 0),
        ("18", "#### 180", 0, 0),
        ("0.5", "#### 0.50", 1, 1),
        ("18", "", 0, 0),
        ("18", "eighteen", 0, 0),
        ("18", "first 5, then 18", 0, 1),
        ("18", "####18", 1, 1),
        ("100", "#### 100", 1, 1),
    ],
)
def test_gsm8k(answer, response, strict, flexible):
  scores = get_verifier("gsm8k")(demo(answer), response)
  assert scores == {"accuracy": strict, "accuracy_flexible": flexible}


@pytest.mark.parametrize(
    ("answer", "response", "accuracy", "f1"),
    [
        ("He goes to the park.", "he goes to park", 1, 1.0),
        ("The cat sat", "cat sat down here", 0, 2 * 2 / (2 + 4)),
        ("alpha beta", "gamma", 0, 0.0),
        ("a a b", "b b", 0, 2 * 1 / (1 + 2)),  # Articles go, and repeats count once each.
        ("", "", 1, 1.0),
        ("x", "", 0, 0.0),
    ],
)
def test_exact(answer, response, accuracy, f1):
  scores = get_verifier("exact")(demo(answer), response)
  assert scores["accuracy"] == accuracy
  assert scores["token_f1"] == pytest.approx(f1)


def test_tasks_ask_the_checker_of_the_task():
  given = demo("5", "5", "add 2 3", "add")
  assert get_verifier("tasks")(given, "5") == {"accuracy": 1.0}
  assert get_verifier("tasks")(given, " 5") == {"accuracy": 0.0}


def test_an_unknown_name_lists_the_known():
  with pytest.raises(UserError, match="'bleu' is unknown; known: tasks, exact, gsm8k"):
    get_verifier("bleu")
