"""The page that puts systems side by side, from what `evaluation.side_by_side` found."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpr_jax.report import figures, heatmap, tables
from dpr_jax.report.render import finite, render, visible
from dpr_jax.report.samples import cut
from dpr_jax.report.tables import Results

_PANELS = 3  # of one plot.
Scored = Mapping[tuple[str, str], Mapping[str, Any]]  # (prompt, response) -> a line of `score`.


def side_by_side_page(results: Results, scored: Scored, title: str) -> str:
  """A page that needs no other file and no network, as HTML.

  Args:
    results: what `evaluation.side_by_side.side_by_side` returns.
    scored: responses with token rewards, as `dpr_jax.score` writes them.
  """
  base, benchmarks = results["baseline"], results["benchmarks"]
  main = [b["metric"] for b in benchmarks]
  comparisons = tables.comparisons_table(results)
  for row in comparisons:
    row["aside"] = tables.label(results, base) not in (row["a"], row["b"])
  examples, scale = _examples(results, scored)
  return render(
    title=title,
    headline=headlines(results),
    baseline=tables.label(results, base),
    benchmarks=tables.table(results, main),
    benchmark_plots=[
      plot for i in range(0, len(main), _PANELS)
      if (plot := figures.results_plot(None, results, i))
    ],
    more_of=[
      (b["label"], table) for b in benchmarks if (table := _more(results, b))
    ],
    compared_notes=results["notes"],
    comparisons=comparisons,
    judged=[_matrix(results, t["cells"], t["references"], t["name"]) for t in results["judged"]],
    wins=[_matrix(results, t["cells"], list(results["systems"]), t["benchmark"])
          for t in results["wins"]],
    frontiers=[
      view for name, found in results["frontiers"].items()
      if (view := figures.frontier_view(None, {**results, "frontier": found}, name))
    ],
    texts=[table for name in ("length", "repetition") if (table := _of_texts(results, name))],
    examples=examples,
    legend=heatmap.legend(scale) if scale else None,
    facts=[
      (f"{b['label']}, {b['prompts']} prompts",
       "; ".join(f"{s}: {', '.join(paths)}" for s, paths in b["folders"].items()))
      for b in benchmarks
    ],
  )


def headlines(results: Results) -> list[str]:
  """Of each system on how many benchmarks it is better than the baseline, or worse."""
  out, base = [], results["baseline"]
  for name in results["systems"]:
    said: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for b in results["benchmarks"]:
      c = tables.difference(results, name, base, b["metric"])
      about = tables.column(results, b["metric"])
      if name != base and c and about["better"]:
        gap = tables.gap(c, about["unit"])
        said[about["better"] * tables.resolved(c)].append(f"{b['label']} ({gap})")
    verbs = {1: "better on", 0: "not told apart on", -1: "worse on"}
    parts = [f"{verbs[sign]} {'; '.join(found)}" for sign, found in said.items() if found]
    if parts:
      out.append(f"{name} against {base}: {', '.join(parts)}.")
  return out


def _more(results: Results, benchmark: Mapping[str, Any]) -> dict[str, Any] | None:
  """Systems by all figures of a column of the page, but the main one."""
  prefix = f"{benchmark['label']}: "
  names = [m for m in results["columns"] if m.startswith(prefix) and m != benchmark["metric"]]
  own = {m: {**tables.column(results, m)} for m in names}
  for about in own.values():
    about["label"] = about["label"].removeprefix(prefix)
  chosen = {s: v for s, v in results["systems"].items() if any(m in v for m in names)}
  return tables.table({**results, "systems": chosen, "columns": own}, names) if names else None


def _of_texts(results: Results, name: str) -> dict[str, Any] | None:
  """Systems by a figure of their texts, in each column of the page that has some."""
  metrics = {f"{b['label']}: {name}": b["label"] for b in results["benchmarks"] if b["texts"]}
  columns = {m: {**tables.column(results, m)} for m in metrics}
  title = next((about["label"].rpartition(": ")[2] for about in columns.values()), "")
  for metric, label in metrics.items():
    columns[metric]["label"] = label
  found = tables.table({**results, "columns": columns}, list(metrics))
  return found and {**found, "name": title}


def _matrix(results: Results, cells, others: Sequence[str], name: str) -> dict[str, Any]:
  """Systems by what they are held against."""
  columns = [{"label": f"against {tables.label(results, o)}", "unit": "%", "n": ""} for o in others]
  rows = []
  for system in (s for s in results["systems"] if s in cells):
    row = []
    for other in others:
      found = cells[system].get(other)
      shown = tables.cell(found, "%") if found else {"mean": "", "ci": "", "n": "", "sign": 0}
      if found and "wins" in found:
        shown["why"] = f"{found['wins']} : {found['ties']} : {found['losses']}"
      row.append(shown)
    rows.append({"name": tables.label(results, system), "cells": row})
  return {**tables.grid(columns, rows), "name": name}


def _examples(results: Results, scored: Scored) -> tuple[list[dict[str, Any]], float]:
  """(what the template shows, the reward of the deepest colour; 0 without any)."""
  found = [
    scored.get((e["prompt"], r["response"])) for e in results["examples"]
    for r in e["responses"].values()
  ]
  rows = [row for row in found if row]
  scale = heatmap.limit(rows) if rows else 0.0
  out = []
  for example in results["examples"]:
    about = tables.column(results, example["metric"])
    shown = []
    for system, response in example["responses"].items():
      row = scored.get((example["prompt"], response["response"]))
      maps = heatmap.heatmap_view([row], scale) if row else []
      score = response["score"]
      binary = about["label"].endswith(": Accuracy") and score in (0, 1)
      shown.append({
        "system": tables.label(results, system),
        "text": cut(response["text"]),
        "cut": response["hit_eos"] is False,
        "correct": bool(score) if binary else None,
        "score": f"{tables.show(score, about['unit'])} {about['unit']}" if finite(score) else "",
        "map": maps[0] if maps else None,
      })
    out.append({
      "prompt": cut(example["prompt"]),
      "answer": cut(example["answer"]) if example["answer"] is not None else "",
      "metric": visible(about["label"]), "responses": shown,
    })
  return out, scale
