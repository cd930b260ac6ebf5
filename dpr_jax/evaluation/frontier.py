"""Accuracy against coverage over decode temperatures: sharpening and learning look alike at one.

For every system, temperature and prompt there are k responses, of which some are right:

  accuracy   the share of right responses, over all prompts.
  coverage   the number of distinct right answers among the k, over prompts with many right answers.
  pass@k     the share of prompts with a right response among the k, over prompts with one right
             answer.

A benchmark tells the two kinds of prompts apart by the groups `varied` and `unique`; where none has
such a group, all prompts count. Greedy decoding ends the curve of a system. With one response per
prompt its coverage is not comparable with that of k, so it is shown but never interpolated.

**At equal accuracy.** The curve of a system is

    C(a) = the largest coverage at an accuracy of at least a,

a monotone piecewise linear function: its knots are the sampled temperatures in the order of their
accuracy, each raised to the largest coverage at its accuracy or a higher one. What lies between two
knots is attained by answering each prompt at one of the two temperatures, chosen at random. The
difference of a system to SFT is the mean of C_system(a) - C_sft(a) over all a that both curves
reach: from the larger one of their least accuracies to the smaller one of their largest. **At equal
coverage** the two are swapped: accuracy as a function of coverage.

A system that merely sharpens SFT moves along SFT's curve, and its difference is about 0; one above
0 does what no temperature of SFT does.

Prompts are resampled, the same ones for both systems, all temperatures and all seeds. With several
seeds the difference is the mean of theirs, and their spread counts as in
`statistics.bootstrapped`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dpr_jax.evaluation.metrics import checked_scores
from dpr_jax.evaluation.responses import response_text
from dpr_jax.evaluation.statistics import bootstrapped, compare, interval
from dpr_jax.signals import stoppable
from dpr_jax.workdir import read_lines

RESAMPLES = 4_999  # of the prompts.
_SHARED = 0.95  # share of the resamples in which two curves must have a range in common.

Curve = tuple[np.ndarray, np.ndarray]  # x and y of its knots, float64 [..., T].


def measure(evaluation: Any, system: Any) -> None:
  """Writes samples/frontier/SYSTEM.jsonl, unless it exists or the system has no temperature.

  A line per temperature and prompt: temperature (0: greedy), prompt (index), groups, samples,
  right (how many), distinct (different right answers).
  """
  run, section = evaluation.run, evaluation.run.config.eval
  path = run.workdir.frontier / f"{system.name}.jsonl"
  if not section.frontier_samples or not system.on_frontier or path.exists():
    return
  n = section.frontier_prompts or len(evaluation.prompts.tokens)
  prompts, demos = evaluation.prompts.tokens[:n], evaluation.prompts.demos[:n]
  k, records = section.frontier_samples, []

  def add(temperature, texts_of_prompts):
    for j, (demo, texts) in enumerate(zip(demos, texts_of_prompts, strict=True)):
      score = lambda t, demo=demo, j=j: checked_scores(
          run.benchmark.score(demo, t), run.benchmark.scores, f"prompt {j + 1}: {t[:40]!r}"
      )
      right = [t for t in texts if score(t)["accuracy"]]
      records.append({
          "temperature": temperature, "prompt": j, "groups": list(run.benchmark.groups(demo)),
          "samples": len(texts), "right": len(right),
          "distinct": len({run.benchmark.answer(demo, t) for t in right}),
      })

  total = len(prompts) * k * len(section.temperatures)
  with run.bar(f"frontier {system.name}", total, "response") as bar:
    for temperature in section.temperatures:
      responses, _ = system.respond(
          evaluation.members(system), run.responder, prompts,
          run.rng(f"frontier/{temperature}"), temperature=temperature, seed=run.config.seed,
          samples_per_prompt=k, on_batch=stoppable(bar.update),
      )
      texts = [
          response_text(run.tokenizer, r.tokens, r.hit_eos, run.stop_ids) for r in responses
      ]
      add(temperature, [texts[j * k : (j + 1) * k] for j in range(len(demos))])
  greedy = [
      [r["response"]] for r in read_lines(run.workdir.system_file(system.name))
      if r["mode"] == "greedy"
  ]
  add(0.0, greedy[:n])
  run.workdir.write(path, records)


@dataclasses.dataclass(frozen=True)
class Counts:
  """A system in one seed; the temperatures fall, and greedy decoding, if there, is the last."""

  temperatures: tuple[float, ...]
  samples: int  # per prompt, at the first temperature.
  accuracy_TxP: np.ndarray
  coverage_TxP: np.ndarray
  passed_TxP: np.ndarray  # 0 or 1.
  varied_P: np.ndarray  # whether a prompt counts for the coverage.
  unique_P: np.ndarray  # whether it counts for pass@k.

  @classmethod
  def of(cls, records: Iterable[Mapping[str, Any]]) -> "Counts":
    """Of the lines of samples/frontier/SYSTEM.jsonl."""
    rows: dict[float, list[Mapping[str, Any]]] = {}
    for record in records:
      rows.setdefault(record["temperature"], []).append(record)
    temperatures = tuple(sorted(rows, reverse=True))
    table = [sorted(rows[t], key=lambda r: r["prompt"]) for t in temperatures]
    array = lambda f: np.array([[f(r) for r in row] for row in table], np.float64)
    of = lambda group: np.array([group in r["groups"] for r in table[0]])
    kept = lambda mask: mask if mask.any() else np.ones_like(mask)
    return cls(
        temperatures,
        table[0][0]["samples"],
        array(lambda r: r["right"] / r["samples"]),
        array(lambda r: r["distinct"]),
        array(lambda r: r["right"] > 0),
        kept(of("varied")),
        kept(of("unique")),
    )

  def values(self, t: int) -> dict[str, np.ndarray]:
    """What is measured at the t-th temperature, a value for each prompt that counts."""
    return {
        "accuracy": self.accuracy_TxP[t],
        "coverage": self.coverage_TxP[t, self.varied_P],
        "pass_at_k": self.passed_TxP[t, self.unique_P],
    }

  def curve(self, weights_BxP: np.ndarray) -> Curve:
    """(accuracy, coverage) of the sampled temperatures, [B, T], where each prompt has a weight.

    The coverage of a resample without any prompt that counts for it is NaN.
    """
    sampled = np.array(self.temperatures) > 0
    mean = lambda w, v_TxP: w @ v_TxP[sampled].T / w.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
      return mean(weights_BxP, self.accuracy_TxP), mean(
          weights_BxP * self.varied_P, self.coverage_TxP
      )


def mean_difference(a: Curve, b: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The mean of y_a(x) - y_b(x) over the x that both curves reach; see the module docstring.

  Returns:
    (difference [...], NaN where the curves have no range in common; low [...]; high [...], the
    ends of that range).
  """
  (xa, ya), (xb, yb) = _monotone(a), _monotone(b)
  low, high = np.maximum(xa[..., 0], xb[..., 0]), np.minimum(xa[..., -1], xb[..., -1])
  knots = np.concatenate([xa, xb], axis=-1)
  knots = np.sort(np.clip(knots, low[..., None], high[..., None]), axis=-1)
  # Both are linear between knots, where the midpoint rule is exact, and a jump does not disturb it.
  middle, width = (knots[..., 1:] + knots[..., :-1]) / 2, np.diff(knots, axis=-1)
  gap = _interpolate(middle, xa, ya) - _interpolate(middle, xb, yb)
  total = width.sum(axis=-1)
  with np.errstate(invalid="ignore", divide="ignore"):
    mean = np.sum(width * gap, axis=-1) / total
  return np.where(total > 1e-9, mean, np.nan), low, high


