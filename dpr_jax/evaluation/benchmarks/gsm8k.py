"""GSM8K: grade-school problems with a number for an answer."""

import dataclasses
import functools
import re

from dpr_jax.config.fields import setting
from dpr_jax.data.demos import prompt_key
from dpr_jax.data.formats import read_demos
from dpr_jax.errors import UserError
from dpr_jax.evaluation.benchmarks.base import Benchmark
from dpr_jax.evaluation.benchmarks.exact import differs
from dpr_jax.evaluation.metrics import ACCURACY, Column

_NUMBER = re.compile(r"-?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")
# `strict-match` and `flexible-extract` of lm-evaluation-harness, tasks/gsm8k, version 3.
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def _normal(number: str) -> str:
  """What its exact match compares: no commas, currency or closing point."""
  return number.replace(",", "").replace("$", "").removesuffix(".")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSM8K(Benchmark):
  """`accuracy` takes the first number after '#### ', `accuracy_flexible` the last number.

  Both are those of EleutherAI/lm-evaluation-harness, tasks/gsm8k, to the response: 18.00 is not 18.
  So is the prompt with worked examples, a single user message. There the examples are sampled and
  keep their calculator annotations; here they are the first ones of a file, without annotations.
  Without examples, the problem alone is asked.
  """

  kind = "gsm8k"
  title = "GSM8K"
  corrupts_numbers = True
  scores = {
      "accuracy": ACCURACY,
      "accuracy_flexible": Column("Accuracy, last number", "%", better=1),
  }
  shots: int = setting(0, "worked examples before each problem: the first of `shots_file`", low=0)
  shots_file: str = setting("", "file of the worked examples, such as that of the training set")

  def __post_init__(self):
    if bool(self.shots) != bool(self.shots_file):
      raise ValueError(f"shots={self.shots} and shots_file={self.shots_file!r} need each other")

  def check(self, config):
    if self.shots:
      raise ValueError(f"shots={self.shots}: a run evaluates on prompts like those it trains on, "
                       "without worked examples; python -m dpr_jax.evaluate adds them")

  @property
  def stop_strings(self):
    # A base model continues with a problem of its own. The longer string leaves no blank lines.
    return ("\n\nQuestion:", "Question:") if self.shots else ()

  @functools.cached_property
  def _examples(self):
    """The worked examples."""
    demos = _read(self.shots_file, self.shots)
    if len(demos) < self.shots:
      raise UserError(f"{self.shots_file}: {len(demos)} examples; shots={self.shots} asks for more")
    return demos

  def read(self, path, limit=0):
    demos = _read(path, limit)
    shown = {prompt_key(demo) for demo in self._examples} if self.shots else ()
    for demo in demos:
      if prompt_key(demo) in shown:
        raise UserError(f"{demo.source}: this problem is one of the worked examples of "
                        f"{self.shots_file}; name a file of other problems")
    return demos

  def prompt(self, demo):
    if not self.shots:
      return demo.prompt
    asked = [f"Question: {d.prompt[-1]['content']}\nAnswer:" for d in (*self._examples, demo)]
    answers = [f" {d.response}\n\n" for d in self._examples] + [""]
    text = "".join(question + answer for question, answer in zip(asked, answers, strict=True))
    return ({"role": "user", "content": text},)

  def score(self, demo, text):
    target, found = _normal(demo.answer or ""), (_STRICT.findall(text)[:1], _FLEXIBLE.findall(text))
    strict, flexible = (float(bool(x) and _normal(x[-1]) == target) for x in found)
    return {"accuracy": strict, "accuracy_flexible": flexible}

  def is_wrong(self, demo, text):
    return differs(demo, text)

  def wrong_demos(self, demos):
    """By the field `answer`; without one, an answer is that of the response itself."""
    wrong = [not self.score(demo, demo.response)["accuracy"] for demo in demos]
    return wrong if any(wrong) else None

  def answer(self, demo, text):
    strict = _STRICT.search(text)
    return _normal(strict[1]) if strict else text.strip()


def _read(path, limit):
  """Problems whose answer is a number."""
  demos = read_demos(path, limit=limit, extra_fields=("*",)).demos
  for demo in demos:
    if not _NUMBER.fullmatch(demo.answer):
      raise UserError(f"{demo.source}: the answer {demo.answer[:40]!r} is not a number; expected a "
                      "closing line '#### N', or a field 'answer'")
  return demos
