"""The evaluation of a run: every system on the held-out prompts; samples/ of the workdir.

  SYSTEM.jsonl     one line per prompt and mode: the response with its scores.
  measures.json    what models measure of the systems, per prompt; and the meaning of all columns.
  frontier/        SYSTEM.jsonl: how many of several responses are right, by temperature.
  corruption.jsonl, heatmap_*.jsonl

A system whose file exists is done.
"""

import dataclasses
import functools
import json
from collections.abc import Collection
from typing import Any

import numpy as np

from dpr_jax.data.demos import as_record
from dpr_jax.data.loader import Prompts
from dpr_jax.data.templates import encode_response
from dpr_jax.evaluation import frontier
from dpr_jax.evaluation.corruption import corrupt_responses, corruption_records
from dpr_jax.evaluation.metrics import (
    ResponseMetric,
    SystemMetric,
    checked_measures,
    score_response,
)
from dpr_jax.evaluation.responses import compilations, response_text
from dpr_jax.evaluation.scoring import Scorer, fitting, score_record
from dpr_jax.evaluation.systems import System
from dpr_jax.loading import LoadedModel, load_checkpoint
from dpr_jax.references.base import Reference
from dpr_jax.sharding import barrier
from dpr_jax.signals import stoppable
from dpr_jax.workdir import read_lines


def systems_of(run: Any) -> list[System]:
  """base, ref, sft and what the run compares, in the order of tables."""
  refs = run.config.reference.num_members
  return [
      System("base", load=lambda: (run.initial_variables(run.dtype),)),
      # Of several models, the geometric mean answers.
      System("ref", load=lambda: run.reference().members, weights=(1.0 / refs,) * refs),
      System("sft", load=lambda: (run.sft(),)),
      *(method.system(run, name) for name, method in run.config.compared().items()),
  ]


