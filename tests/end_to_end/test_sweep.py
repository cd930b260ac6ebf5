"""A sweep through the main entry point: SFT once, a run at every point, one table and one plot."""

import json

import numpy as np
import pytest

from dpr_jax.training.metrics import read_metrics

FLAGS = ("--config.sweep.field=methods.dpr.beta", "--config.sweep.values=0.5,2",
         "--config.compare=low_temperature,contrastive,dpr", "--config.budget.steps=3")


@pytest.mark.slow
def test_two_points_of_two_seeds(entry_point, tmp_path):
  workdir = tmp_path / "sweep"
  out, _ = entry_point.finish(entry_point.start(workdir, *FLAGS, "--config.seeds=2"))
  assert "methods.dpr.beta = 0.5" in out and "methods.dpr.beta = 2" in out
  results = json.loads((workdir / "report" / "results.json").read_text())
  assert results["seeds"] == [0, 1] and set(results["systems"]) == {
      "base", "ref", "sft", "low_temperature"
  }
  first, second = results["sweep"]["points"]
  assert (first["value"], second["value"]) == ("0.5", "2")
  for point in (first, second):
    assert point["systems"]["dpr"]["accuracy_sampled"]["n"] == 64
    # SFT was evaluated once: its numbers are the same ones.
    assert point["systems"]["sft"] == results["systems"]["sft"]
    assert point["corruption"] == results["corruption"]
  lengths = [p["systems"]["contrastive"]["length_sampled"]["mean"] for p in (first, second)]
  assert lengths[0] != lengths[1]  # At the strength of the point.
  assert (workdir / "report" / "sweep.png").exists()
  page = (workdir / "report" / "report.html").read_text()
  assert "methods.dpr.beta" in page and "Corrupted tokens" in page
  for seed in (0, 1):
    part = workdir / f"seed_{seed}"
    assert len(read_metrics(part / "sft" / "metrics.jsonl")) == 20
    for value in ("0.5", "2"):
      assert (part / f"beta={value}" / "sft").is_symlink()
      assert len(read_metrics(part / f"beta={value}" / "dpr" / "metrics.jsonl")) == 3


@pytest.mark.slow
def test_a_point_is_what_a_run_of_its_config_gives(entry_point, tmp_path):
  swept, alone = tmp_path / "swept", tmp_path / "alone"
  entry_point.finish(entry_point.start(swept, *FLAGS))
  entry_point.finish(entry_point.start(alone, "--config.methods.dpr.beta=2", *FLAGS[2:]))
  point = swept / "beta=2"
  a, b = (json.loads((w / "report" / "results.json").read_text()) for w in (point, alone))
  for key in ("systems", "comparisons", "corruption"):
    assert a[key] == b[key], key
  a, b = (read_metrics(w / "dpr" / "metrics.jsonl") for w in (point, alone))
  np.testing.assert_array_equal([x["kl"] for x in a], [x["kl"] for x in b])
  # Again, from where it stopped: nothing is made anew, and the report is the same.
  before = {p: p.stat().st_mtime_ns for p in swept.rglob("samples/*")}
  entry_point.finish(entry_point.start(swept, *FLAGS))
  assert {p: p.stat().st_mtime_ns for p in swept.rglob("samples/*")} == before
