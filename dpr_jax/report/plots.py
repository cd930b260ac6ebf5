"""Plots as PNG bytes, drawn with matplotlib's Agg and no global state.

Every function takes data and returns an image; `dark` is the same plot for a dark page.
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Okabe and Ito's palette, told apart with any colour vision, its order changed; then grey.
_LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B58900", "#56B4E9", "#777777")
_DARK = ("#56B4E9", "#FF8C42", "#2FCB9C", "#E39CC5", "#F0E442", "#8FB8FF", "#AAAAAA")
_DPI = 200


@dataclasses.dataclass(frozen=True)
class Series:
  """One line of a plot."""

  label: str  # "" for the only line of a plot.
  steps: Sequence[float]
  values: Sequence[float]  # NaN leaves a gap.


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
  """Mean over a centred window of `width` (odd) values, cut at the ends; NaN is left out."""
  known = np.isfinite(values)
  total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
  number = np.concatenate([[0], np.cumsum(known)])
  index = np.arange(len(values))
  low = np.maximum(index - width // 2, 0)
  high = np.minimum(index + width // 2 + 1, len(values))
  counts = number[high] - number[low]
  return np.where(counts > 0, (total[high] - total[low]) / np.maximum(counts, 1), np.nan)


def window(length: int) -> int:
  """Width of the running mean of a curve of `length` values: a twentieth, odd."""
  return max(1, length // 20) // 2 * 2 + 1


def curve(series: Sequence[Series], title: str, ylabel: str, dark: bool = False) -> bytes:
  """One metric over steps, a line for each seed; the running mean over the faint values."""
  colours = _DARK if dark else _LIGHT
  with _style(dark):
    figure, axes = _figure(3.7, 2.35)
    shown = []
    for i, line in enumerate(series):
      values = np.asarray(line.values, np.float64)
      shape = colours[i % len(colours)]
      smooth = running_mean(values, window(len(values)))
      faint = 0.28 if len(series) == 1 else 0.14
      axes.plot(line.steps, values, color=shape, alpha=faint, linewidth=0.7)
      mark = "o" if np.isfinite(values).sum() == 1 else None
      axes.plot(
        line.steps, smooth, color=shape, linewidth=1.6, label=line.label or None, marker=mark
      )
      shown.append(values[np.isfinite(values)])
    _limits(axes, np.concatenate(shown) if shown else np.zeros(0))
    axes.set_title(title, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    if any(line.label for line in series):
      axes.legend(frameon=False, ncols=min(3, len(series)), handlelength=1.2, columnspacing=1.0)
    return _png(figure)


def results_plot(
  systems: Mapping[str, Mapping[str, Mapping[str, Any]]],
  metrics: Sequence[tuple[str, str, float]],
  dark: bool = False,
) -> bytes:
  """Systems with their 95% intervals, one panel for each metric.

  Args:
    systems: label -> metric -> {"mean", "ci95"}; drawn from top to bottom.
    metrics: (name, label of its axis, factor that its values are shown with).
  """
  colours = _DARK if dark else _LIGHT
  names = list(systems)
  with _style(dark):
    width = max(4.6, 1.6 + 2.5 * len(metrics))
    figure, panels = _figure(width, 0.9 + 0.3 * len(names), len(metrics))
    panels = np.atleast_1d(panels)
    for axes, (metric, label, factor) in zip(panels, metrics):
      for i, name in enumerate(names):
        mean, ends = _entry(systems[name].get(metric), factor)
        if not math.isfinite(mean):
          continue
        if np.isfinite(ends).all():
          axes.plot(ends, [i, i], color=colours[0], linewidth=2, solid_capstyle="round")
        axes.plot([mean], [i], "o", color=colours[0], markersize=5)
      axes.set_xlabel(label)
      axes.set_ylim(len(names) - 0.4, -0.6)
      axes.set_yticks(range(len(names)))
      axes.set_yticklabels(names if axes is panels[0] else [""] * len(names))
      axes.tick_params(axis="y", length=0)
      axes.margins(x=0.08)
    return _png(figure)


def frontier_plot(
  series: Mapping[str, Sequence[tuple[float, float, float]]], label: str, dark: bool = False
) -> bytes:
  """Coverage against accuracy, a curve for each system, its temperatures marked.

  Args:
    series: label -> (temperature, accuracy, coverage) of its points; temperature 0 is greedy, an
      open square at the end of a dotted line. The first two have their temperatures written.
    label: of the vertical axis.
  """
  colours = _DARK if dark else _LIGHT
  with _style(dark):
    figure, axes = _figure(8.0, 3.7)
    for i, (name, points) in enumerate(series.items()):
      colour, shape = colours[i % len(colours)], "os^Dvph"[i // len(colours) % 7]
      sampled = [(100 * x, y) for t, x, y in points if t]
      greedy = [(100 * x, y) for t, x, y in points if not t]
      width = 1.9 if i < 2 else 1.0
      axes.plot(*zip(*sampled), marker=shape, color=colour, linewidth=width, markersize=4.5,
                label=name, zorder=3 - (i > 1))
      for x, y in greedy:
        ends = zip(sampled[-1], (x, y))
        axes.plot(*ends, ":", color=colour, linewidth=1.0)
        axes.plot([x], [y], "s", color=colour, markersize=6, markerfacecolor="none")
      for (x, y), (t, *_) in zip(sampled, points) if i < 2 else ():
        axes.annotate(f"{t:g}", (x, y), (0, 5), textcoords="offset points", ha="center",
                      fontsize=7, color=colour)
    axes.set_xlabel("accuracy (%)")
    axes.set_ylabel(label)
    axes.margins(0.08)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.6)
    return _png(figure)


def sweep_plot(
  values: Sequence[str],
  series: Mapping[str, Sequence[Mapping[str, Any] | None]],
  field: str,
  label: str,
  factor: float,
  dark: bool = False,
) -> bytes:
  """A metric at each value of a field, evenly spaced in their order.

  Args:
    values: names of the points, from left to right.
    series: label -> {"mean", "ci95"} at each point, None where unknown. The first with its
      intervals; the others are lines to compare with, thin.
    field, label: of the two axes.
    factor: that the metric is shown with.
  """
  colours = _DARK if dark else _LIGHT
  x = np.arange(len(values))
  with _style(dark):
    figure, axes = _figure(max(5.2, 2.6 + 0.55 * len(values)), 3.0)
    for i, (name, entries) in enumerate(series.items()):
      colour = colours[i % len(colours)]
      means, intervals = zip(*(_entry(e, factor) for e in entries))
      if i == 0:
        for at, ends in zip(x, intervals):
          if np.isfinite(ends).all():
            axes.plot([at, at], ends, color=colour, linewidth=2, solid_capstyle="round")
        axes.plot(x, means, "o-", color=colour, linewidth=1.6, markersize=5, label=name)
      else:
        axes.plot(x, means, "--", marker=".", color=colour, linewidth=1.1, label=name)
    axes.set_xticks(x)
    axes.set_xticklabels(values)
    axes.set_xlim(-0.4, len(values) - 0.6)
    axes.set_xlabel(field)
    axes.set_ylabel(label)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.6)
    return _png(figure)


def _entry(entry: Mapping[str, Any] | None, factor: float) -> tuple[float, list[float]]:
  """(mean, ends of the interval) of {"mean", "ci95"}, times `factor`; NaN where unknown."""
  entry = entry or {}
  values = (entry.get("mean"), *(entry.get("ci95") or (None, None)))
  mean, *ends = (x * factor if isinstance(x, int | float) else math.nan for x in values)
  return mean, ends


def _limits(axes, values: np.ndarray) -> None:
  """Leaves out the few extreme values that would flatten the curve; keeps 99% in view."""
  if len(values) < 50:
    return
  low, high = np.percentile(values, [0.5, 99.5])
  if high > low:
    margin = 0.08 * (high - low)
    axes.set_ylim(max(low, values.min()) - margin, min(high, values.max()) + margin)


def _style(dark: bool):
  import matplotlib

  ink, faint = ("#D5D9E0", "#39404C") if dark else ("#3A4048", "#E3E6EB")
  return matplotlib.rc_context({
    "font.size": 8.5,
    "font.family": "sans-serif",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.edgecolor": faint,
    "axes.labelcolor": ink,
    "axes.titlecolor": ink,
    "text.color": ink,
    "xtick.color": ink,
    "ytick.color": ink,
    "axes.grid": True,
    "grid.color": faint,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "text.parse_math": False,  # a name with dollar signs is no formula.
    "legend.fontsize": 8,
  })


def _figure(width: float, height: float, columns: int = 1):
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), layout="constrained")
  FigureCanvasAgg(figure)
  return figure, figure.subplots(1, columns)


def _png(figure) -> bytes:
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
  return buffer.getvalue()
