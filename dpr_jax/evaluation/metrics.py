"""Metrics: what a figure is (`Column`), and how it is measured of a system's responses.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Words(ResponseMetric):
      title, unit = "Words", "words"

      def score(self, record):
        return len(record["response"].split())

    config.eval.metrics.words = Words()               # or evaluate's --metrics=my_file.py:Words

In a run the column of a response metric is called NAME_sampled, NAME_greedy. A metric that needs a
model's opinion is a `SystemMetric`. `DEFAULTS` is the table of those that every run measures.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from dpr_jax.config.fields import Value, kind_of, setting, title_of
from dpr_jax.data.tasks import without_style
from dpr_jax.errors import UserError

MODES = ("sampled", "greedy")  # of answering; a column of each response has one of each.
# Groups of prompts of which every benchmark may make use, in words.
GROUPS = {"unique": "one right answer", "varied": "many right answers"}


@dataclasses.dataclass(frozen=True)
class Column:
  """One figure of results.json; the mean over prompts unless said otherwise."""

  label: str
  unit: str = ""  # "%" of a share in [0, 1], "nats per response", "tokens", ...
  better: int = 0  # 1: higher is better; -1: lower; 0: neither.
  compared: bool = True  # paired differences between systems are reported.
  main: bool = False  # is in the first table of the report.
  # The value of a prompt is a list, one number per token. It is averaged over as many tokens as
  # the shorter one of the two compared responses has, so that length alone cannot win.
  per_token: bool = False
  # A trained policy whose value is above SFT's by more shows a sign of a gamed reward; 0: no sign.
  alarm: float = 0.0
  note: str = ""  # a sentence below the table that shows it.

  def of_mode(self, mode: str) -> "Column":
    # Of greedy responses the first table has no more than how good they are.
    main = self.main and (mode == "sampled" or self.better != 0)
    return dataclasses.replace(self, label=f"{self.label}, {mode}", main=main)

  def of_group(self, group: str, main: bool = False) -> "Column":
    label = f"{self.label}, {GROUPS.get(group, group)}"
    return dataclasses.replace(self, label=label, compared=False, main=main and group in GROUPS)


ACCURACY = Column("Accuracy", "%", better=1, main=True)


class ResponseMetric(Value):
  """A figure of each response alone."""

  unit: ClassVar[str] = ""
  better: ClassVar[int] = 0
  compared: ClassVar[bool] = True
  main: ClassVar[bool] = False

  def score(self, record: Mapping[str, Any]) -> float:
    """Of one response: a line of samples/SYSTEM.jsonl, or of the responses.jsonl of `evaluate`.

    Both have prompt, answer, groups, response, token_ids, length and hit_eos.
    """
    raise NotImplementedError

  def column(self) -> Column:
    return Column(title_of(self), self.unit, self.better, self.compared, self.main)

  def column_names(self, name: str) -> tuple[str, ...]:
    """What its columns are called where the metric is called `name`."""
    return name, *(f"{name}_{mode}" for mode in MODES)


class SystemMetric(Value):
  """A figure of each prompt that needs models: the system's own, or others that score it."""

  columns: ClassVar[Mapping[str, Column]] = {}
  # Those with a value for each demonstration that fits the models, instead of for each prompt.
  of_demos: ClassVar[Collection[str]] = ()

  def column_names(self, name: str) -> tuple[str, ...]:
    """What its columns are called, whatever the metric is called."""
    return tuple(self.columns)

  def applies(self, evaluation: Any, system: Any) -> bool:
    """Whether it can be measured of a system."""
    return True

  def measure(
      self, evaluation: Any, system: Any, records: Sequence[Mapping[str, Any]]
  ) -> Mapping[str, Sequence[Any]]:
    """Column -> a value for each prompt, or demonstration (`of_demos`).

    A column that cannot be measured is left out.

    Args:
      evaluation: an `evaluate.Evaluation`: the run, prompts, demonstrated responses, a scorer.
      records: the lines of samples/SYSTEM.jsonl.
    """
    raise NotImplementedError