def heldout_prompts(run: Any) -> Prompts:
  """The held-out prompts that are evaluated: `eval.num_prompts` after `eval.skip_prompts`."""
  section, held = run.config.eval, run.data.heldout
  end = section.skip_prompts + section.num_prompts if section.num_prompts else None
  chosen = slice(section.skip_prompts, end)
  return held._replace(tokens=held.tokens[chosen], demos=held.demos[chosen])


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What metrics may read."""

  run: Any

  @functools.cached_property
  def prompts(self) -> Prompts:
    return heldout_prompts(self.run)

  @functools.cached_property
  def demonstrated(self) -> list[np.ndarray]:
    """The demonstrated responses, token ids, int32 [T_i]."""
    return [
        encode_response(d.messages[-1], d.prompt, self.run.tokenizer, ended=d.ended)
        for d in self.prompts.demos
    ]

  def fitting(self, length: int) -> list[int]:
    """Indices of demonstrations that have a likelihood as a whole, within `length` tokens."""
    return fitting(self.prompts.tokens, self.demonstrated, length)

  @functools.cached_property
  def fits(self) -> list[int]:
    return self.fitting(self.run.model.cfg.max_length)

  @property
  def scorer(self) -> Scorer:
    return self.run.scorer

  @functools.cached_property
  def expert(self) -> LoadedModel:
    return load_checkpoint(self.run.config.eval.expert, self.run.mesh, self.run.dtype)

  def members(self, system: System) -> tuple[Any, ...]:
    """The variables of a system; those of the last system are held."""
    if self._loaded.get("name") != system.name:
      self._loaded.clear()
      self._loaded.update(name=system.name, members=system.load())
    return self._loaded["members"]

  @functools.cached_property
  def _loaded(self) -> dict[str, Any]:
    return {}

  def members_as_reference(self, system: System) -> Reference:
    """A trained system, or ref itself, to score with."""
    return self.run.reference() if system.name == "ref" else Reference(self.members(system))

  def judge(self, name: str) -> Reference:
    """base or ref."""
    if name == "ref":
      return self.run.reference()
    base = self.run.hold("base", lambda: self.run.initial_variables(self.run.dtype))
    return Reference.of(base)


def evaluate(run: Any, only: Collection[str] | None = None, measured: bool = True) -> None:
  """Responses and measures of every system, or of those named in `only`; then the frontier.

  Args:
    measured: False leaves out what models say of the systems, which may depend on ref.
  """
  evaluation = Evaluation(run)
  chosen = [s for s in systems_of(run) if only is None or s.name in only]
  measures = _Measures(run)
  for system in chosen:
    path = run.workdir.system_file(system.name)
    if not path.exists():
      records = _respond(evaluation, system)
      run.workdir.write(path, records)  # Last, and whole: a system whose file exists is done.
    barrier("responses")
    if measured:
      measures.add(evaluation, system)
    frontier.measure(evaluation, system)
  if chosen:
    run.log(f"evaluate: {compilations()} programs of decoding were compiled")
  barrier("evaluate")


def _respond(evaluation: Evaluation, system: System) -> list[dict[str, Any]]:
  """One record per prompt and mode, for samples/SYSTEM.jsonl."""
  run, prompts = evaluation.run, evaluation.prompts
  metrics = {
      name: m for name, m in run.config.eval.metrics.items() if isinstance(m, ResponseMetric)
  }
  records = []
  total = len(prompts.tokens) * len(system.modes) * system.candidates
  with run.bar(f"evaluate {system.name}", total, "response") as bar:
    for mode in system.modes:
      responses, extra = system.respond(
          evaluation.members(system),
          run.responder,
          prompts.tokens,
          run.rng("evaluate"),  # The same for all systems, so that they share their noise.
          temperature=system.temperature if mode == "sampled" else 0.0,
          seed=run.config.seed,
          on_batch=stoppable(bar.update),
      )
      for i, (demo, response, more) in enumerate(
          zip(prompts.demos, responses, extra, strict=True), start=1
      ):
        text = response_text(run.tokenizer, response.tokens, response.hit_eos, run.stop_ids)
        record = {
            "prompt": demo.prompt[-1]["content"],
            "task": demo.task,
            "groups": list(run.benchmark.groups(demo)),
            "answer": demo.answer,
            "mode": mode,
            "response": text,
            "correct": False,  # Both as scored below.
            "scores": {},
            "token_ids": [int(t) for t in response.tokens],
            "length": len(response.tokens),
            "hit_eos": response.hit_eos,
            "seed": run.config.seed,
            **more,
        }
        found, declared = run.benchmark.score(demo, text), run.benchmark.scores
        records.append(score_response(record, found, declared, metrics, f"prompt {i}"))
  return records


class _Measures:
  """samples/measures.json: values[system][column], and columns."""

  def __init__(self, run: Any):
    self._path = run.workdir.measures_file
    self._metrics = [
        m for m in run.config.eval.metrics.values() if isinstance(m, SystemMetric)
    ]
    found = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
    self._values = found.get("values", {})
    columns = {
        **run.benchmark.scores,
        **{
            name: m.column() for name, m in run.config.eval.metrics.items()
            if isinstance(m, ResponseMetric)
        },
    }
    for metric in self._metrics:
      columns.update(metric.columns)
    self._columns = {name: dataclasses.asdict(c) for name, c in columns.items()}

  def add(self, evaluation: Evaluation, system: System) -> None:
    """Measures a system with what has not been measured yet."""
    values, changed = self._values.setdefault(system.name, {}), False
    records = read_lines(evaluation.run.workdir.system_file(system.name))
    for metric in self._metrics:
      missing = not set(metric.columns) & set(values)
      if missing and metric.applies(evaluation, system):
        found = metric.measure(evaluation, system, records)
        n = len(evaluation.prompts.tokens)
        values.update(checked_measures(metric, found, system.name, n))
        changed = True
    if changed or not self._path.exists():
      evaluation.run.workdir.write(self._path, {"columns": self._columns, "values": self._values})


def write_corruption(run: Any) -> None:
  """Token rewards of held-out demonstrations with one wrong token; the same for every seed."""
  evaluation, path = Evaluation(run), run.workdir.corruption_file
  chosen = evaluation.fits[: run.config.eval.corrupted_tokens]
  if not chosen or path.exists():
    return
  demos = [evaluation.prompts.demos[i] for i in chosen]
  right = [evaluation.demonstrated[i] for i in chosen]
  corrupted = corrupt_responses(demos, right, run.tokenizer, run.stop_ids, run.benchmark)
  asked = [evaluation.prompts.tokens[chosen[c.index]] for c in corrupted]
  scores = [
      run.scorer.score(run.sft(), run.reference(), asked, responses)
      for responses in ([c.tokens for c in corrupted], [right[c.index] for c in corrupted])
  ]
  records = corruption_records(demos, corrupted, *scores, run.tokenizer, run.benchmark)
  run.workdir.write(path, records)


def write_heatmaps(run: Any) -> None:
  """Token rewards of some held-out demonstrations, and of the main system's answers to them."""
  evaluation, main = Evaluation(run), (run.config.compare or ("sft",))[-1]
  prompts, n = evaluation.prompts, min(run.config.eval.heatmaps, len(evaluation.prompts.demos))
  files = {name: run.workdir.samples / f"heatmap_{name}.jsonl" for name in ("demos", "rollouts")}
  if not n or all(path.exists() for path in files.values()):
    return
  answers = [r for r in read_lines(run.workdir.system_file(main)) if r["mode"] == "sampled"][:n]
  # (text, token ids) of each response; the sampled ids themselves, never the text encoded again.
  sources = {
      "demos": [(d.response, t) for d, t in zip(prompts.demos[:n], evaluation.demonstrated)],
      "rollouts": [(a["response"], np.asarray(a["token_ids"])) for a in answers],
  }
  for name, items in sources.items():
    tokens = [t for _, t in items]
    scores = run.scorer.score(run.sft(), run.reference(), prompts.tokens[:n], tokens)
    records = [
        {**as_record(d.prompt), "response": text, **score_record(run.tokenizer, t, s)}
        for d, (text, t), s in zip(prompts.demos[:n], items, scores, strict=True)
    ]
    if name == "rollouts":
      for record, answer in zip(records, answers):
        record["correct"] = answer["correct"]
    run.workdir.write(files[name], records)

