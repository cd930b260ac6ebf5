"""The plots of a report: drawn for light and dark pages, the light one also beside it as PNG."""

import base64
import math
import pathlib
from typing import Any

from dpr_jax.paths import write_atomically
from dpr_jax.report import frontier, plots, sweeps, tables
from dpr_jax.report.render import finite, visible
from dpr_jax.report.tables import Results

# Metric, title, axis: curves of every stage, and of those whose metrics have a reward.
_LOSS = (("loss", "loss", "loss"),)
_CURVES = (
  ("reward", "reward", "nats per response"),
  ("kl", "KL to SFT", "nats per response"),
  ("response_length", "response length", "tokens"),
  ("eos_rate", "EOS rate", "share of responses"),
  ("entropy", "entropy", "nats per token"),
)


def _images(folder: pathlib.Path | None, name: str, alt: str, draw) -> dict[str, str]:
  """Draws a plot for light and dark pages; the light one is also a file, in a folder."""
  light = draw(dark=False)
  if folder is not None:
    write_atomically(folder / f"{name}.png", light)
  uris = [
    "data:image/png;base64," + base64.b64encode(image).decode("ascii")
    for image in (light, draw(dark=True))
  ]
  return {"light": uris[0], "dark": uris[1], "alt": alt, "name": name}


def stage_curves(folder: pathlib.Path, results: Results, stages, seeds) -> list[dict[str, str]]:
  out = []
  for stage, parts in stages.items():
    rewarded = any("reward" in line for lines in parts for line in lines)
    for key, title, axis in (*_LOSS, *(_CURVES if rewarded else ())):
      title = f"{tables.label(results, stage)}: {title}"
      draw = _curve(parts, key, title, axis, seeds)
      if draw:
        out.append(_images(folder, f"{stage}_{key}", f"{title} ({axis}) over steps", draw))
  return out


def _curve(parts, key: str, title: str, axis: str, seeds):
  """A function that draws the metric, or None if no line has it."""
  series = []
  for i, lines in enumerate(parts):
    points = [(line["step"], line[key]) for line in lines if key in line and "step" in line]
    values = [v if finite(v) else math.nan for _, v in points]
    if any(math.isfinite(v) for v in values):
      label = f"seed {seeds[i]}" if seeds else ""
      series.append(plots.Series(label, [s for s, _ in points], values))
  if not series:
    return None

  return lambda dark: plots.curve(series, title, axis, dark)


def results_plot(
  folder: pathlib.Path | None, results: Results, first: int = 0
) -> dict[str, str] | None:
  """Three of the main metrics that are compared, from the given one on."""
  about = {m: tables.column(results, m) for m in tables.main_metrics(results) if "/" not in m}
  metrics = [
    (m, visible(tables.heading(results, m)), 100.0 if c["unit"] == "%" else 1.0)
    for m, c in about.items() if c.get("compared")
  ][first : first + 3]
  if not metrics:
    return None
  shown = {visible(tables.label(results, name)): v for name, v in results["systems"].items()}
  return _images(
    folder, "results", "Systems with their 95% intervals",
    lambda dark: plots.results_plot(shown, metrics, dark),
  )


def frontier_view(
  folder: pathlib.Path | None, results: Results, name: str = ""
) -> dict[str, Any] | None:
  """What the template shows of a frontier: of a benchmark, where a page has several."""
  series = frontier.series(results)
  if not series:
    return None
  axis = f"distinct right answers in {results['frontier']['k']} samples"
  plot = _images(
    folder, "frontier", "Accuracy and coverage of each system over temperatures",
    lambda dark: plots.frontier_plot(series, axis, dark),
  )
  return {"name": name, "table": frontier.table(results), "plot": plot,
          "facts": results["frontier"], "baseline": tables.baseline_label(results)}


def sweep_plot(folder: pathlib.Path, results: Results) -> dict[str, str] | None:
  metric = sweeps.primary_metric(results)
  if metric is None:
    return None
  sweep, axis = results["sweep"], tables.heading(results, metric)
  values, field = [visible(p["value"]) for p in sweep["points"]], visible(sweep.get("field", ""))
  series = sweeps.plot_series(results, metric)
  factor = 100.0 if tables.column(results, metric)["unit"] == "%" else 1.0
  return _images(
    folder, "sweep", f"{axis} against {field}, with 95% intervals",
    lambda dark: plots.sweep_plot(values, series, field, axis, factor, dark),
  )
