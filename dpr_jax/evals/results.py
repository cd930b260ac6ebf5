"""samples/ of one or several seeds -> results.json: means, intervals, comparisons.

A pure function of files, so that a report can be made again at any time.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpr_jax.data.tasks import TASKS
from dpr_jax.evals.corruption import CORRUPTION_FILE, summarise
from dpr_jax.evals.expert import equal_length_logp
from dpr_jax.evals.statistics import compare, interval
from dpr_jax.evals.systems import MODES
from dpr_jax.training.metrics import read_metrics
from dpr_jax.training.stopping import FILE as STOPPED_FILE
from dpr_jax.training.stopping import read_stopped

# The order of systems in tables, and what is compared with what; those a run lacks are skipped.
ORDER = (
    "base", "ref", "sft", "low_temperature", "contrastive", "weight_extrapolation",
    "resampled", "continued_sft", "dft", "iq_lm", "spin", "gsil", "log_likelihood", "endogenous",
    "sentence_level", "reward_to_go", "dpr",
)
_OTHERS = ORDER[3:-1]
PAIRS = (
    ("sft", "ref"),
    *((name, "sft") for name in _OTHERS),
    ("dpr", "sft"),
    *(("dpr", name) for name in _OTHERS),
    # The paper's DPR against everything; its own ablations are among the rest.
    *(("reward_to_go", name) for name in _OTHERS if name != "reward_to_go"),
)
NLL_FILE = "heldout_nll.json"
SAMPLE_NLL_FILE = "sample_nll.json"
EXPERT_FILE = "expert.json"


# Prefixes of what is compared between systems.
_COMPARED = (
    "accuracy", "token_f1", "length", "sample_nll", "reverse_kl", "forward_kl", "expert_logp",
)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _read_samples(samples: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  out = {}
  for path in sorted(samples.glob("*.jsonl")):
    if path.stem.startswith("heatmap_") or path.name == CORRUPTION_FILE:
      continue
    out[path.stem] = _read_lines(path)
  return out


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  with open(path, encoding="utf-8") as file:
    return [json.loads(line) for line in file]


def _metrics(records: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
  """Metric -> values per prompt, in the order of the prompts."""
  out = {}
  for mode in MODES:
    rows = [r for r in records if r["mode"] == mode]
    if not rows:
      continue
    for score in rows[0]["scores"]:
      out[f"{score}_{mode}"] = np.asarray([r["scores"][score] for r in rows], np.float64)
    tasks = sorted({r["task"] for r in rows if r["task"]})
    for task in tasks if len(tasks) > 1 else ():
      chosen = [r["correct"] for r in rows if r["task"] == task]
      out[f"accuracy_{mode}/{task}"] = np.asarray(chosen, np.float64)
    for kind, unique in (("unique", True), ("varied", False)):
      known = [r for r in rows if r["task"] in TASKS]
      chosen = [r["correct"] for r in known if TASKS[r["task"]].unique == unique]
      if chosen:
        out[f"accuracy_{mode}/{kind}"] = np.asarray(chosen, np.float64)
    out[f"length_{mode}"] = np.asarray([r["length"] for r in rows], np.float64)
    if "effective_samples" in rows[0]:
      out["effective_samples"] = np.asarray([r["effective_samples"] for r in rows], np.float64)
    out[f"eos_rate_{mode}"] = np.asarray([r["hit_eos"] for r in rows], np.float64)
  return out


def _expert_metrics(record: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
  """expert.json of one seed -> system -> metric -> values per prompt (or per demonstration)."""
  out = {}
  for name, found in record.items():
    sft = record.get("sft", found)
    logp = equal_length_logp(found["expert_logp"], sft["expert_logp"])
    out[name] = {"expert_logp": logp}
    for metric in ("reverse_kl", "forward_kl"):
      if found[metric]:  # No demonstration may fit the models.
        out[name][metric] = np.asarray(found[metric], np.float64)
  return out


def build_results(workdirs: Sequence[pathlib.Path], seeds: Sequence[int]) -> dict[str, Any]:
  """results.json of runs that differ in their seed only.

  `heldout_nll` is in nats a demonstrated response, EOS included; `sample_nll_base` and
  `sample_nll_ref` in nats a token of the system's own sampled responses, under base and ref.
  Where an expert is known, `reverse_kl` and `forward_kl` are in nats a response, of KL(system ||
  expert) and KL(expert || system), and `expert_logp` is its log p of the system's samples in nats a
  token, over as many tokens as the shorter one of the system's and SFT's responses to that prompt
  has; in a comparison, of the two compared.

  Returns:
    seeds; systems: name -> metric -> {mean, ci95, n}; comparisons: pair, metric, difference,
    ci95, p (paired over prompts); stages: steps, seconds and tokens of each, of the first seed;
    notes: sentences for the reader;
    corruption: see `evals.corruption.summarise`, absent if no seed has it.
  """
  per_seed = [_read_samples(w / "samples") for w in workdirs]
  names = [n for n in ORDER if all(n in s for s in per_seed)]
  names += sorted(n for n in per_seed[0] if n not in names and all(n in s for s in per_seed))
  nll = [json.loads((w / "samples" / NLL_FILE).read_text()) for w in workdirs]
  values = {n: [_metrics(samples[n]) for samples in per_seed] for n in names}
  experts = [_read_json(w / "samples" / EXPERT_FILE) for w in workdirs]
  for i, workdir in enumerate(workdirs):
    for name, judges in _read_json(workdir / "samples" / SAMPLE_NLL_FILE).items():
      for judge, nats in judges.items() if name in values else ():
        values[name][i][f"sample_nll_{judge}"] = np.asarray(nats, np.float64)
    for name, metrics in _expert_metrics(experts[i]).items():
      if name in values:
        values[name][i].update(metrics)
  systems = {}
  for name in names:
    shared = [m for m in values[name][0] if all(m in v for v in values[name])]
    systems[name] = {m: interval([v[m] for v in values[name]]) for m in shared}
  for name in names:
    if all(x.get(name) for x in nll):
      systems[name]["heldout_nll"] = interval([np.asarray(x[name]) for x in nll])
  comparisons = []
  for a, b in PAIRS:
    if a not in values or b not in values:
      continue
    for metric in values[a][0]:
      if "/" in metric or not metric.startswith(_COMPARED):
        continue
      if all(metric in v for v in (*values[a], *values[b])):
        of_a, of_b = ([v[metric] for v in values[name]] for name in (a, b))
        if metric == "expert_logp":
          logps = [(e[a]["expert_logp"], e[b]["expert_logp"]) for e in experts]
          of_a = [equal_length_logp(x, y) for x, y in logps]
          of_b = [equal_length_logp(y, x) for x, y in logps]
        found = compare(of_a, of_b)
        comparisons.append({"pair": [a, b], "metric": metric, **found})
  results = {
      "seeds": list(seeds),
      "systems": systems,
      "comparisons": comparisons,
      "stages": _stages(workdirs[0]),
      "notes": _notes(workdirs, seeds),
  }
  corrupted = [w / "samples" / CORRUPTION_FILE for w in workdirs]
  if all(path.exists() for path in corrupted):
    results["corruption"] = summarise([_read_lines(path) for path in corrupted])
  return results


def build_sweep_results(
    workdirs: Sequence[pathlib.Path], seeds: Sequence[int], field: str, folders: Mapping[str, str]
) -> dict[str, Any]:
  """results.json of a sweep whose seeds are in `workdirs`.

  Args:
    field: the dotted field that is swept over.
    folders: value -> name of the point's folder in each of `workdirs`.

  Returns:
    What `build_results` returns, of the systems that all points share (none, perhaps); and sweep:
    field, values, points: value, folder, systems, comparisons and corruption of each.
  """
  results = {"seeds": list(seeds), "systems": {}, "comparisons": [], "stages": {}, "notes": []}
  if all((w / "samples" / NLL_FILE).exists() for w in workdirs):
    results = build_results(workdirs, seeds)
  found = []
  for value, folder in folders.items():
    whole = build_results([w / folder for w in workdirs], seeds)
    kept = {k: whole[k] for k in ("systems", "comparisons", "corruption") if k in whole}
    found.append({"value": value, "folder": folder, **kept})
  results["sweep"] = {"field": field, "values": list(folders), "points": found}
  return results


def _notes(workdirs: Sequence[pathlib.Path], seeds: Sequence[int]) -> list[str]:
  """Stages that ended before their last step."""
  out = []
  for workdir, seed in zip(workdirs, seeds, strict=True):
    for path in sorted(workdir.glob(f"*/{STOPPED_FILE}")):
      found = read_stopped(path.parent)
      of = f" of seed {seed}" if len(seeds) > 1 else ""
      out.append(
          f"Stage {path.parent.name}{of} ended after step {found['step']} of {found['steps']}: "
          f"{found['reason']}. That step is its result; its baselines made all their steps."
      )
  return out


def _stages(workdir: pathlib.Path) -> dict[str, dict[str, float]]:
  out = {}
  for path in sorted(workdir.glob("*/metrics.jsonl")):
    lines = read_metrics(path)
    if lines:
      out[path.parent.name] = {
          "steps": lines[-1]["step"],
          "seconds": lines[-1]["seconds"],
          "tokens": lines[-1]["tokens"],
      }
  return out
