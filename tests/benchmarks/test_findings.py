"""The tables of the study, from results that are written down here."""

import json
import pathlib

import pytest

from dpr_jax.errors import UserError


def result(mean, difference):
  system = {"accuracy_sampled": {"mean": mean, "ci95": [mean - 0.1, mean + 0.1], "n": 4}}
  auc = {"auc": {"mean": 0.9, "ci95": [0.8, 1.0], "n": 4}}
  return {
      "systems": {"dpr": system, "sft": system, "other": system},
      "comparisons": [
          {"pair": ["dpr", "sft"], "metric": "accuracy_sampled", "difference": difference,
           "ci95": [-0.2, 0.2], "p": 0.0004},
          {"pair": ["sft", "ref"], "metric": "accuracy_sampled", "difference": 1.0,
           "ci95": [0.0, 1.0], "p": 0.5},
      ],
      "corruption": {"unique": {"baseline_relative": auc}},
  }


PAGE = "\n".join(
    f"before\n<!-- table:{kind} runs/a runs/b -->\nold\n<!-- /table -->\nafter"
    for kind in ("accuracy_sampled", "against:dpr:accuracy_sampled", "corruption")
)


def test_tables_of_several_runs(tmp_path):
  from benchmarks import findings

  (tmp_path / "runs").mkdir()
  for name, values in (("a", (0.5, 0.05)), ("b", (0.25, -0.05))):
    (tmp_path / f"runs/{name}.json").write_text(json.dumps(result(*values)))
  page = findings.fill(PAGE, tmp_path)
  assert page.count("before") == page.count("after") == 3 and "old" not in page
  lines = page.splitlines()
  assert "| SFT | 0.500 [0.400, 0.600] | 0.250 [0.150, 0.350] |" in lines
  assert "| DPR | 0.500 [0.400, 0.600] | 0.250 [0.150, 0.350] |" in lines
  assert ("| DPR - SFT | +0.050 [-0.200, +0.200], p < 0.001 | "
          "-0.050 [-0.200, +0.200], p < 0.001 |") in lines
  assert sum("DPR -" in line for line in lines) == 1  # SFT - ref is not DPR's.
  assert ("| log sft - log ref, one right answer | 0.900 [0.800, 1.000] | 0.900 [0.800, 1.000] |"
          in lines)
  assert findings.fill(page, tmp_path) == page
  with pytest.raises(UserError, match="runs/a.*there is no .*missing.json"):
    findings.fill("<!-- table:corruption runs/a missing -->\n<!-- /table -->", tmp_path)
  with pytest.raises(UserError, match="no run has the metric 'acuracy'"):
    findings.fill("<!-- table:acuracy runs/a -->\n<!-- /table -->", tmp_path)
  with pytest.raises(UserError, match="two runs are called a"):
    findings.fill("<!-- table:corruption runs/a runs/a -->\n<!-- /table -->", tmp_path)


def test_the_page_holds_the_tables_of_its_results():
  from benchmarks import findings

  docs = pathlib.Path(__file__).parents[2] / "docs"
  page = (docs / "findings.md").read_text(encoding="utf-8")
  assert findings.fill(page, docs / "results") == page and page.count("<!-- table:") == 13
