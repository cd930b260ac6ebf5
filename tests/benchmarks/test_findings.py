"""Summaries of runs and the tables that are filled from them."""

import json
import pathlib
import re

import pytest

from dpr_jax.errors import UserError

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def result(mean, difference):
  interval = {"mean": mean, "ci95": [mean - 0.1, mean + 0.1], "n": 4}
  system = {"accuracy_sampled": interval, "length_sampled": interval}
  auc = {"auc": {"mean": 0.9, "ci95": [0.8, 1.0], "n": 4}}
  return {
      "labels": {"ref": "Reference", "sft": "SFT", "dpr": "DPR"}, "main": "dpr",
      "columns": {"accuracy_sampled": {"label": "Accuracy, sampled", "unit": "%"},
                  "length_sampled": {"label": "Length, sampled", "unit": "tokens"}},
      "corruption_titles": {"baseline_relative": "log sft - log ref", "unique": "one right answer"},
      "systems": {"dpr": system, "sft": system, "my_method": system},
      "comparisons": [
          {"pair": ["dpr", "sft"], "metric": "accuracy_sampled", "difference": difference,
           "ci95": [-0.2, 0.2], "p": 0.0006},
          {"pair": ["sft", "ref"], "metric": "accuracy_sampled", "difference": 1.0,
           "ci95": [0.0, 1.0], "p": 0.5},
      ],
      "corruption": {"unique": {"baseline_relative": auc}},
  }


def page_of(name, *kinds):
  return "\n".join(f"before\n<!-- table:{kind} {name} -->\nold\n<!-- /table -->\nafter"
                   for kind in kinds)


@pytest.fixture
def study(tmp_path):
  """study(page, *runs, flags=()) -> the page filled from the summary "both" of those runs."""
  from benchmarks import findings

  for name, values in (("a", (0.5, 0.05)), ("b", (0.25, -0.05))):
    report = tmp_path / "runs" / name / "report"
    report.mkdir(parents=True)
    (report / "results.json").write_text(json.dumps(result(*values)))

  def make(page, *runs, flags=()):
    path = tmp_path / "page.md"
    path.write_text(page)
    findings.main(["summarize", *(str(tmp_path / "runs" / run) for run in runs),
                   f"--output={tmp_path}/results/both.json", f"--page={path}", *flags])
    findings.main([str(tmp_path / "results"), str(path)])
    return path.read_text()

  make.folder = tmp_path
  return make


def test_tables_of_several_runs(study):
  from benchmarks import findings

  page = page_of("both", "accuracy_sampled", "against:dpr:accuracy_sampled", "corruption")
  page = study(page, "a", "b")
  assert page.count("before") == page.count("after") == 3 and "old" not in page
  lines = page.splitlines()
  assert "|  | a | b |" in lines
  cells = " | 0.500 [0.400, 0.600] | 0.250 [0.150, 0.350] |"
  systems = [line.removesuffix(cells) for line in lines if line.endswith(cells)]
  assert systems == ["| SFT", "| my method", "| DPR"]
  assert ("| DPR - SFT | +0.050 [-0.200, +0.200], p < 0.001 | "
          "-0.050 [-0.200, +0.200], p < 0.001 |") in lines
  assert sum(" - SFT" in line or "SFT - " in line for line in lines) == 1  # SFT - ref is not DPR's.
  assert ("| log sft - log ref, one right answer | 0.900 [0.800, 1.000] | 0.900 [0.800, 1.000] |"
          in lines)
  assert findings.fill(page, study.folder / "results") == page


def test_pairs_and_several_metrics_of_one_run(study):
  kinds = ("differences:accuracy_sampled", "minus:sft:accuracy_sampled",
           "accuracy_sampled,length_sampled")
  all_pairs, from_sft, metrics = study(page_of("both", *kinds), "a").split("before\n")[1:]
  rows = [line for line in all_pairs.splitlines() if line.startswith("|")][2:]
  assert rows == ["| SFT - Reference | +1.000 [+0.000, +1.000], p 0.500 |",
                  "| DPR - SFT | +0.050 [-0.200, +0.200], p < 0.001 |"]
  assert rows[1] in from_sft and rows[0] not in from_sft
  assert "|  | Accuracy, sampled | Length, sampled (tokens) |" in metrics
  assert "| SFT | 0.500 [0.400, 0.600] | 0.500 [0.400, 0.600] |" in metrics


def test_a_summary_says_what_makes_it(study):
  page, path = page_of("both", "accuracy_sampled"), study.folder / "results" / "both.json"
  study(page, "a", flags=["--command=first\nsecond"])
  command = json.loads(path.read_text())["command"]
  assert command[:2] == ["first", "second"] and len(command) == 3
  assert command[2].startswith("python -m benchmarks.findings summarize ")
  study(page, "a", "b")  # Made again, it still says so.
  again = json.loads(path.read_text())["command"]
  assert again[:2] == command[:2] and len(again) == 3 and "runs/b " in again[2]


def test_a_table_that_cannot_be_filled_is_named(study):
  from benchmarks import findings

  page = page_of("both", "accuracy_sampled")
  study(page, "a")
  with pytest.raises(UserError, match="there is no .*missing.json"):
    findings.fill(page_of("missing", "corruption"), study.folder / "results")
  with pytest.raises(UserError, match="table:corruption both.* has no such table"):
    findings.fill(page_of("both", "corruption"), study.folder / "results")
  with pytest.raises(UserError, match="table:acuracy: no run has it"):
    study(page_of("both", "acuracy"), "a")
  with pytest.raises(UserError, match="of one run, not of 2"):
    study(page_of("both", "accuracy_sampled,length_sampled"), "a", "b")
  with pytest.raises(UserError, match="two runs are called a"):
    study(page, "a", "a")
  with pytest.raises(UserError, match="results.json: no such file"):
    study(page, "c")
  with pytest.raises(UserError, match="has no <!-- table:KIND both -->"):
    study(page_of("other", "corruption"), "a")


@pytest.mark.parametrize("name, tables", [("findings.md", 6), ("results.md", 4)])
def test_a_page_holds_the_tables_of_its_summaries(name, tables):
  from benchmarks import findings

  page = (DOCS / name).read_text(encoding="utf-8")
  assert findings.fill(page, DOCS / "results") == page
  assert page.count("<!-- table:") == tables


def test_summaries_hold_no_more_than_the_pages_print():
  from benchmarks import findings

  pages = "".join((DOCS / f"{name}.md").read_text(encoding="utf-8")
                  for name in ("findings", "results"))
  printed, kept = set(re.findall(r"<!-- table:(\S+) (\S+) -->", pages)), set()
  for path in (DOCS / "results").glob("**/*"):
    summary = findings.read_summary(path)
    assert path.read_text() == findings.as_text(summary["command"], summary["tables"])
    kept |= {(kind, path.stem) for kind in summary["tables"]}
  assert kept == printed