def checked_scores(found: Any, declared: Collection[str], where: str) -> dict[str, float]:
  """The scores of a response, in the order in which they are declared.

  Args:
    found: what a benchmark returned, or name -> what a metric returned.
    where: the prompt and its response, for errors.

  Raises:
    UserError: a score is missing, undeclared, or no finite number; names it.
  """
  if not isinstance(found, Mapping):
    raise UserError(f"{where}: the scores are {found!r}; they must be a mapping of "
                    f"{', '.join(declared)}")
  for name in [*declared, *found]:
    if name not in found or name not in declared:
      problem = "was not returned" if name not in found else "is not declared in `scores`"
      raise UserError(f"{where}: the score {name} {problem}; declared: {', '.join(declared)}")
  out = {}
  for name in declared:
    try:
      out[name] = float(found[name])
    except (TypeError, ValueError):
      out[name] = math.nan
    if not math.isfinite(out[name]):
      raise UserError(f"{where}: {name} is {found[name]!r}; a score must be a finite number")
  return out


def score_response(
    record: dict[str, Any], found: Any, declared: Collection[str],
    metrics: Mapping[str, ResponseMetric], where: str,
) -> dict[str, Any]:
  """`record` with its `scores`: those that a benchmark found, then those of metrics.

  Args:
    record: a line of samples/SYSTEM.jsonl or responses.jsonl, but for its scores. Where it has
      `correct`, as in a run, this is set too.
    found, declared: the scores that a benchmark returned, and its `scores`.
    where: names the prompt in errors.

  Raises:
    UserError: as `checked_scores`.
  """
  where = f"{where}: response {record['response'][:40]!r}"
  scores = checked_scores(found, declared, where)
  record = {**record, "scores": scores}
  if "correct" in record:
    record["correct"] = bool(scores["accuracy"])
  measured = {name: metric.score(record) for name, metric in metrics.items()}
  return {**record, "scores": {**scores, **checked_scores(measured, metrics, where)}}


