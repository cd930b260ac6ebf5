"""AlpacaEval: preferences by log-probability against the reference outputs of the data."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from scipy.special import expit

from dpr_jax import fingerprints
from dpr_jax.config.fields import setting
from dpr_jax.evaluation.benchmarks.judged import over_prompts
from dpr_jax.evaluation.benchmarks.pairs import BOTH, TEXTS, PairBenchmark, pair_prompt
from dpr_jax.evaluation.metrics import Column
from dpr_jax.evaluation.statistics import bootstrapped

_NAMES = ("m", "M")  # of the two answers; one token each, and no letters of a scale.
_RIDGE = 0.01  # of a normal prior of the coefficients with a deviation of 10.
_SAMPLES = 200  # of the bootstrap.


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlpacaEval(PairBenchmark):
  """`win_rate` is the mean probability of the judge that the response is the better one.

  After tatsu-lab/alpaca_eval (arXiv 2404.04475), which asks in one order, by chance.
  `length_controlled_win_rate` is of the smallest model of that paper: a logistic regression on the
  model and tanh(difference in characters / its deviation), at no difference. It is not the
  leaderboard's, whose regression also knows how hard each instruction is.
  """

  kind = "alpaca_eval"
  title = "AlpacaEval"
  prompts = {
      "alpaca_eval": pair_prompt(
          "Reply with nothing but the name of the better answer: m or M.", *_NAMES
      )
  }
  texts = {"alpaca_eval": TEXTS}
  summaries = {
      **PairBenchmark.summaries,
      "discrete_win_rate": Column("Win rate, by the more likely verdict", "%", better=1),
      "length_controlled_win_rate": Column(
          "Length-controlled win rate, minimal model", "%", better=1,
          note="The minimal length-controlled model is not the leaderboard's.",
      ),
  }
  both_orders: bool = setting(True, "ask in both orders; else in one, by chance of the prompt")
  logprobs: bool = setting(True, "take the judge's log-probs; else the name that it writes")

  @property
  def how(self):
    return {"max_tokens": 1, "top_logprobs": 5} if self.logprobs else {"max_tokens": 16}

  def questions(self, demo, record, prompts):
    asked = super().questions(demo, record, prompts)
    if self.both_orders:
      return asked
    return [asked[int(fingerprints.of_bytes(demo.prompt[-1]["content"].encode()), 16) % 2]]

  def preference(self, demo, part, reply):
    first = _first_by_logprobs(reply["logprobs"]) if "logprobs" in reply else None
    if not self.logprobs:
      said = reply["text"].rpartition("</think>")[2].strip(" \n\t\"'`*.")
      first = {_NAMES[0]: 1.0, _NAMES[1]: 0.0}.get(said)
    return first if first is None or part == BOTH[0] else 1 - first

  def outcomes(self, records, found):
    means = [np.mean(v) if (v := [p for p in f.values() if p is not None]) else None for f in found]
    discrete = [None if m is None else (np.sign(m - 0.5) + 1) / 2 for m in means]
    return {
        "discrete_win_rate": over_prompts(records, discrete),
        "length_controlled_win_rate": _length_controlled(records, means),
    }


def _first_by_logprobs(logprobs: Mapping[str, float]) -> float | None:
  """The probability of the first name among the two; None where neither is likely enough."""
  mass = [sum(math.exp(lp) for token, lp in logprobs.items() if token.strip() == name)
          for name in _NAMES]
  return mass[0] / sum(mass) if sum(mass) else None


def _length_controlled(records, means):
  judged = [(r["index"], m, len(r["response"]) - len(r["demo"].response))
            for r, m in zip(records, means, strict=True) if m is not None]
  if not judged:
    return None
  indices, preferences, longer = map(np.array, zip(*judged))
  deviation = longer.std(ddof=1) if len(longer) > 1 else 0.0
  longer = np.tanh(longer / deviation) if deviation else np.zeros(len(longer))
  rows = [np.flatnonzero(indices == i) for i in np.unique(indices)]
  rng = np.random.default_rng(0)
  resampled = []
  for _ in range(_SAMPLES):
    chosen = np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])
    resampled.append(at_equal_length(preferences[chosen], longer[chosen]))
  mean = at_equal_length(preferences, longer)
  ci95 = bootstrapped(np.array([mean]), np.array([resampled]), len(rows))["ci95"]
  return {"mean": mean, "ci95": ci95, "n": len(rows)}


def at_equal_length(preferences: np.ndarray, longer: np.ndarray) -> float:
  """sigmoid(a) of the most likely preference = sigmoid(a + b longer), by Newton's method.

  Args:
    preferences: in [0, 1], [N].
    longer: tanh of the standardised difference in length, [N].
  """
  features, weights = np.stack([np.ones(len(longer)), longer], axis=1), np.zeros(2)
  for _ in range(100):
    p = expit(features @ weights)
    gradient = features.T @ (preferences - p) - _RIDGE * weights
    hessian = (features * (p * (1 - p))[:, None]).T @ features + _RIDGE * np.eye(2)
    step = np.linalg.solve(hessian, gradient)
    weights = weights + np.clip(step, -1, 1)
    if np.abs(step).max() < 1e-10:
      break
  return float(expit(weights[0]))