def _monotone(curve: Curve) -> Curve:
  """Sorted by x; each y raised to the largest at its x or a larger one."""
  x, y = curve
  order = np.lexsort((y, x), axis=-1)
  x, y = (np.take_along_axis(v, order, axis=-1) for v in (x, y))
  return x, np.flip(np.maximum.accumulate(np.flip(y, axis=-1), axis=-1), axis=-1)


def _interpolate(at: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Linear interpolation, row by row: at [..., Q] within the sorted x [..., T]."""
  right = np.sum(x[..., None, :] <= at[..., :, None], axis=-1).clip(0, x.shape[-1] - 1)
  left = np.maximum(right - 1, 0)
  (x0, x1), (y0, y1) = (
      [np.take_along_axis(v, i, axis=-1) for i in (left, right)] for v in (x, y)
  )
  share = np.divide(at - x0, x1 - x0, out=np.zeros_like(at), where=x1 > x0)
  return y0 + share * (y1 - y0)


def summarize(folders: Sequence[pathlib.Path], names: Sequence[str]) -> dict[str, Any]:
  """Curves of systems, and their differences to SFT: what `compare_curves` returns, {} without any.

  Args:
    folders: samples/frontier of each seed.
    names: systems; those count that every seed has.
  """
  paths = {n: [f / f"{n}.jsonl" for f in folders] for n in names}
  found = {
      n: [Counts.of(read_lines(p)) for p in of] for n, of in paths.items()
      if all(p.exists() for p in of)
  }
  return compare_curves(found, "sft", "SFT") if found else {}


def compare_curves(
    found: Mapping[str, Sequence[Counts]], baseline: str, called: str
) -> dict[str, Any]:
  """Curves of systems, and their differences to one of them.

  Args:
    found: system -> counts of each seed.
    baseline: the system that others are compared with, where it is there.
    called: its name, in reasons.

  Returns:
    k; prompts (of each seed); temperatures; curves: system -> temperature,
    accuracy, coverage and pass_at_k ({mean, ci95, n}) of each temperature, greedy (0) last; and for
    every system but the baseline

    equal_accuracy: difference (of coverage), ci95, p, accuracy (the range it is the mean over);
    equal_coverage: likewise difference (of accuracy), coverage;
      where it cannot be known, difference is None and reason says why;
    equal_temperature: temperature (the first), accuracy and coverage ({difference, ci95, p}).
  """
  first = next(iter(found.values()))[0]
  out = {
      "k": first.samples, "prompts": first.accuracy_TxP.shape[1],
      "temperatures": list(first.temperatures),
      "curves": {name: _points(seeds) for name, seeds in found.items()},
  }
  if baseline in found:
    out |= {"equal_accuracy": {}, "equal_coverage": {}, "equal_temperature": {}}
  for name, seeds in found.items() if baseline in found else ():
    if name == baseline:
      continue
    out["equal_accuracy"][name] = _at_equal("accuracy", seeds, found[baseline], called)
    out["equal_coverage"][name] = _at_equal("coverage", seeds, found[baseline], called)
    out["equal_temperature"][name] = {"temperature": first.temperatures[0], **{
        key: compare(*([c.values(0)[key] for c in side] for side in (seeds, found[baseline])))
        for key in ("accuracy", "coverage")
    }}
  return out


def _points(seeds: Sequence[Counts]) -> list[dict[str, Any]]:
  out = []
  for t, temperature in enumerate(seeds[0].temperatures):
    values, point = [seed.values(t) for seed in seeds], {"temperature": temperature}
    for key in values[0]:
      point[key] = interval([v[key] for v in values])
      ends = np.clip(point[key]["ci95"], 0, seeds[0].samples if key == "coverage" else 1)
      point[key]["ci95"] = ends.tolist()
    out.append(point)
  return out


@functools.lru_cache(maxsize=4)
def _weights(prompts: int) -> np.ndarray:
  """How often each prompt counts: once in the first row, resampled in all others, [B + 1, P]."""
  rng = np.random.default_rng(0)
  resampled = rng.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES)
  return np.concatenate([np.ones((1, prompts)), resampled])


def _at_equal(
    what: str, system: Sequence[Counts], other: Sequence[Counts], called: str
) -> dict[str, Any]:
  """The difference to another in coverage at equal accuracy, or the other way round."""
  prompts = system[0].accuracy_TxP.shape[1]
  sides = [
      [c.curve(_weights(c.accuracy_TxP.shape[1])) for c in side] for side in (system, other)
  ]
  if what == "coverage":
    sides = [[(y, x) for x, y in curves] for curves in sides]
  results = [mean_difference(a, b) for a, b in zip(*sides, strict=True)]
  gaps_SxB = np.stack([gap for gap, _, _ in results])
  unknown = lambda reason: {"difference": None, "reason": reason}
  if np.isnan(gaps_SxB[:, 0]).any():
    above = all(a[0][0].min() > b[0][0].max() for a, b in zip(*sides))
    below = all(a[0][0].max() < b[0][0].min() for a, b in zip(*sides))
    where = "above" if above else "below" if below else ""
    return unknown(
        f"its {what} is {where} that of {called} at every temperature" if where
        else f"the two have no range of {what} in common"
    )
  shared = np.isfinite(gaps_SxB).all(axis=0).mean()
  if shared < _SHARED:
    return unknown(f"the two have a range of {what} in common in only {shared:.0%} of resamples")
  return {
      "difference": float(gaps_SxB[:, 0].mean()),
      **bootstrapped(gaps_SxB[:, 0], gaps_SxB[:, 1:], prompts),
      what: [float(np.mean([r[i][0] for r in results])) for i in (1, 2)],
  }