def checked_measures(
    metric: SystemMetric, found: Any, system: str, num_prompts: int
) -> dict[str, list[Any]]:
  """What a system metric measured, without empty columns of demonstrations.

  Raises:
    UserError: an undeclared column, or one without a value for each prompt; names both.
  """
  where = f"metric {kind_of(metric)} of {system}"
  if not isinstance(found, Mapping):
    raise UserError(f"{where}: `measure` returned {found!r}; it must return a mapping of "
                    f"{', '.join(metric.columns)}")
  out = {}
  for name, values in found.items():
    if name not in metric.columns:
      raise UserError(f"{where}: {name} is not declared in `columns`; declared: "
                      f"{', '.join(metric.columns)}")
    values = list(values)
    if name in metric.of_demos:
      if len(values) > num_prompts:
        raise UserError(f"{where}: {name} has {len(values)} values; there are {num_prompts} "
                        "demonstrations")
      if not values:  # None of them fits.
        continue
    elif len(values) != num_prompts:
      raise UserError(f"{where}: {name} has {len(values)} values; it must have one for each of the "
                      f"{num_prompts} prompts")
    out[name] = values
  return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Length(ResponseMetric):
  """Tokens of a response, EOS included."""

  kind = "length"
  title, unit, main = "Length", "tokens", True

  def score(self, record):
    return record["length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EosRate(ResponseMetric):
  """Share of responses that ended by themselves."""

  kind = "eos_rate"
  title, unit, compared, main = "Ends with EOS", "%", False, True

  def score(self, record):
    return float(record["hit_eos"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repetition(ResponseMetric):
  """Share of the word n-grams of a response that it has had before; 0 of one without any.

  The seq-rep-n of Welleck et al. (2020, arXiv 1908.04319), over words, because systems may have
  different tokens.
  """

  kind = "repetition"
  title, unit = "Repeated word n-grams", "%"
  n: int = setting(4, "words of an n-gram", low=1)

  def score(self, record):
    words = record["response"].split()
    grams = list(zip(*(words[i:] for i in range(self.n))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinorityStyle(ResponseMetric):
  """Share of responses in the style of `config.data.minority`, right or wrong."""

  kind = "minority_style"
  title, unit = "In the minority's style", "%"

  def score(self, record):
    return float(without_style(record["response"]) != record["response"])


def _nll(logps: Sequence[np.ndarray]) -> list[float]:
  return [-float(x.astype(np.float64).sum()) for x in logps]


def _sampled(records: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
  return [np.asarray(r["token_ids"], np.int32) for r in records if r["mode"] == "sampled"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldoutNLL(SystemMetric):
  """Of the demonstrated responses, EOS included. Rises under DPR by design, and decides nothing."""

  kind = "heldout_nll"
  columns = {
      "heldout_nll": Column(
          "Held-out NLL", "nats per response", better=-1, compared=False, main=True
      )
  }
  of_demos = ("heldout_nll",)

  def applies(self, evaluation, system):
    return system.single

  def measure(self, evaluation, system, records):
    e = evaluation
    prompts, demonstrated = ([x[i] for i in e.fits] for x in (e.prompts.tokens, e.demonstrated))
    ref = e.members_as_reference(system)
    return {"heldout_nll": _nll(e.scorer.reference_logps(ref, prompts, demonstrated))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleNLL(SystemMetric):
  """The NLL of a system's samples under base and ref: a policy that games a log-ratio writes text
  that is unlikely under other models."""

  kind = "sample_nll"
  columns = {
      f"sample_nll_{name}": Column(f"NLL of samples under {name}", "nats per token", alarm=0.1)
      for name in ("base", "ref")
  }

  def applies(self, evaluation, system):
    return "sampled" in system.modes

  def measure(self, evaluation, system, records):
    e, responses = evaluation, _sampled(records)
    out = {}
    for name in ("base", "ref"):
      logps = e.scorer.reference_logps(e.judge(name), e.prompts.tokens, responses)
      # A response has a token at least.
      out[f"sample_nll_{name}"] = [-float(x.astype(np.float64).mean()) for x in logps]
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class EffectiveSamples(SystemMetric):
  """How many of the candidates of a resampled answer count; see `evaluation.resampling`."""

  kind = "effective_samples"
  columns = {"effective_samples": Column("Effective samples", compared=False, main=True)}

  def applies(self, evaluation, system):
    return system.candidates > 1

  def measure(self, evaluation, system, records):
    return {"effective_samples": [r["effective_samples"] for r in records]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expert(SystemMetric):
  """Distance to the known expert that made the demonstrations; see `evaluation.expert`."""

  kind = "expert"
  note = "The expert is the model that made the demonstrations."
  columns = {
      "reverse_kl": Column(
          "KL(system || expert)", "nats per response", better=-1, main=True, note=note
      ),
      "forward_kl": Column(
          "KL(expert || system)", "nats per response", better=-1, main=True, note=note
      ),
      "expert_logp": Column(
          "Log p under the expert", "nats per token", main=True, per_token=True,
          note="Log p under the expert is of a system's own samples, each cut to the length of "
          "SFT's where that is shorter; certainty alone raises it, even above the expert's own.",
      ),
  }
  of_demos = ("forward_kl",)

  def applies(self, evaluation, system):
    return bool(evaluation.run.config.eval.expert) and system.is_distribution

  def measure(self, evaluation, system, records):
    from dpr_jax.evaluation.expert import score_against_expert

    e, sampled = evaluation, _sampled(records)
    expert = e.expert
    length = min(e.run.model.cfg.max_length, expert.model.cfg.max_length)
    fits, n = e.fitting(length), len(e.prompts.tokens)
    scores = score_against_expert(
        e.scorer,
        system,
        e.members(system),
        expert,
        [*e.prompts.tokens, *(e.prompts.tokens[i] for i in fits)],
        [*sampled, *(e.demonstrated[i] for i in fits)],
    )
    total = lambda x: float(x.astype(np.float64).sum())
    return {
        "reverse_kl": [total(s.reverse_kl) for s in scores[:n]],
        "forward_kl": [total(s.forward_kl) for s in scores[n:]],
        "expert_logp": [[round(float(x), 6) for x in s.expert_logp] for s in scores[:n]],
    }


DEFAULTS = {
    "length": Length(),
    "eos_rate": EosRate(),
    "heldout_nll": HeldoutNLL(),
    "sample_nll": SampleNLL(),
    "effective_samples": EffectiveSamples(),
    "expert": Expert(),
}
