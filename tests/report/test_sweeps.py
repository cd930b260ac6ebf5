"""The table and plot of a sweep, and the tables of corrupted tokens."""

import io
import json

import numpy as np
import pytest

from dpr_jax.report import plots, sweeps
from dpr_jax.report.corruption import corruption_tables
from dpr_jax.report.page import write_report


def entry(mean, low, high, n=64):
  return {"mean": mean, "ci95": [low, high], "n": n}


def point(value, dpr, gap, p, **more):
  low, high = gap - 0.05, gap + 0.05
  return {
    "value": value, "folder": f"beta={value}",
    "systems": {
      "sft": {"accuracy_sampled": entry(0.5, 0.4, 0.6)},
      "contrastive": {"accuracy_sampled": entry(dpr / 2, 0.1, 0.3)},
      "dpr": {"accuracy_sampled": entry(dpr, dpr - 0.1, dpr + 0.1),
              "length_sampled": entry(5.04, 4.9, 5.2)},
    },
    "comparisons": [{"pair": ["dpr", "sft"], "metric": "accuracy_sampled", "difference": gap,
                     "ci95": [low, high], "p": p}],
    **more,
  }


AUCS = (0.81, 0.7, 0.5)
CORRUPTION = {
  kind: {
    **{name: {"auc": entry(auc, auc - 0.1, auc + 0.05),
              "auc_gain": entry(0.81 - auc, 0.7 - auc, 0.9 - auc),
              "lowest": entry(0.4, 0.3, 0.5, 40), "below_original": entry(0.9, 0.8, 0.95)}
       for name, auc in zip(("baseline_relative", "log_likelihood", "endogenous"), AUCS)},
    "chance": 0.31,
  }
  for kind in ("all", "unique", "varied")
}
RESULTS = {
  "seeds": [0], "systems": {}, "comparisons": [], "main": "dpr",
  "labels": {"base": "Base model", "sft": "SFT", "contrastive": "Contrastive decoding",
             "dpr": "DPR"},
  "columns": {
    "accuracy_sampled": {"label": "Accuracy, sampled", "unit": "%", "better": 1, "compared": True,
                         "main": True},
    "length_sampled": {"label": "Length, sampled", "unit": "tokens", "better": 0, "main": True},
  },
  "corruption_titles": {"all": "all answers", "unique": "one right answer",
                        "varied": "many right answers"},
  "sweep": {"field": "methods.dpr.beta", "values": ["0.5", "2"], "points": [
    point("0.5", 0.6, 0.1, 0.01, corruption=CORRUPTION), point("2", 0.52, 0.02, 0.6),
  ]},
  "corruption": CORRUPTION,
}


def test_a_row_for_each_point():
  table = sweeps.sweep_table(RESULTS, links=True)
  assert table["head"] == "methods.dpr.beta" and table["marked"]
  assert [c["label"] for c in table["columns"]] == [
    "DPR: accuracy, sampled", "DPR minus SFT", "DPR: length, sampled", "SFT: accuracy, sampled",
    "Contrastive decoding: accuracy, sampled", "AUC of a corrupted token",
  ]
  assert [r["name"] for r in table["rows"]] == ["0.5", "2"]
  assert table["rows"][0]["href"] == "../beta=0.5/report/report.html"
  first, second = ([c["mean"] for c in r["cells"]] for r in table["rows"])
  assert first == ["60.0", "+10.0", "5.0", "50.0", "30.0", "81.0"]
  assert second == ["52.0", "+2.0", "5.0", "50.0", "26.0", "–"]
  assert [c["sign"] for c in table["rows"][0]["cells"]] == [1, 1, 0, 0, 0, 0]
  assert not any(c["sign"] for c in table["rows"][1]["cells"])
  assert sweeps.sweep_table({**RESULTS, "sweep": {}}, links=True) is None


def test_the_series_of_the_plot():
  series = sweeps.plot_series(RESULTS, "accuracy_sampled")
  assert list(series) == ["DPR", "SFT", "Contrastive decoding"]
  assert [e["mean"] for e in series["DPR"]] == [0.6, 0.52]


def test_the_plot_shows_its_data():
  image = pytest.importorskip("PIL.Image")
  series = sweeps.plot_series(RESULTS, "accuracy_sampled")
  draw = lambda s: plots.sweep_plot(["0.5", "2"], s, "methods.dpr.beta", "Accuracy (%)", 100.0)
  png = draw(series)
  assert png == draw(series)
  moved = {**series, "DPR": [entry(0.3, 0.2, 0.4), entry(0.9, 0.8, 1.0)]}
  pixels = np.asarray(image.open(io.BytesIO(draw(moved))).convert("RGBA"))[..., :3].astype(int)
  blue = np.all(np.abs(pixels - np.array([0x00, 0x72, 0xB2])) < 8, axis=-1)
  blue[:, int(0.6 * blue.shape[1]) :] = False  # The legend.
  rows, columns = np.nonzero(blue)
  left = rows[columns < np.median(columns)].mean()
  assert rows[columns > np.median(columns)].mean() < left  # It rises.
  unknown = {"DPR": [None, entry(0.5, float("nan"), float("nan"))]}
  assert draw(unknown).startswith(b"\x89PNG")


def test_corrupted_tokens_by_kind():
  tables = corruption_tables(RESULTS)
  assert [t["title"] for t in tables] == [
    "All answers", "One right answer", "Many right answers"
  ]
  assert tables[0]["chance"] == "31.0"
  assert [r["cells"][0]["mean"] for r in tables[0]["rows"]] == ["81.0", "70.0", "50.0"]
  assert [r["cells"][1]["mean"] for r in tables[0]["rows"]] == ["0.0", "+11.0", "+31.0"]
  assert tables[0]["rows"][0]["n"] == "64"
  unknown = {"corruption": {"all": {"endogenous": {"auc": {"mean": None, "ci95": None, "n": 3}}}}}
  assert corruption_tables(unknown)[0]["rows"][0]["cells"][0]["mean"] == "–"
  assert corruption_tables({}) == []


def test_a_page_of_a_sweep(tmp_path, read_page):
  folder = tmp_path / "beta"
  (folder / "report").mkdir(parents=True)
  (folder / "report" / "results.json").write_text(json.dumps(RESULTS))
  config = {"sweep": {"field": "methods.dpr.beta", "values": ["0.5", "<b>2"]}}
  (folder / "config.json").write_text(json.dumps({"config": config}))
  page = read_page(write_report(folder))
  for text in ("Sweep", "methods.dpr.beta takes 0.5, <b>2", "DPR minus SFT", "Corrupted tokens",
               "chance 31.0", "2 looks at the same prompts"):
    assert text in page.text, text
  links = [a["href"] for a in page.of("a")]
  assert links == ["../beta=0.5/report/report.html", "../beta=2/report/report.html"]
  assert (folder / "report" / "sweep.png").exists() and len(page.of("img")) == 1
