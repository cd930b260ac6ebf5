"""Arena-Hard: hard prompts of users, compared with a baseline's answers in both orders."""

import dataclasses

import numpy as np

from dpr_jax.config.fields import setting
from dpr_jax.evaluation.benchmarks.pairs import TEXTS, PairBenchmark, pair_prompt
from dpr_jax.evaluation.statistics import bootstrapped

_FIRST = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0}
_STRONG = 3  # what a strong verdict counts.
_SAMPLES = 1000  # of the bootstrap.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArenaHard(PairBenchmark):
  """Win rate over games, two per prompt, of which a strong verdict counts as three.

  The score of lmarena/arena-hard-auto without style control: wins and half of the ties, over all.
  Its interval resamples prompts, because the two games of a prompt are alike.
  """

  kind = "arena_hard"
  title = "Arena-Hard"
  max_new_tokens = 4096
  prompts = {
      "arena_hard": pair_prompt(
          "First work out an answer of your own to the request. Then compare: name what is wrong "
          "in each answer, what is missing and what does not belong there. End with a line that "
          "holds your verdict alone: [[A>>B]] if answer A is much better, [[A>B]] if it is "
          "slightly better, [[A=B]] if neither is better, [[B>A]] if answer B is slightly better, "
          "[[B>>A]] if it is much better."
      )
  }
  texts = {"arena_hard": TEXTS}
  mark = r"\[\[\s*(A>>B|A>B|A=B|B>A|B>>A)\s*\]\]"
  category: str = setting("", "only the questions of this category, such as hard_prompt")

  @property
  def how(self):
    return {"max_tokens": 4096}

  def keep(self, record):
    return self.category in ("", record.get("category"))

  def preference(self, demo, part, reply):
    verdict = self.verdict(reply["text"])
    if verdict is None:
      return None
    return _FIRST[verdict] if part == "ab" else 1 - _FIRST[verdict]

  def outcomes(self, records, found):
    totals: dict[int, np.ndarray] = {}  # prompt -> (what it won, what it counts).
    for record, preferences in zip(records, found, strict=True):
      for part, p in preferences.items():
        if p is not None:
          verdict = self.verdict(record["replies"].get(part, {}).get("text", "")) or ""
          game = (_STRONG if ">>" in verdict else 1) * np.array([p, 1.0])
          totals[record["index"]] = totals.get(record["index"], 0) + game
    if not totals:
      return {}
    games = np.array(list(totals.values()))
    rng = np.random.default_rng(0)
    drawn = games[rng.integers(0, len(games), (_SAMPLES, len(games)))].sum(axis=1)
    mean = float(games[:, 0].sum() / games[:, 1].sum())
    ci95 = bootstrapped(np.array([mean]), (drawn[:, 0] / drawn[:, 1])[None], len(games))["ci95"]
    return {"win_rate": {"mean": mean, "ci95": ci95, "n": len(games)}}
