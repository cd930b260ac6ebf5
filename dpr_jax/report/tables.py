"""results.json -> what the tables of the page show."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpr_jax.report.render import finite, number, significant

Results = Mapping[str, Any]

LABELS: dict[str, str] = {}
_MAIN = (
  "accuracy_sampled", "accuracy_greedy", "accuracy_sampled/unique", "accuracy_sampled/varied",
  "token_f1_sampled", "token_f1_greedy", "length_sampled", "eos_rate_sampled", "heldout_nll",
  "effective_samples", "reverse_kl", "forward_kl", "expert_logp",
)
_EXPERT = {  # Metrics against a known expert, and their names.
  "reverse_kl": "KL(system || expert)", "forward_kl": "KL(expert || system)",
  "expert_logp": "Log p under the expert, a token",
}
_KINDS = ("unique", "varied")  # groups of the built-in tasks, not tasks.
_SHARES = ("accuracy", "eos_rate", "token_f1")


def system_label(name: str) -> str:
  return LABELS.get(name, name.replace("_", " "))


def metric_label(metric: str) -> tuple[str, str]:
  """('Accuracy, sampled', '%'): heading and unit."""
  base, _, group = metric.partition("/")
  for mode in ("sampled", "greedy"):
    if base.endswith(f"_{mode}"):
      name = base.removesuffix(f"_{mode}").replace("_", " ")
      break
  else:
    name, mode = base.replace("_", " "), ""
  name = {"eos rate": "ends with EOS", "heldout nll": "held-out NLL", "token f1": "token F1",
            "sample nll base": "NLL of samples under base",
            "sample nll ref": "NLL of samples under ref"}.get(name, _EXPERT.get(base, name))
  label = name[:1].upper() + name[1:] + (f", {mode}" if mode else "")
  if group:
    label += {"unique": ", one right answer", "varied": ", many right answers"}.get(
      group, f", {group}"
    )
  return label, unit(metric)


def unit(metric: str) -> str:
  if metric.startswith(_SHARES):
    return "%"
  if metric.startswith("length"):
    return "tokens"
  return "nats" if "nll" in metric or metric in _EXPERT else ""


def show(x: Any, metric: str, sign: bool = False) -> str:
  """A value of a metric in its unit: shares as per cent, lengths with one decimal."""
  kind = unit(metric)
  if kind == "%" and finite(x):
    return number(100 * x, 1, sign)
  if kind in ("tokens", "nats"):
    return number(x, {"tokens": 1, "nats": 2}[kind], sign)
  text = significant(x)
  return f"+{text}" if sign and finite(x) and x > 0 else text


def results_table(results: Results) -> dict[str, Any] | None:
  """Systems by main metrics; `sign` where the interval of the difference to SFT excludes 0."""
  used = [m for m in _MAIN if _used(results, m)]
  table = _table(results, used)
  return table and {**table, "expert": any(m in _EXPERT for m in used)}


def more_metrics(results: Results) -> dict[str, Any] | None:
  """Whatever else was measured, tasks apart."""
  names = {m: None for metrics in _systems(results).values() for m in metrics if m not in _MAIN}
  whole = [m for m in names if "/" not in m]
  return _table(results, whole + [m for m in names if m.partition("/")[2] in _KINDS])


def task_tables(results: Results) -> list[dict[str, Any]]:
  """One table for each metric that is split by task: tasks by systems."""
  systems = _systems(results)
  groups: dict[str, dict[str, None]] = {}
  for metrics in systems.values():
    for metric in metrics:
      base, slash, task = metric.partition("/")
      if slash and task not in _KINDS:
        groups.setdefault(base, {})[task] = None
  tables = []
  for base, tasks in groups.items():
    used = [s for s, metrics in systems.items() if any(f"{base}/{t}" in metrics for t in tasks)]
    rows = []
    for task in tasks:
      cells = [cell(systems[s].get(f"{base}/{task}"), base) for s in used]
      counts = {c["n"] for c in cells if c["n"]}
      rows.append({"name": task, "cells": cells, "n": counts.pop() if len(counts) == 1 else ""})
    label, shown = metric_label(base)
    tables.append({
      "title": label, "unit": shown, "columns": [system_label(s) for s in used], "rows": rows,
    })
  return tables


def comparisons_table(results: Results) -> list[dict[str, Any]]:
  """Differences with interval, p and what they say; the bar is drawn on a scale of its metric."""
  found = [
    c for c in results.get("comparisons") or () if len(c.get("pair") or ()) == 2 and "metric" in c
  ]
  scale: dict[str, float] = {}
  for c in found:
    ends = [abs(x) for x in (c.get("difference"), *(c.get("ci95") or ())) if finite(x)]
    scale[unit(c["metric"])] = max([scale.get(unit(c["metric"]), 1e-12), *ends])
  rows = []
  for c in found:
    metric, (a, b) = c["metric"], (system_label(x) for x in c["pair"])
    low, high = c.get("ci95") or (math.nan, math.nan)
    known = finite(low) and finite(high) and finite(c.get("difference"))
    sign = resolved(c)
    label, shown = metric_label(metric)
    rows.append({
      "a": a,
      "b": b,
      "metric": label,
      "unit": "points" if shown == "%" else shown,
      "difference": show(c.get("difference"), metric, sign=True),
      "ci": f"[{show(low, metric, sign=True)}, {show(high, metric, sign=True)}]",
      "p": p_value(c.get("p")),
      "sign": sign,
      "verdict": {1: "above 0", -1: "below 0", 0: "may be 0"}[sign],
      "bar": known and {
        k: round(50 + 46 * x / scale[unit(metric)], 2)
        for k, x in (("low", low), ("high", high), ("at", c["difference"]))
      },
    })
  return rows


def resolved(comparison: Mapping[str, Any]) -> int:
  """1 or -1, the sign of a difference whose interval excludes 0 and whose p is below 0.05; else 0.

  Both, because an exact test of few differing prompts is stricter than any interval.
  """
  low, high = comparison.get("ci95") or (math.nan, math.nan)
  p = comparison.get("p")
  if not finite(low) or not finite(high) or (finite(p) and p >= 0.05):
    return 0
  return 1 if low > 0 else -1 if high < 0 else 0


def headline(results: Results) -> str:
  """The main result in a sentence, no stronger than its interval."""
  systems = _systems(results)
  metric = next((m for m in ("accuracy_sampled", "token_f1_sampled") if _used(results, m)), None)
  entry = systems.get("dpr", {}).get(metric) if metric else None
  if not entry or not finite(entry.get("mean")):
    return ""
  if metric == "accuracy_sampled":
    text = f"DPR answers {show(entry['mean'], metric)}% of held-out prompts right when sampled"
  else:
    text = f"DPR's sampled responses reach a token F1 of {show(entry['mean'], metric)}%"
  parts = []
  for other in ("sft", "continued_sft"):
    c = difference(results, "dpr", other, metric)
    if c is None:
      continue
    d, low, high = (show(x, metric, sign=True) for x in (c["difference"], *c["ci95"]))
    parts.append(
      f"{d} points against {system_label(other)} [{low}, {high}]"
      + ("" if resolved(c) else ", which may be 0")
    )
  return text + (": " + "; ".join(parts) if parts else "") + "."


def p_value(p: Any) -> str:
  if not finite(p):
    return "–"
  return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _systems(results: Results) -> Mapping[str, Mapping[str, Any]]:
  return results.get("systems") or {}


def _used(results: Results, metric: str) -> bool:
  return any(metric in metrics for metrics in _systems(results).values())


def cell(entry: Any, metric: str) -> dict[str, Any]:
  """What a table shows of {mean, ci95, n}, in the unit of the metric."""
  if not isinstance(entry, Mapping):
    return {"mean": "–", "ci": "", "n": "", "sign": 0}
  low, high = entry.get("ci95") or (math.nan, math.nan)
  known = finite(low) and finite(high)
  return {
    "mean": show(entry.get("mean"), metric),
    "ci": f"{show(low, metric)} – {show(high, metric)}" if known else "",
    "n": f"{entry['n']:,}" if finite(entry.get("n")) else "",
    "sign": 0,
  }


def _table(results: Results, metrics: Sequence[str]) -> dict[str, Any] | None:
  systems = _systems(results)
  if not systems or not metrics:
    return None
  rows, marked = [], False
  for name in systems:
    cells = []
    for metric in metrics:
      shown_cell = cell(systems[name].get(metric), metric)
      found = difference(results, name, "sft", metric)
      if found:
        shown_cell["sign"] = resolved(found)
        marked = marked or bool(shown_cell["sign"])
      cells.append(shown_cell)
    rows.append({"name": system_label(name), "cells": cells})
  columns = []
  for i, metric in enumerate(metrics):
    label, shown = metric_label(metric)
    counts = {row["cells"][i]["n"] for row in rows if row["cells"][i]["n"]}
    n = counts.pop() if len(counts) == 1 else ""
    if n:  # said once, in the heading.
      for row in rows:
        row["cells"][i]["n"] = ""
    columns.append({"label": label, "unit": shown, "n": n})
  return {"columns": columns, "rows": rows, "marked": marked}


def difference(results: Results, a: str, b: str, metric: str):
  """The comparison of a less b, from either order of the pair; None if they were not compared."""
  for c in results.get("comparisons") or ():
    ends = c.get("ci95") or (None, None)
    if c.get("metric") != metric or not finite(c.get("difference")) or not all(map(finite, ends)):
      continue
    if list(c.get("pair") or ()) == [a, b]:
      return c
    if list(c.get("pair") or ()) == [b, a]:
      return {**c, "difference": -c["difference"], "ci95": [-ends[1], -ends[0]]}
  return None
