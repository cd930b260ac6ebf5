"""The test prompts of LIMA, answered by two systems and compared in both orders."""

import dataclasses

from dpr_jax.evaluation.benchmarks.judged import over_prompts
from dpr_jax.evaluation.benchmarks.pairs import TEXTS, PairBenchmark, pair_prompt
from dpr_jax.evaluation.metrics import Column

_FIRST = {"A": 1.0, "B": 0.0, "C": 0.5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lima(PairBenchmark):
  """A response wins or loses where both orders agree, and ties where they do not.

  The rule of LIMA (arXiv 2305.11206) with that of MT-bench for two orders (arXiv 2306.05685).
  """

  kind = "lima"
  title = "LIMA"
  prompts = {
      "pair-v2": pair_prompt(
          "Give your reasons in a few sentences. End with a line that holds your verdict alone: "
          "[[A]] if answer A is better, [[B]] if answer B is better, [[C]] if neither is."
      )
  }
  texts = {"pair-v2": TEXTS}
  mark = r"\[\[\s*([ABC])\s*\]\]"
  summaries = {
      **PairBenchmark.summaries,
      "wins": Column("Wins", "%", better=1), "ties": Column("Ties", "%"),
      "losses": Column("Losses", "%", better=-1),
  }

  def preference(self, demo, part, reply):
    verdict = self.verdict(reply["text"])
    if verdict is None:
      return None
    return _FIRST[verdict] if part == "ab" else 1 - _FIRST[verdict]

  def judged(self, record):
    return {"win_rate": _decided(list(self._preferences(record).values()))}

  def outcomes(self, records, found):
    decided = [_decided(list(f.values())) for f in found]
    rate = lambda p: over_prompts(records, [None if d is None else float(d == p) for d in decided])
    return {"win_rate": over_prompts(records, decided), "wins": rate(1), "ties": rate(0.5),
            "losses": rate(0)}


def _decided(preferences: list[float | None]) -> float | None:
  """1, 0 or 0.5; None where an order has no verdict."""
  if None in preferences:
    return None
  return preferences[0] if len(set(preferences)) == 1 else 0.5
