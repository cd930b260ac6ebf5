"""Whether a response is right, judged by a program: verifier(demo, response) -> scores.

A score is a float in [0, 1]. `accuracy` is always among them; others are named for what they
measure.
"""

import collections
import re
import string
from collections.abc import Callable, Mapping

from dpr_jax.data.formats import Demo
from dpr_jax.data.tasks import verify as verify_task
from dpr_jax.errors import UserError

Verifier = Callable[[Demo, str], Mapping[str, float]]

_NUMBER = r"-?\$?[0-9][0-9,]*(?:\.[0-9]+)?"
_STRICT = re.compile(rf"####\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)


def _normal_number(text: str) -> str:
  """A number in one spelling: no commas, currency, closing point or needless zeros."""
  text = text.replace(",", "").replace("$", "").rstrip(".")
  if "." in text:
    text = text.rstrip("0").rstrip(".")
  return text


def gsm8k(demo: Demo, response: str) -> dict[str, float]:
  """GSM8K exact match: `accuracy` takes the number after '####', `accuracy_flexible` the last one.

  The two extractions follow the `strict-match` and `flexible-extract` filters of
  EleutherAI/lm-evaluation-harness, tasks/gsm8k.
  """
  target = _normal_number(demo.answer or "")
  strict = _STRICT.search(response)
  numbers = _ANY.findall(response)
  return {
      "accuracy": float(bool(strict) and _normal_number(strict[1]) == target),
      "accuracy_flexible": float(bool(numbers) and _normal_number(numbers[-1]) == target),
  }


def _words(text: str) -> list[str]:
  """Lower-case words without punctuation and English articles (SQuAD's normalisation)."""
  text = "".join(c for c in text.lower() if c not in string.punctuation)
  return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact(demo: Demo, response: str) -> dict[str, float]:
  """`accuracy`: the demonstrated answer, word for word; `token_f1`: overlap of words.

  Both after the normalisation of SQuAD 1.1 (arXiv 1606.05250, its evaluation script).
  """
  predicted, target = _words(response), _words(demo.answer or demo.response)
  common = sum((collections.Counter(predicted) & collections.Counter(target)).values())
  if not predicted or not target:
    f1 = float(predicted == target)
  else:
    f1 = 2 * common / (len(predicted) + len(target))
  return {"accuracy": float(predicted == target), "token_f1": f1}


def tasks(demo: Demo, response: str) -> dict[str, float]:
  """The checker of the built-in task that `demo` belongs to."""
  return {"accuracy": float(verify_task(demo.task, demo.messages[0]["content"], response))}


VERIFIERS: dict[str, Verifier] = {"tasks": tasks, "exact": exact, "gsm8k": gsm8k}


def get_verifier(name: str) -> Verifier:
  """The verifier of that name; UserError lists the names there are."""
  if name not in VERIFIERS:
    raise UserError(f"verifier {name!r} is unknown; known: {', '.join(VERIFIERS)}")
  return VERIFIERS[name]
