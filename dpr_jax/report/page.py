"""The report of a workdir: a page that needs no other file, a pure function of the files there.

Whatever is missing (no DPR stage yet, no samples) is left out, so the page can be written at
any time of a run, and again.
"""

import base64
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dpr_jax.errors import UserError
from dpr_jax.report import heatmap, sweeps, tables
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
  write_atomically,
)

MAX_SAMPLES = 12  # prompts whose responses are shown.
MAX_CHARACTERS = 800  # shown of a response.
_STAGES = ("sft", "dpr", "continued_sft")

# File name, stage, metric, title, axis.
CURVES = (
  ("sft_loss", "sft", "loss", "SFT loss", "nats a token"),
  ("dpr_reward", "dpr", "reward", "DPR reward", "nats a response"),
  ("dpr_kl", "dpr", "kl", "KL to SFT", "nats a response"),
  ("dpr_response_length", "dpr", "response_length", "Response length", "tokens"),
  ("dpr_eos_rate", "dpr", "eos_rate", "EOS rate", "share of responses"),
  ("dpr_entropy", "dpr", "entropy", "Entropy", "nats a token"),
  ("continued_sft_loss", "continued_sft", "loss", "Continued SFT loss", "nats a token"),
)


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
  """Writes report/report.html of a workdir, and its plots as PNG beside it.

  Args:
    workdir: of one seed, or of several (its seed_N/ are workdirs then).

  Returns:
    The path of the page.

  Raises:
    UserError: no such folder, or a JSON file in it that cannot be read.
  """
  root = pathlib.Path(workdir)
  if not root.is_dir():
    raise UserError(f"{root}: no such workdir; expected the folder of a run")
  seeds = _seed_folders(root)
  parts = list(seeds.values()) or [root]
  record = {**(_read_json(parts[0] / "config.json")), **_read_json(root / "config.json")}
  results = _read_json(root / "report" / "results.json")
  stages = _read_stages(parts)
  folder = root / "report"
  context = {
    "title": f"Run {visible(root.resolve().name)}",
    "headline": tables.headline(results),
    "lead": (results.get("gaming") or {}).get("text", ""),
    "facts": _facts(record, results, stages, list(seeds))
    + _reference_facts(_read_json(parts[0] / "reference.json")),
    "stages": _stage_rows(stages, list(seeds)),
    "seeds": _seed_links(seeds),
    "sweep": sweeps.sweep_table(results, links=not seeds),
    "sweep_plot": _sweep_plot(folder, results),
    "corruption": corruption_tables(results),
    "results": tables.results_table(results),
    "more": tables.more_metrics(results),
    "comparisons": tables.comparisons_table(results),
    "tasks": tables.task_tables(results),
    "notes": [str(n) for n in results.get("notes") or ()],
    "plots": _curves(folder, stages, list(seeds)),
    "results_plot": _results_plot(folder, results),
    "monitors": _gaming(results)
    + monitors(stages, results.get("comparisons") or (), record.get("config")),
    "config": json.dumps(record.get("config"), indent=2) if record.get("config") else "",
  }
  if not seeds:
    context |= _heatmaps(root / "samples") | {"samples": _samples(root / "samples")}
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


def _read_stages(parts: Sequence[pathlib.Path]) -> dict[str, list[list[dict[str, Any]]]]:
  """stage -> lines for each seed, in the order in which stages are run."""
  names = {path.parent.name for part in parts for path in part.glob("*/metrics.jsonl")}
  order = [n for n in _STAGES if n in names] + sorted(names - set(_STAGES))
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
      text += f", {plain(100 * section['corrupt'])}% with a wrong answer"
    facts.append(("Demonstrations", text))
  sweep = config.get("sweep") or {}
  if sweep.get("field"):
    values = ", ".join(str(v) for v in sweep.get("values") or ())
    facts.append(("Sweep", f"{sweep['field']} takes {values}, in place of what stands below"))
  dpr = config.get("dpr") or {}
  if dpr.get("steps"):
    text = f"{str(dpr.get('reward')).replace('_', ' ')} reward"
    text += _reference_text(config.get("reference") or {})
    if dpr.get("transforms"):
      text += f", transforms {', '.join(dpr['transforms'])}"
    if dpr.get("verifier_weight"):
      text += f", {plain(100 * dpr['verifier_weight'])}% of the reward from the verifier"
    text += "".join(
      f", {name} {plain(dpr[name])}"
      for name in ("beta", "gamma")
      if finite(dpr.get(name)) and (name == "beta" or dpr.get("returns") == "reward_to_go")
    )
    if dpr.get("target_kl"):
      text += f" (beta at first; steered to a KL of {plain(dpr['target_kl'])} nats a response)"
    if dpr.get("kl_budget"):
      text += f", KL budget {plain(dpr['kl_budget'])} nats a response"
    text += f", {str(dpr.get('returns')).replace('_', ' ')}"
    text += f", baseline {str(dpr.get('baseline')).replace('_', ' ')}"
    facts.append(("DPR", text))
    if (dpr.get("temperature"), dpr.get("top_k"), dpr.get("top_p")) not in (
      (1, 0, 1), (None, None, None)
    ):
      facts.append((
        "Biased gradient",
        f"sampled at temperature {dpr.get('temperature')}, top-k {dpr.get('top_k')}, "
        f"top-p {dpr.get('top_p')}, not from the policy itself",
      ))
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


