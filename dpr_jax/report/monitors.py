"""Plain sentences about what moved while a policy was trained, computed from its metrics.

A metric is summarised by the means of its first and last tenth of lines, five at least. It "moved"
if the difference exceeds twice its standard error (lines of a window taken as independent); with
several seeds, if it did so in every seed and in one direction.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dpr_jax.report import tables
from dpr_jax.report.render import count, finite, number, plain, significant

Lines = Sequence[Mapping[str, Any]]

FAR = 10.0  # nats per response from SFT; beyond it the policy is another model.


@dataclasses.dataclass(frozen=True)
class Change:
  """A metric in one seed: means of its first and last lines, and the error of their difference."""

  start: float
  end: float
  error: float

  @property
  def delta(self) -> float:
    return self.end - self.start

  @property
  def moved(self) -> bool:
    return abs(self.delta) > 2 * self.error and not math.isclose(
      self.start, self.end, rel_tol=1e-6, abs_tol=1e-9
    )


def change(values: Sequence[Any]) -> Change | None:
  """The change over the finite values; None for fewer than four."""
  known = np.array([v for v in values if finite(v)], np.float64)
  if len(known) < 4:
    return None
  size = min(len(known) // 2, max(5, len(known) // 10))
  first, last = known[:size], known[-size:]
  error = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / size) if size > 1 else 0.0
  return Change(float(first.mean()), float(last.mean()), error)


@dataclasses.dataclass(frozen=True)
class Trend:
  """A metric in all seeds."""

  changes: tuple[Change, ...]

  @property
  def start(self) -> float:
    return float(np.mean([c.start for c in self.changes]))

  @property
  def end(self) -> float:
    return float(np.mean([c.end for c in self.changes]))

  @property
  def delta(self) -> float:
    return self.end - self.start

  @property
  def direction(self) -> int:
    """1 rose, -1 fell (in every seed, beyond noise), 0 otherwise."""
    signs = {int(np.sign(c.delta)) if c.moved else 0 for c in self.changes}
    return signs.pop() if len(signs) == 1 else 0

  def phrase(self, unit: str = "", digits: int = 2, factor: float = 1.0) -> str:
    """'rose by 0.31 nats, from 1.20 to 1.51'."""
    unit = f" {unit}" if unit and unit != "%" else unit
    start, end = (number(factor * x, digits) for x in (self.start, self.end))
    if not self.direction:
      text = f"stayed within noise, {start} at first and {end}{unit} at last"
      moved = sum(c.moved for c in self.changes)
      return text + (f" (moved in {moved} of {len(self.changes)} seeds)" if moved else "")
    verb = "rose" if self.direction > 0 else "fell"
    by = number(abs(factor * self.delta), digits) + (" points" if unit == "%" else unit)
    return f"{verb} by {by}, from {start} to {end}" + (unit if unit == "%" else "")


def trend_of(seeds: Sequence[Lines], key: str) -> Trend | None:
  """The trend of a metric; None where a seed has too few lines of it."""
  changes = [change([line.get(key) for line in lines]) for lines in seeds]
  return Trend(tuple(changes)) if changes and all(changes) else None


def monitors(
  stages: Mapping[str, Sequence[Lines]], results: Mapping[str, Any]
) -> list[dict[str, str]]:
  """What happened, a dict of name, text and status ("watch" where a reader should look closer).

  Args:
    stages: stage -> lines of its metrics.jsonl, for each seed.
    results: results.json, for the scores of the task, and for labels.
  """
  out = []
  for stage, seeds in stages.items():
    if not any(len(lines) for lines in seeds):
      continue
    trend = functools.partial(trend_of, seeds)
    found = [_loss(trend)]
    if any("reward" in line for lines in seeds for line in lines):
      found = [
        _reward(trend), _goal(trend, results, stage), _divergence(trend, _known(seeds, "beta")),
        _plausibility(trend), _stopping(trend), _variety(trend), _sampling(seeds),
      ]
    found += [_broken(seeds)]
    out += [{**m, "name": f"{tables.label(results, stage)}: {m['name']}"} for m in found if m]
  return out


def _monitor(name: str, text: str, watch: bool = False) -> dict[str, str]:
  return {"name": name, "text": text, "status": "watch" if watch else "note"}


def _reward(trend: Callable[[str], Trend | None]) -> dict[str, str] | None:
  reward, each, length = (trend(k) for k in ("reward", "reward_per_token", "response_length"))
  if reward is None:
    return None
  text = f"Reward {reward.phrase('nats per response')}"
  if length is not None:
    text += f", while response length {length.phrase('tokens', 1)}"
  text += "."
  hollow = False
  if each is not None:
    text += f" Per token, reward {each.phrase('nats', 3)}."
    longer = length is not None and length.direction > 0
    hollow = reward.direction > 0 and longer and each.direction <= 0
    if hollow:
      text += " The gain comes from longer responses, not from better tokens."
  return _monitor("reward and length", text, hollow)


def _goal(trend, results: Mapping[str, Any], stage: str) -> dict[str, str] | None:
  """The reward is a proxy: did the task improve as well?"""
  reward, metric = trend("reward"), next(iter(tables.goals(results)), "")
  c = tables.difference(results, stage, "sft", metric)
  if reward is None or c is None:
    return None
  about = tables.column(results, metric)
  name, unit = tables.in_sentence(about), about["unit"]
  moved = {1: "rose", 0: "stayed within noise", -1: "fell"}[reward.direction]
  text = f"Reward {moved}; {name}, on held-out prompts differs from SFT's by "
  text += f"{tables.gap(c, unit)} {tables.interval(c, unit)}"
  sign = about["better"] * tables.resolved(c)
  text += {1: ", a gain.", -1: ", a loss.", 0: ", which may be 0."}[sign]
  if reward.direction > 0 and sign < 0:
    text += " A reward that rises while the task suffers is the mark of a gamed reward."
  return _monitor("reward against the task", text, sign < 0)


def _divergence(trend, betas: Sequence[float]) -> dict[str, str] | None:
  kl, shaped = trend("kl"), trend("shaped_reward")
  if kl is None:
    return None
  text = f"The sampled KL from the policy to SFT {kl.phrase('nats per response')}."
  watch = kl.end > FAR
  if watch:
    text += " That is far from SFT; look at the samples before trusting the reward."
  if shaped is not None:
    weight = f" (beta = {plain(betas[0])})" if len(set(betas)) == 1 else ""
    text += f" Reward minus the KL penalty{weight}, the objective, {shaped.phrase('nats')}."
    watch = watch or shaped.direction < 0
  return _monitor("KL to SFT", text, watch)


def _plausibility(trend) -> dict[str, str] | None:
  sft, ref = trend("sft_logp"), trend("ref_logp")
  if sft is None or ref is None:
    return None
  text = (
    f"The log-probability of a sampled token under SFT {sft.phrase('nats')}; "
    f"under ref it {ref.phrase('nats')}."
  )
  watch = sft.direction < 0
  if watch:
    text += " SFT finds the samples less likely than at first."
  return _monitor("likelihood of the samples", text, watch)


def _stopping(trend) -> dict[str, str] | None:
  rate, reward = trend("eos_rate"), trend("reward_eos")
  if rate is None:
    return None
  text = f"The share of responses that end with EOS {rate.phrase('%', 1, 100)}"
  text += "; the rest were cut at the token limit."
  if reward is not None:
    text += f" The reward on the EOS token itself {reward.phrase('nats')}."
  return _monitor("stopping", text, rate.end < 0.9 or rate.direction < 0 and rate.delta < -0.02)


def _variety(trend) -> dict[str, str] | None:
  entropy, distinct = trend("entropy"), trend("distinct_2")
  if entropy is None:
    return None
  text = f"Entropy {entropy.phrase('nats per token', 3)}."
  if distinct is not None:
    text += f" The share of distinct bigrams in a batch {distinct.phrase('%', 1, 100)}."
  halved = entropy.direction < 0 and entropy.end < 0.5 * entropy.start
  if halved:
    text += " The policy has become far less varied."
  return _monitor("variety", text, halved)


def _sampling(seeds: Sequence[Lines]) -> dict[str, str] | None:
  gaps = _known(seeds, "decode_gap")
  if not gaps:
    return None
  # Float32 agrees to about 1e-5; bfloat16 moves a log-probability by some hundredths.
  text = (
    "Log-probabilities while sampling and in the loss differ by "
    f"{significant(max(gaps), 2)} nats per token in the mean of the worst step"
  )
  drift = _known(seeds, "on_policy_drift")
  if drift:
    text += (
      "; with their signs, which on-policy training takes to cancel, by "
      f"{significant(max(abs(x) for x in drift), 2)}"
    )
  return _monitor("sampling and scoring agree", text + ".", max(gaps) > 0.3)


def _loss(trend) -> dict[str, str] | None:
  loss = trend("loss")
  return loss and _monitor("loss", f"Loss {loss.phrase('', 3)}.", loss.direction > 0)


def _broken(seeds: Sequence[Lines]) -> dict[str, str] | None:
  """Lines whose numbers are not finite."""
  bad = sum(
    any(isinstance(v, float) and not math.isfinite(v) for v in line.values())
    for lines in seeds for line in lines
  )
  total = sum(len(lines) for lines in seeds)
  if not bad:
    return None
  text = f"{count(bad)} of {count(total)} lines of the metrics hold a number that is not finite."
  return _monitor("not finite", text, True)


def _known(seeds: Sequence[Lines], key: str) -> list[float]:
  return [line[key] for lines in seeds for line in lines if finite(line.get(key))]
