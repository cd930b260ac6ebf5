"""Agreement with the demonstrated answer, word for word."""

import collections
import dataclasses
import re
import string

from dpr_jax.data.demos import Demo
from dpr_jax.evaluation.benchmarks.base import Benchmark
from dpr_jax.evaluation.metrics import ACCURACY, Column


def words(text: str) -> list[str]:
  """Lower-case words without punctuation and English articles (SQuAD's normalization)."""
  text = "".join(c for c in text.lower() if c not in string.punctuation)
  return re.sub(r"\b(a|an|the)\b", " ", text).split()


def differs(demo: Demo, text: str) -> bool:
  """Whether the words of a response are others than those of the demonstrated one."""
  return words(text) != words(demo.response)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(Benchmark):
  """`accuracy`: the demonstrated answer, word for word; `token_f1`: overlap of words.

  Both after the normalization of SQuAD 1.1 (arXiv 1606.05250, its evaluation script).
  """

  kind = "exact"
  title = "exact match"
  scores = {
      "accuracy": ACCURACY,
      "token_f1": Column("Token F1", "%", better=1, main=True),
  }

  def score(self, demo, text):
    predicted, target = words(text), words(demo.answer or demo.response)
    common = sum((collections.Counter(predicted) & collections.Counter(target)).values())
    if not predicted or not target:
      f1 = float(predicted == target)
    else:
      f1 = 2 * common / (len(predicted) + len(target))
    return {"accuracy": float(predicted == target), "token_f1": f1}

  def is_wrong(self, demo, text):
    return differs(demo, text)

  def answer(self, demo, text):
    return " ".join(words(text))
