"""Plots: PNG bytes of the data given, the same for the same data, and no global state."""

import io

import numpy as np
import pytest

from dpr_jax.report import plots
from dpr_jax.report.plots import Series, curve, frontier_plot, results_plot, running_mean

METRICS = [("accuracy_sampled", "Accuracy (%)", 100.0), ("length_sampled", "Length", 1.0)]


def pixels(png):
  image = pytest.importorskip("PIL.Image")
  assert png.startswith(b"\x89PNG")
  return np.asarray(image.open(io.BytesIO(png)).convert("RGBA"))


def test_running_mean_against_a_loop():
  rng = np.random.default_rng(0)
  values = rng.normal(size=40)
  values[[3, 4, 17]] = np.nan
  values[:2] = np.nan
  expected = []
  for i in range(40):
    near = [v for v in values[max(0, i - 2) : i + 3] if np.isfinite(v)]
    expected.append(np.mean(near) if near else np.nan)
  np.testing.assert_allclose(running_mean(values, 5), expected, rtol=1e-12)
  np.testing.assert_allclose(running_mean(values, 1), values, rtol=1e-12)


def test_a_curve_shows_its_data():
  steps = np.arange(1, 101)
  one = curve([Series("", steps, steps * 0.01)], "loss", "nats")
  assert one == curve([Series("", steps, steps * 0.01)], "loss", "nats")
  assert one != curve([Series("", steps, steps * 0.02)], "loss", "nats")
  blue = np.array([0x00, 0x72, 0xB2])
  drawn = np.all(np.abs(pixels(one)[..., :3].astype(int) - blue) < 8, axis=-1)
  rows, columns = np.nonzero(drawn)
  left, right = rows[columns < np.median(columns)].mean(), rows[columns > np.median(columns)].mean()
  assert right < left  # a rising line.


def test_light_and_dark_differ_in_ink_only():
  series = [Series("", [1, 2, 3], [1.0, 2.0, 1.5])]
  light, dark = (pixels(curve(series, "t", "y", dark=d)) for d in (False, True))
  assert light.shape == dark.shape
  assert light[0, 0, 3] == dark[0, 0, 3] == 0  # the page shows through.
  text = [x[:40][x[:40, :, 3] > 250][:, :3].mean() for x in (light, dark)]  # of the title.
  assert text[0] < 100 and text[1] > 190


@pytest.mark.parametrize("values", [
  [], [1.0], [float("nan")] * 5, [1.0, float("nan"), 2.0, float("inf"), 3.0], [0.0] * 60,
])
def test_curves_of_little_data(values):
  pixels(curve([Series("seed 0", range(len(values)), values)], "t", "y"))


def test_one_line_for_each_seed():
  series = [Series(f"seed {s}", range(50), np.full(50, float(s))) for s in range(9)]
  image = pixels(curve(series, "t", "y"))
  for shade in plots._LIGHT:
    rgb = np.array([int(shade[i : i + 2], 16) for i in (1, 3, 5)])
    assert np.any(np.all(np.abs(image[..., :3].astype(int) - rgb) < 8, axis=-1))


def test_results_with_and_without_intervals():
  systems = {
    "SFT": {"accuracy_sampled": {"mean": 0.6, "ci95": [0.5, 0.7]},
            "length_sampled": {"mean": 6.0, "ci95": [float("nan")] * 2}},
    "$x^2_": {"accuracy_sampled": {"mean": float("nan"), "ci95": None}},
    "Base": {},
  }
  wide = pixels(results_plot(systems, METRICS))
  assert wide.shape[1] > pixels(results_plot(systems, METRICS[:1])).shape[1]
  narrow = {"SFT": {"accuracy_sampled": {"mean": 0.6, "ci95": [0.59, 0.61]}}}
  assert results_plot(narrow, METRICS[:1]) != results_plot({"SFT": systems["SFT"]}, METRICS[:1])


def test_matplotlib_settings_are_left_alone():
  import matplotlib

  before = dict(matplotlib.rcParams)
  curve([Series("", [1, 2], [1.0, 2.0])], "t", "y", dark=True)
  assert dict(matplotlib.rcParams) == before


def test_a_frontier_marks_its_greedy_end():
  colder = [(1.0, 0.4, 2.0), (0.5, 0.6, 1.5)]
  series = {"DPR": [*colder, (0.0, 0.7, 1.0)], "SFT": [(t, x - 0.1, y) for t, x, y in colder]}
  image = pixels(frontier_plot(series, "coverage"))
  assert frontier_plot(series, "coverage") == frontier_plot(series, "coverage")
  blue = np.array([0x00, 0x72, 0xB2])
  near = np.all(np.abs(image[..., :3].astype(int) - blue) < 8, axis=-1)
  near[:, int(0.7 * near.shape[1]) :] = False  # The legend.
  rows, columns = np.nonzero(near)
  left, right = rows[columns < np.median(columns)].mean(), rows[columns > np.median(columns)].mean()
  assert left < right  # Less coverage where the accuracy is higher.
  assert frontier_plot({"DPR": colder}, "coverage") != frontier_plot({"DPR": series["DPR"]}, "c")
  pixels(frontier_plot({f"$s_{i}$": colder for i in range(20)}, "coverage", dark=True))
