"""GSM8K: grade-school problems with a number for an answer."""

import dataclasses
import re

from dpr_jax.evaluation.benchmarks.base import Benchmark
from dpr_jax.evaluation.metrics import ACCURACY, Column

_NUMBER = r"-?\$?[0-9][0-9,]*(?:\.[0-9]+)?"
_STRICT = re.compile(rf"####\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)


def normal_number(text: str) -> str:
  """A number in one spelling: no commas, currency, closing point or needless zeros."""
  text = text.replace(",", "").replace("$", "").rstrip(".")
  if "." in text:
    text = text.rstrip("0").rstrip(".")
  return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSM8K(Benchmark):
  """`accuracy` takes the number after '####', `accuracy_flexible` the last number.

  The two extractions follow the `strict-match` and `flexible-extract` filters of
  EleutherAI/lm-evaluation-harness, tasks/gsm8k.
  """

  kind = "gsm8k"
  title = "GSM8K"
  scores = {
      "accuracy": ACCURACY,
      "accuracy_flexible": Column("Accuracy, last number", "%", better=1),
  }

  def score(self, demo, text):
    target = normal_number(demo.answer or "")
    strict = _STRICT.search(text)
    numbers = _ANY.findall(text)
    return {
        "accuracy": float(bool(strict) and normal_number(strict[1]) == target),
        "accuracy_flexible": float(bool(numbers) and normal_number(numbers[-1]) == target),
    }

  def answer(self, demo, text):
    strict = _STRICT.search(text)
    return normal_number(strict[1]) if strict else text.strip()
