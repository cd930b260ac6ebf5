"""The report of a workdir: a page that needs no other file, a pure function of the files there.

What is missing (no DPR stage yet, no samples) is left out, so the page can be written at
any time of a run, and again.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dpr_jax.data.wrong_answers import KINDS
from dpr_jax.errors import UserError
from dpr_jax.paths import as_path, write_atomically
from dpr_jax.report import figures, frontier, heatmap, sweeps, tables
from dpr_jax.report.cleaning import cleaning_table
from dpr_jax.report.corruption import corruption_tables
from dpr_jax.report.monitors import monitors
from dpr_jax.report.render import (
  count,
  duration,
  finite,
  number,
  plain,
  render,
  visible,
)
from dpr_jax.report.samples import samples_view
from dpr_jax.report.tables import Results


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
  """Writes report/report.html of a workdir, and its plots as PNG beside it.

  Args:
    workdir: of one seed, or of several (its seed_N/ are workdirs then).

  Returns:
    The path of the page.

  Raises:
    UserError: no such folder, or a JSON file in it that cannot be read.
  """
  root = as_path(workdir)
  if not root.is_dir():
    raise UserError(f"{root}: no such workdir; expected the folder of a run")
  seeds = _seed_folders(root)
  parts = list(seeds.values()) or [root]
  record = {**(_read_json(parts[0] / "config.json")), **_read_json(root / "config.json")}
  results = _read_json(root / "report" / "results.json")
  described = record.get("described") or {}
  known = {**(described.get("always") or {}), **(described.get("labels") or {})}
  results["labels"] = {**known, **(results.get("labels") or {})}
  stages = _read_stages(parts, list(results["labels"]))
  folder, verdicts = root / "report", results.get("gaming") or {}
  context = {
    "title": f"Run {visible(root.resolve().name)}",
    "headline": [t for t in (tables.headline(results), *frontier.sentences(results)) if t],
    "lead": (verdicts.get(results.get("main")) or {}).get("text", ""),
    "frontiers": [f for f in [figures.frontier_view(folder, results)] if f],
    "facts": _facts(record, results, stages, list(seeds))
    + _reference_facts(described, _read_json(parts[0] / "reference.json")),
    "stages": _stage_rows(results, stages, list(seeds)),
    "seeds": _seed_links(seeds),
    "sweep": sweeps.sweep_table(results, links=not seeds),
    "sweep_plot": figures.sweep_plot(folder, results),
    "corruption": corruption_tables(results),
    "cleaning": cleaning_table(results),
    "results": tables.results_table(results),
    "more": tables.more_metrics(results),
    "comparisons": tables.comparisons_table(results),
    "tasks": tables.task_tables(results),
    "notes": [str(n) for n in results.get("notes") or ()],
    "plots": figures.stage_curves(folder, results, stages, list(seeds)),
    "results_plot": figures.results_plot(folder, results),
    "monitors": _gaming(results) + monitors(stages, results),
    "config": json.dumps(record.get("config"), indent=2) if record.get("config") else "",
  }
  if not seeds:
    context |= _heatmaps(root / "samples") | {
      "samples": samples_view(_responses(root / "samples"), results)
    }
  page = folder / "report.html"
  write_atomically(page, render(**context))
  return page


# --- Reading --------------------------------------------------------------------------------------


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise UserError(f"{path}: not JSON: {e}; the run that made it can write it again") from None
  if not isinstance(value, dict):
    raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
  return value


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  from dpr_jax.training.metrics import read_metrics  # jax comes with it.

  return [line for line in read_metrics(path) if isinstance(line, dict)]


def _seed_folders(root: pathlib.Path) -> dict[int, pathlib.Path]:
  found = {}
  for path in root.glob("seed_*"):
    number = path.name.removeprefix("seed_")
    if path.is_dir() and number.isdecimal():
      found[int(number)] = path
  return dict(sorted(found.items()))


def _read_stages(parts: Sequence[pathlib.Path], known) -> dict[str, list[list[dict[str, Any]]]]:
  """stage -> lines for each seed, in the order of the labels, which is that of the run."""
  names = {path.parent.name for part in parts for path in part.glob("*/metrics.jsonl")}
  order = [n for n in known if n in names] + sorted(names - set(known))
  return {n: [_read_lines(part / n / "metrics.jsonl") for part in parts] for n in order}


# --- What was run ---------------------------------------------------------------------------------


def _facts(record, results, stages, seeds) -> list[tuple[str, str]]:
  """(name, text) of what a reader must know before the numbers."""
  config = record.get("config") or {}
  model, data = record.get("model") or {}, record.get("data") or {}
  facts = []
  if model:
    source = str(model.get("source") or "")
    text = "random weights" if source == "random" else pathlib.PurePath(source).name
    if finite(model.get("num_params")):
      text += f", {count(model['num_params'])} parameters"
    facts.append(("Model", text))
  section = config.get("data") or {}
  if section or data:
    source = section.get("demos")
    tasks = ", ".join(section.get("tasks") or ()) or "all"
    text = pathlib.PurePath(source).name if source else f"built-in tasks ({tasks})"
    if finite(data.get("demos")):
      text += f", {count(data['demos'])} demonstrations"
    elif not source and finite(section.get("num_demos")):
      text += f", {count(section['num_demos'])} demonstrations"
    if section.get("corrupt"):
      kind = section.get("corruption", "answer")
      text += f", {plain(100 * section['corrupt'])}% {KINDS[kind].label}"
    if section.get("minority"):
      text += f", {plain(100 * section['minority'])}% in brackets"
    facts.append(("Demonstrations", text))
  sweep = config.get("sweep") or {}
  if sweep.get("field"):
    values = ", ".join(str(v) for v in sweep.get("values") or ())
    facts.append(("Sweep", f"{sweep['field']} takes {values}, instead of the value below"))
  compared = (record.get("described") or {}).get("labels") or {}
  if compared:
    facts.append(("Compared with SFT", "; ".join(compared.values())))
    main = list(compared)[-1]
    section = {k: v for k, v in config.get("methods", {}).get(main, {}).items() if k != "label"}
    facts.append((compared[main], _settings(section)))
  known = seeds or results.get("seeds") or ([record["seed"]] if "seed" in record else [])
  if known:
    facts.append(("Seeds" if len(known) > 1 else "Seed", ", ".join(str(s) for s in known)))
  seconds = [lines[-1].get("seconds") for parts in stages.values() for lines in parts if lines]
  if any(finite(s) for s in seconds):
    facts.append(("Training time", duration(sum(s for s in seconds if finite(s)))))
  devices = record.get("devices") or {}
  if devices:
    facts.append(("Devices", f"{devices.get('count', '?')} × {devices.get('platform', '?')}"))
  versions = record.get("versions") or {}
  if versions:
    facts.append(("Versions", ", ".join(f"{k} {v}" for k, v in versions.items())))
  return [(name, visible(text)) for name, text in facts]


def _settings(section: Mapping[str, Any]) -> str:
  """'dpr, reward baseline_relative, beta 1': the fields that say something."""
  parts = [str(section["kind"])] if section.get("kind") else []
  for name, value in section.items():
    if isinstance(value, Mapping):
      value = _settings(value)
      value = f"({value})" if ", " in value else value
    elif isinstance(value, list):
      value = ", ".join(map(str, value))
    if name != "kind" and value not in (None, ""):
      shown = plain(value) if finite(value) else value
      parts.append(f"{name.replace('_', ' ')} {shown}")
  return ", ".join(parts)


def _reference_facts(described, record: Mapping[str, Any]) -> list[tuple[str, str]]:
  """What the reference is, with the figures of reference.json; of the first of several seeds."""
  found = record.get("candidates") or [{}]
  c = found[record.get("chosen") or 0]
  text = described.get("reference") or ""
  if "chosen" in record:
    text += f": {c.get('text')}, chosen among {len(found)}"
  if finite(c.get("kl")):
    error = f" ± {number(c['kl_se'], 2)}" if finite(c.get("kl_se")) else ""
    text += f"; on training prompts KL(sft || ref) {number(c['kl'], 2)}{error} nats per response"
    text += f", mean / std of token rewards {number(c.get('snr'), 2)}"
    text += f", AUC of corrupted tokens {tables.show(c.get('auc'), '%')}%"
  return [("Reference", visible(text))] if text else []


_SUSPECT = ("gaming", "suspected")  # verdicts.


def _gaming(results: Results) -> list[dict[str, str]]:
  """The verdict on each policy that has one and its signs, as entries of the monitors."""
  out = []
  for system, found in (results.get("gaming") or {}).items():
    who = tables.label(results, system)
    status = "watch" if found.get("verdict") in _SUSPECT else "note"
    text = str(found.get("text", ""))
    out.append({"name": f"{who}: gaming the reward", "text": text, "status": status})
    out += [
      {
        "name": f"{who}: sign of gaming, {s['name']}",
        "text": str(s["text"]),
        "status": "watch" if s["found"] else "note",
      }
      for s in found.get("signs") or ()
    ]
  return out


def _stage_rows(results: Results, stages, seeds) -> list[dict[str, str]]:
  rows = []
  for name, parts in stages.items():
    for i, lines in enumerate(parts):
      if not lines:
        continue
      last, known = lines[-1], (results.get("stages") or {}).get(name) or {}
      tokens, seconds = last.get("tokens"), last.get("seconds")
      rate = tokens / seconds if finite(tokens) and finite(seconds) and seconds > 0 else math.nan
      rows.append({
        "name": tables.label(results, name),
        "budget": str(known.get("own_budget") or ""),
        "seed": str(seeds[i]) if seeds else "",
        "steps": count(last.get("step")),
        "tokens": count(tokens),
        "time": duration(seconds),
        "rate": count(rate),
      })
  return rows


def _seed_links(seeds: Mapping[int, pathlib.Path]) -> list[dict[str, str]]:
  links = []
  for seed, path in seeds.items():
    there = (path / "report" / "report.html").exists()
    href = f"../{path.name}/report/report.html" if there else ""
    links.append({"name": f"seed {seed}", "href": href})
  return links


# --- Token rewards and samples --------------------------------------------------------------------


def _responses(samples: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  """system -> what it answered."""
  found = {}
  for path in samples.glob("*.jsonl"):
    if path.stem.startswith("heatmap_") or path.stem == "corruption":
      continue
    lines = [r for r in _read_lines(path) if "prompt" in r and "response" in r]
    if lines:
      found[path.stem] = lines
  return found


def _heatmaps(samples: pathlib.Path) -> dict[str, Any]:
  read = {
    "demos": ("Demonstrations", _read_lines(samples / "heatmap_demos.jsonl")),
    "rollouts": ("Rollouts", _read_lines(samples / "heatmap_rollouts.jsonl")),
  }
  scale = heatmap.limit(row for _, rows in read.values() for row in rows)
  sections = [
    {"id": key, "name": name, "rows": heatmap.heatmap_view(rows, scale)}
    for key, (name, rows) in read.items()
  ]
  return {"heatmaps": [s for s in sections if s["rows"]], "legend": heatmap.legend(scale)}
