"""Benchmarks in which a judge compares each response with that of a reference system."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from dpr_jax.config.fields import setting
from dpr_jax.data.demos import Demo
from dpr_jax.data.formats import parse_prompt
from dpr_jax.data.records import iter_records
from dpr_jax.errors import UserError
from dpr_jax.evaluation.benchmarks.judged import (
  FENCES,
  JudgedBenchmark,
  JudgePrompt,
  exactly,
  over_prompts,
)
from dpr_jax.evaluation.judges.base import Question
from dpr_jax.evaluation.metrics import Column
from dpr_jax.evaluation.statistics import interval

TEXTS = (
    ("question", "question_1", "instruction"), ("answer_a", "answer_1", "output_1"),
    ("answer_b", "answer_2", "output_2"),
)
BOTH = ("ab", "ba")  # in "ab" the response is answer A, in "ba" answer B.


def pair_prompt(verdicts: str, first: str = "A", second: str = "B") -> JudgePrompt:
  """A prompt of the package that compares two answers."""
  system = (
      "You compare two answers to one request and decide which serves the person who asked better. "
      "Does it do what was asked? Is it right? Is it complete, without padding, and clear? The "
      f"order of the answers, their length and their tone decide nothing. {FENCES}\n\n{verdicts}"
  )
  parts = (("request", "question"), (f"answer {first}", "answer_a"),
           (f"answer {second}", "answer_b"))
  return JudgePrompt(
      "\n\n".join(f"<<{name} {{key}}>>\n{{{text}}}\n<<end {{key}}>>" for name, text in parts),
      system,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairBenchmark(JudgedBenchmark):
  """A preference in [0, 1] for each response over the reference's, in one order or both.

  A judge that gives rewards decides a pair by the higher one.
  """

  orders: ClassVar[Sequence[str]] = BOTH
  max_new_tokens = 2048
  summaries = {
      "win_rate": Column("Win rate", "%", better=1, main=True,
                         note="Against the reference responses; half of a tie counts."),
      "position_consistency": Column("Same verdict in both orders", "%", better=1),
      "reward_margin": Column("Reward minus that of the reference", better=1),
      "length_ratio": Column("Characters, over those of the reference"),
      "pairs": Column("Judged pairs"),
      **JudgedBenchmark.summaries,
  }
  reference: str = setting("", "file of the responses to compare with, where --data has none")

  def preference(self, demo: Demo, part: str, reply: Mapping[str, Any]) -> float | None:
    """Of the response, in [0, 1]; None without a verdict."""
    raise NotImplementedError

  def outcomes(self, records: Sequence[Mapping[str, Any]], found) -> dict[str, Any]:
    """Further figures.

    Args:
      found: of each record part -> preference or None.
    """
    return {}

  # --- Data --------------------------------------------------------------------------------------

  def keep(self, record: Mapping[str, Any]) -> bool:
    """Whether a record of the data takes part."""
    return True

  def read(self, path, limit=0):
    answers, demos = self._answers() if self.reference else {}, []
    for record, where in iter_records(path):
      if not self.keep(record):
        continue
      demo, answer = _parse(record, where)
      asked = demo.prompt[-1]["content"]
      if self.reference:
        answer = answers.get(record.get("uid"), answers.get(asked))
        if answer is None:
          raise UserError(f"{self.reference}: no response to the prompt of {where}: {asked[:60]!r}")
      elif answer is None:
        raise UserError(f"{where}: no response to compare with; set --benchmark.reference to a "
                        "file of responses")
      demos.append(Demo((*demo.prompt, {"role": "assistant", "content": answer}), answer, demo.task,
                        source=where))
      if limit and len(demos) == limit:
        break
    return demos

  def _answers(self) -> dict[str, str]:
    """Last user turn, and uid where there is one -> the response of the reference."""
    out: dict[str, str] = {}
    for record, where in iter_records(self.reference):
      if record.get("sample"):  # Another response to the same prompt.
        continue
      demo, answer = _parse(record, where)
      if answer is None:
        raise UserError(f"{where}: a reference must have a response")
      for name in {record.get("uid"), demo.prompt[-1]["content"]} - {None}:
        if out.setdefault(name, answer) != answer:
          raise UserError(f"{where}: another response to the same prompt; keep one")
    return out

  # --- Questions ---------------------------------------------------------------------------------

  def questions(self, demo, record, prompts):
    (name,), asked = self.texts, demo.prompt[-1]["content"]
    if len(demo.prompt) > 1:
      asked = "\n\n".join(f"{m['role']}: {m['content']}" for m in demo.prompt)
    pair = record["response"], demo.response
    return [self.ask(part, name, prompts, (asked, *(pair if part == "ab" else pair[::-1])),
                     **self.how) for part in self.orders]

  @property
  def how(self) -> dict[str, Any]:
    """Of `Question`, besides the texts."""
    return {}

  def conversations(self, demo, record):
    said = {"response": record["response"], "reference": demo.response}
    return [Question(name, (*demo.prompt, {"role": "assistant", "content": text}))
            for name, text in said.items()]

  # --- Figures -----------------------------------------------------------------------------------

  def _preferences(self, record) -> dict[str, float | None]:
    if "reward" not in next(iter(record["replies"].values())):
      return {p: self.preference(record["demo"], p, r) for p, r in record["replies"].items()}
    margin = _margin(record)
    return {"reward": None if margin is None else (np.sign(margin) + 1) / 2}

  def judged(self, record):
    known = [p for p in self._preferences(record).values() if p is not None]
    return {"win_rate": float(np.mean(known)) if known else None}

  def summarize(self, records):
    found = [self._preferences(record) for record in records]
    means = [PairBenchmark.judged(self, record)["win_rate"] for record in records]
    both = [(f["ab"], f["ba"]) for f in found if None not in (f.get("ab"), f.get("ba"))]
    ours, theirs = (
        np.array([len(text) for text in texts], np.float64)
        for texts in zip(*((r["response"], r["demo"].response) for r in records))
    )
    figures = {"win_rate": over_prompts(records, means), **self.outcomes(records, found)}
    if both:
      same = [float(np.sign(a - 0.5) == np.sign(b - 0.5)) for a, b in both]
      figures["position_consistency"] = interval([np.array(same)])
    if "reward" in found[0]:
      figures["reward_margin"] = over_prompts(records, map(_margin, records))
    if theirs.sum():
      # The interval of a ratio of two means, by its linear part in each response.
      ratio = ours.sum() / theirs.sum()
      linear = interval([ratio + (ours - ratio * theirs) / theirs.mean()])
      figures["length_ratio"] = {**linear, "mean": float(ratio)}
    figures["pairs"] = exactly(sum(m is not None for m in means), len(records))
    figures |= self.counts(records, [p for f in found for p in f.values()])
    return {name: figure for name, figure in figures.items() if figure}


def _margin(record: Mapping[str, Any]) -> float | None:
  ours, theirs = (record["replies"][name]["reward"] for name in ("response", "reference"))
  return None if ours is None or theirs is None else ours - theirs


def _parse(record: Mapping[str, Any], where: str) -> tuple[Demo, str | None]:
  """A record, and its response if it has one; also of LIMA's prompts and Arena-Hard's answers."""
  if isinstance(record.get("conversations"), str):
    record = {**record, "messages": [{"role": "user", "content": record["conversations"]}]}
    del record["conversations"]
  elif isinstance(record.get("messages"), list):
    record = {**record, "messages": [_plain(message) for message in record["messages"]]}
  demo = parse_prompt(record, where)
  return demo, demo.response if demo.messages[-1]["role"] == "assistant" else None


def _plain(message: Any) -> Any:
  content = message.get("content") if isinstance(message, dict) else None
  answer = content.get("answer") if isinstance(content, dict) else None
  return message if answer is None else {**message, "content": answer}
