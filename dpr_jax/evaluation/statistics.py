"""Intervals and paired comparisons for results over prompts and seeds.

Two things vary in a result: which prompts were sampled, and which seed trained the model. With one
seed only the prompts can be generalised over, and the numbers speak of that one trained model.
With several seeds both count. The variance of a mean over S seeds and P prompts is then taken
from the two-way table of values (seeds are rows, prompts are columns):

    V = (MS_seed + max(0, MS_prompt - MS_rest)) / (S P)

with the mean squares of the analysis of variance, and the degrees of freedom of Satterthwaite
(1946), as in the quasi-F test of Clark (1973, "The language-as-fixed-effect fallacy"), where the
prompts are as much a sample as the subjects. If every seed had prompts of its own, MS_prompt and
MS_rest have the same expectation and V is the usual variance of the mean of S seed means; if the
prompts are shared, what they add to every seed alike is counted too. The interval is never
narrower than that of the prompts alone, were all seeds the same model. Bootstrapping three seeds
cannot do this: percentile intervals of 3 values cover 95% in name and about 75% in fact.

Only `compare` uses random numbers, from a seed of its own.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

LEVEL = 0.95
_Z = float(scipy.stats.norm.ppf((1 + LEVEL) / 2))
FLIPS = 9_999  # sign flips of a Monte Carlo permutation test; its smallest p is 1 / (FLIPS + 1).
_EXACT = 14  # differences up to which all 2^n sign flips are tried.


def interval(per_seed: Sequence[np.ndarray]) -> dict[str, Any]:
  """Mean of a metric with its 95% interval.

  One seed, values 0 or 1: Wilson's score interval (1927). One seed, other values: Student's t
  over prompts. Several seeds: see the module; for values 0 or 1 it is Wilson's interval with the
  effective number of prompts n = p (1 - p) / V and the t quantile (Korn and Graubard, 1998, use
  this n for clustered proportions), so it stays within [0, 1]. With two seeds an interval is
  wide and still rough (88 to 95% measured where the seeds differ much); use three or more. Where
  seeds hardly differ it covers 95 to 99%, because it does not let seeds agree by luck.

  Args:
    per_seed: for each seed, the value of each prompt, [P]. Where all seeds have the same number
      of prompts, a position is taken to be the same prompt in each; if it is not, nothing is lost.

  Returns:
    mean (over seeds, of the mean over prompts), ci95 [low, high] (NaN where a single value leaves
    it unknown), n (values in all seeds together).

  Raises:
    ValueError: no seed, a seed without values, or a value that is not finite.
  """
  values = _checked(per_seed, "per_seed")
  mean = float(np.mean([v.mean() for v in values]))
  out = {"mean": mean, "ci95": [math.nan, math.nan], "n": sum(len(v) for v in values)}
  if all(np.all((v == 0) | (v == 1)) for v in values):
    out["ci95"] = _wilson(mean, values)
    return out
  half = max((math.sqrt(v) * t_quantile(df) for v, df in _variances(values)), default=math.nan)
  out["ci95"] = [mean - half, mean + half]
  return out


def share(values: np.ndarray) -> dict[str, Any]:
  """Mean of values in [0, 1], such as wins with ties of 1/2, with the interval of Wilson.

  p (1 - p) is the variance of values of 0 or 1, and above that of others: it is never too narrow.
  """
  values, = _checked([values], "values")
  mean = float(values.mean())
  return {"mean": mean, "ci95": _wilson(mean, [values]), "n": len(values)}


def ratio_interval(numerator: np.ndarray, denominator: np.ndarray) -> dict[str, Any]:
  """sum(numerator) / sum(denominator) over prompts, [P] each, with its 95% interval.

  That of the linear part of the ratio in each prompt: Student's t.
  """
  ratio = numerator.sum() / denominator.sum()
  found = interval([ratio + (numerator - ratio * denominator) / denominator.mean()])
  return {**found, "mean": float(ratio)}


def compare(
  a_per_seed: Sequence[np.ndarray], b_per_seed: Sequence[np.ndarray], *, seed: int = 0
) -> dict[str, Any]:
  """Difference of two systems on the same prompts, paired prompt by prompt.

  The interval is that of the mean of the differences (one seed: t over prompts; several: see the
  module). Where both systems only score 0 or 1, two prompts with differences +sqrt(1/2) and
  -sqrt(1/2) are added before the variance is taken: for one seed this is the interval of Agresti
  and Min (2005), which keeps its coverage where few prompts differ.

  One seed: p is of the sign-flip permutation test over prompts, that is the exact McNemar test for
  scores of 0 or 1, exact for up to 14 differing prompts, else with 9,999 samples and one added to
  both counts. Several seeds: p is of the t test that belongs to the interval, because three seeds
  have only 8 sign flips, and is given as at least 1 / 10,000. It is never 0.

  Args:
    a_per_seed, b_per_seed: for each seed, the value of each prompt, [P], in the same order.
    seed: of the Monte Carlo samples.

  Returns:
    difference (mean of a minus mean of b, over seeds), ci95 [low, high], p (two-sided).

  Raises:
    ValueError: different numbers of seeds, or of prompts in a seed, or as in `interval`.
  """
  a, b = _checked(a_per_seed, "a_per_seed"), _checked(b_per_seed, "b_per_seed")
  if len(a) != len(b):
    raise ValueError(f"a_per_seed has {len(a)} seeds and b_per_seed {len(b)}; they must be paired")
  for i, (x, y) in enumerate(zip(a, b)):
    if len(x) != len(y):
      raise ValueError(f"seed {i}: {len(x)} values of a and {len(y)} of b; pair them by prompt")
  differences = [x - y for x, y in zip(a, b)]
  difference = float(np.mean([d.mean() for d in differences]))
  padded = differences
  if all(np.all((v == 0) | (v == 1)) for v in (*a, *b)):
    h = math.sqrt(0.5)
    padded = [np.append(d, [h, -h]) for d in differences]
  variances = _variances(padded)
  # The mean of the padded differences, towards 0 by n / (n + 2): the center of their interval.
  center = float(np.mean([d.mean() for d in padded]))
  half = max((math.sqrt(v) * t_quantile(df) for v, df in variances), default=math.nan)
  if len(differences) == 1:
    p = _sign_flip_p(differences[0], seed)
  elif not np.any([np.any(d != 0) for d in differences]):
    p = 1.0
  else:
    p = max(_t_tail(center / math.sqrt(v), df) if v > 0 else 0.0 for v, df in variances)
    p = max(p, 1 / (FLIPS + 1))
  return {"difference": difference, "ci95": [center - half, center + half], "p": p}


def bootstrapped(estimates: np.ndarray, resampled: np.ndarray, prompts: int) -> dict[str, Any]:
  """Interval and p of the mean over seeds of a statistic, from bootstrap samples of the prompts.

  One seed: percentiles of the samples, which speak of that one trained model; p is twice the
  smaller share of samples on one side of 0, 0 included, with one added to both counts. Several: the
  variance of the samples' means plus that of the mean of the seeds' estimates, with Satterthwaite's
  degrees of freedom and their t test; a little wide, because the noise of the prompts within a seed
  is in both. p is never 0.

  Args:
    estimates: of each seed, [S].
    resampled: of the bootstrap samples of each seed, [S, B], the same prompts in every seed; a
      sample that is not finite is left out.
    prompts: the number of prompts that are resampled.

  Returns:
    ci95 [low, high]; p of the difference from 0, two-sided. NaN where unknown.
  """
  means = resampled.mean(axis=0)
  means = means[np.isfinite(means)]
  mean, s, n = float(np.mean(estimates)), len(estimates), len(means)
  if math.isnan(mean) or prompts < 2 or not n:
    return {"ci95": [math.nan, math.nan], "p": math.nan}
  if s == 1:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    tail = min(np.sum(means <= 0), np.sum(means >= 0))
    return {"ci95": [float(low), float(high)], "p": min(1.0, 2 * (int(tail) + 1) / (n + 1))}
  between, shared = float(np.var(estimates, ddof=1)) / s, float(means.var(ddof=1))
  variance, half, p = between + shared, 0.0, float(mean == 0)
  if variance > 0:
    df = variance**2 / (between**2 / (s - 1) + shared**2 / (prompts - 1))
    half, p = math.sqrt(variance) * t_quantile(df), _t_tail(mean / math.sqrt(variance), df)
  return {"ci95": [mean - half, mean + half], "p": max(p, 1 / (n + 1))}


def _checked(per_seed: Sequence[np.ndarray], name: str) -> list[np.ndarray]:
  values = [np.asarray(v, np.float64) for v in per_seed]
  if not values:
    raise ValueError(f"{name} has no seed")
  for i, v in enumerate(values):
    if v.ndim != 1 or not len(v):
      raise ValueError(f"{name}[{i}] has shape {v.shape}; give one value for each prompt, [P]")
    if not np.all(np.isfinite(v)):
      raise ValueError(f"{name}[{i}] has values that are not finite")
  return values


def _variances(values: list[np.ndarray]) -> list[tuple[float, float]]:
  """(variance of the mean, degrees of freedom) of each way to see it; the wider one counts."""
  s = len(values)
  if s == 1:
    n = len(values[0])
    return [(float(values[0].var(ddof=1)) / n, n - 1)] if n > 1 else []
  means = np.array([v.mean() for v in values])
  between = float(means.var(ddof=1)) / s
  out = [(between, s - 1)]
  spare = sum(len(v) - 1 for v in values)
  if spare:
    # Were all seeds one model: the noise of the prompts within each seed.
    pooled = sum(float(np.sum((v - v.mean()) ** 2)) for v in values) / spare
    out.append((pooled * sum(1 / len(v) for v in values) / s**2, spare))
  p = len(values[0])
  if p > 1 and all(len(v) == p for v in values):
    table = np.stack(values)
    columns = table.mean(axis=0)
    rest = table - means[:, None] - columns[None, :] + table.mean()
    ms_rest = float(np.sum(rest**2)) / ((s - 1) * (p - 1))
    shared = max(0.0, s * float(columns.var(ddof=1)) - ms_rest) / (s * p)
    if shared > 0:
      variance = between + shared
      out[0] = variance, variance**2 / (between**2 / (s - 1) + shared**2 / (p - 1))
  return out


def _wilson(mean: float, values: list[np.ndarray]) -> list[float]:
  """Wilson's interval of a proportion, at the effective number of prompts."""
  if len(values) == 1:
    widest = [(len(values[0]), _Z)]
  elif mean * (1 - mean) == 0:
    # No spread to be seen. Shared prompts may fail together, so seeds count as one.
    widest = [(max(len(v) for v in values), _Z)]
  else:
    widest = [(mean * (1 - mean) / v, t_quantile(df)) for v, df in _variances(values) if v > 0]
  bounds = []
  for n, z in widest:
    center = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    bounds.append((half, [max(0.0, center - half), min(1.0, center + half)]))
  return max(bounds)[1]