def _reference_text(section: Mapping[str, Any]) -> str:
  """', ref at 50% of SFT'"""
  kind, fraction = section.get("kind", "midrun"), section.get("fraction")
  if kind == "ema":
    return f", ref the moving average of SFT (decay {plain(section.get('ema_decay'))})"
  if kind.startswith("ensemble_"):
    parts = ", ".join(f"{plain(100 * f)}%" for f in section.get("fractions") or ())
    how = kind.removeprefix("ensemble_").replace("_", " ")
    return f", ref the {how} of SFT at {parts}"
  if section.get("select", "none") != "none":
    return f", ref a milestone of SFT selected by {section['select']}"
  if not finite(fraction):
    return ""
  if kind == "half_data":
    return f", ref trained on {plain(100 * fraction)}% of the demonstrations"
  return f", ref at {plain(100 * fraction)}% of SFT"


def _reference_facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
  """What reference.json says of the reference that was used; of the first of several seeds."""
  found = record.get("candidates") or []
  used = [c for c in found if c.get("fraction") == record.get("fraction")]
  if not used or not finite(used[0].get("kl")):
    return []
  c = used[0]
  text = f"{', '.join(c.get('members') or ())}: KL(sft || ref) {number(c['kl'], 2)}"
  if finite(c.get("kl_se")):
    text += f" ± {number(c['kl_se'], 2)}"
  text += f" nats a response, on {count(record.get('prompts'))} training prompts"
  if record.get("select", "none") != "none":
    text += f"; selected by {record['select']} among {len(found)}"
  return [("Reference", visible(text))]


_GAMING_STATUS = {"gaming": "watch", "suspected": "watch"}


def _gaming(results: Mapping[str, Any]) -> list[dict[str, str]]:
  """The verdict and its signs, as entries of the monitors."""
  found = results.get("gaming") or {}
  if not found:
    return []
  status = _GAMING_STATUS.get(found.get("verdict"), "note")
  out = [{"name": "Gaming the reward", "text": str(found.get("text", "")), "status": status}]
  out += [
    {
      "name": f"Sign of gaming: {s['name']}",
      "text": str(s["text"]),
      "status": "watch" if s["found"] else "note",
    }
    for s in found.get("signs") or ()
  ]
  for name, of in (results.get("gaming_of_ablations") or {}).items():
    out.append({
      "name": f"Gaming the reward: {tables.system_label(name)}", "text": str(of.get("text", "")),
      "status": _GAMING_STATUS.get(of.get("verdict"), "note"),
    })
  return out