def _sign_flip_p(differences: np.ndarray, seed: int) -> float:
  """Two-sided p of the mean difference under random signs; at least 2^-n or 1 / (FLIPS + 1)."""
  d = np.abs(differences[differences != 0])
  n = len(d)
  if not n:
    return 1.0
  observed = abs(float(differences.sum()))
  observed -= 1e-9 * float(d.sum())  # sums that are equal but for rounding count as equal.
  if np.all(d == d[0]):
    # Equal sizes: the number of positive signs is binomial (McNemar).
    positive = round((float(differences.sum()) / d[0] + n) / 2)
    return max(float(scipy.stats.binomtest(positive, n).pvalue), 5e-324)
  if n <= _EXACT:
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=n)))
    return float(np.mean(np.abs(signs @ d) >= observed))
  rng = np.random.default_rng(seed)
  hits, done = 0, 0
  while done < FLIPS:
    count = min(1_000, FLIPS - done)
    signs = rng.integers(0, 2, (count, n), dtype=np.int8) * 2.0 - 1.0
    hits += int(np.sum(np.abs(signs @ d) >= observed))
    done += count
  return (hits + 1) / (FLIPS + 1)


def _t_tail(t: float, df: float) -> float:
  """P(|T| >= |t|) for Student's t."""
  return 2 * float(scipy.stats.t.sf(abs(t), df))


@functools.lru_cache(maxsize=1024)
def t_quantile(df: float) -> float:
  """t such that Student's t lies within [-t, t] with probability LEVEL."""
  return float(scipy.stats.t.ppf((1 + LEVEL) / 2, df))