def _stage_rows(stages, seeds) -> list[dict[str, str]]:
  rows = []
  for name, parts in stages.items():
    for i, lines in enumerate(parts):
      if not lines:
        continue
      last = lines[-1]
      tokens, seconds = last.get("tokens"), last.get("seconds")
      rate = tokens / seconds if finite(tokens) and finite(seconds) and seconds > 0 else math.nan
      rows.append({
        "name": tables.system_label(name),
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


# --- Plots ----------------------------------------------------------------------------------------


def _images(folder: pathlib.Path, name: str, alt: str, draw) -> dict[str, str]:
  """Draws a plot for light and dark pages; the light one is also a file."""
  light = draw(dark=False)
  write_atomically(folder / f"{name}.png", light)
  uris = [
    "data:image/png;base64," + base64.b64encode(image).decode("ascii")
    for image in (light, draw(dark=True))
  ]
  return {"light": uris[0], "dark": uris[1], "alt": alt, "name": name}


def _curves(folder: pathlib.Path, stages, seeds) -> list[dict[str, str]]:
  known = {stage for _, stage, *_ in CURVES}
  others = [
    (f"{name}_loss", name, "loss", f"{tables.system_label(name)} loss", "nats a token")
    for name in stages if name not in known
  ]
  out = []
  for name, stage, key, title, axis in (*CURVES, *others):
    out += [
      _images(folder, name, f"{title} ({axis}) over steps", draw)
      for draw in [_curve(stages.get(stage) or (), key, title, axis, seeds)] if draw
    ]
  return out


def _curve(parts, key: str, title: str, axis: str, seeds):
  """A function that draws the metric, or None if no line has it."""
  series = []
  for i, lines in enumerate(parts):
    points = [(line["step"], line[key]) for line in lines if key in line and "step" in line]
    values = [v if finite(v) else math.nan for _, v in points]
    if any(math.isfinite(v) for v in values):
      series.append((f"seed {seeds[i]}" if seeds else "", [s for s, _ in points], values))
  if not series:
    return None

  def draw(dark: bool) -> bytes:
    from dpr_jax.report import plots

    return plots.curve([plots.Series(*s) for s in series], title, axis, dark)

  return draw


def _results_plot(folder: pathlib.Path, results) -> dict[str, str] | None:
  systems = results.get("systems") or {}
  metrics = [
    (m, f"{label}{f' ({shown})' if shown else ''}", 100.0 if shown == "%" else 1.0)
    for m in ("accuracy_sampled", "accuracy_greedy", "token_f1_sampled", "length_sampled")
    for label, shown in [tables.metric_label(m)]
    if any(m in s for s in systems.values())
  ][:3]
  if not metrics:
    return None
  shown = {tables.system_label(name): values for name, values in systems.items()}

  def draw(dark: bool) -> bytes:
    from dpr_jax.report import plots

    return plots.results_plot(shown, metrics, dark)

  return _images(folder, "results", "Systems with their 95% intervals", draw)


def _sweep_plot(folder: pathlib.Path, results) -> dict[str, str] | None:
  metric = sweeps.primary_metric(results)
  if metric is None:
    return None
  label, shown = tables.metric_label(metric)
  sweep = results["sweep"]
  values, field = [visible(p["value"]) for p in sweep["points"]], visible(sweep.get("field", ""))
  series = sweeps.plot_series(results, metric)
  axis, factor = (f"{label} (%)", 100.0) if shown == "%" else (label, 1.0)

  def draw(dark: bool) -> bytes:
    from dpr_jax.report import plots

    return plots.sweep_plot(values, series, field, axis, factor, dark)

  return _images(folder, "sweep", f"{label} against {field}, with 95% intervals", draw)


# --- Token rewards and samples --------------------------------------------------------------------


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


def _samples(folder: pathlib.Path) -> dict[str, Any] | None:
  """Responses of every system to a few prompts: the first of each task in turn, never chosen."""
  systems = {}
  for path in folder.glob("*.jsonl"):
    if path.stem.startswith("heatmap_") or path.stem == "corruption":
      continue
    lines = [r for r in _read_lines(path) if "prompt" in r and "response" in r]
    if lines:
      systems[path.stem] = lines
  if not systems:
    return None
  order = [n for n in tables.LABELS if n in systems] + sorted(set(systems) - set(tables.LABELS))
  modes = {r.get("mode") for lines in systems.values() for r in lines}
  mode = "sampled" if "sampled" in modes else "greedy" if "greedy" in modes else None
  prompts: dict[tuple[str, str], dict[str, Any]] = {}
  for name in order:
    for r in systems[name]:
      if mode and r.get("mode") != mode:
        continue
      key = (str(r.get("task") or ""), str(r["prompt"]))
      entry = prompts.setdefault(key, {"answer": r.get("answer"), "responses": {}})
      entry["responses"].setdefault(name, r)  # the first, where a prompt occurs twice.
  chosen = _in_turn(list(prompts))[:MAX_SAMPLES]
  return {
    "mode": mode or "",
    "total": count(len(prompts)),
    "prompts": [
      {
        "task": visible(key[0]),
        "prompt": _cut(key[1]),
        "answer": "" if prompts[key]["answer"] is None else _cut(prompts[key]["answer"]),
        "responses": [
          _response(name, prompts[key]["responses"][name])
          for name in order if name in prompts[key]["responses"]
        ],
      }
      for key in chosen
    ],
  }


def _in_turn(keys: list[tuple[str, str]]) -> list[tuple[str, str]]:
  """The first key of each task, then the second of each, ..."""
  seen: dict[str, int] = {}
  ranked = []
  for i, key in enumerate(keys):
    seen[key[0]] = seen.get(key[0], 0) + 1
    ranked.append((seen[key[0]], i, key))
  return [key for _, _, key in sorted(ranked)]


def _response(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
  correct = record.get("correct")
  return {
    "system": tables.system_label(name),
    "text": _cut(record["response"]),
    "correct": correct if isinstance(correct, bool) else None,
    "cut": record.get("hit_eos") is False,
  }


def _cut(text: Any) -> str:
  text = str(text)
  more = len(text) - MAX_CHARACTERS
  shown = visible(text[:MAX_CHARACTERS])
  return f"{shown} … ({more:,} more characters)" if more > 0 else shown
