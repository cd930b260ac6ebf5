"""Fills the tables of docs/findings.md from the results.json files of the study.

    python -m benchmarks.findings docs/results docs/findings.md

A table stands between <!-- table:KIND RUN RUN ... --> and <!-- /table -->, where each RUN is the
path of a JSON file under the first argument, without its suffix. KIND is one of

    METRIC                     accuracy_sampled, length_sampled, reverse_kl, ...: systems by runs
    against:SYSTEM:METRIC      SYSTEM (dpr, reward_to_go) less every other one, with p-values
    corruption                 AUC of three rewards
"""

import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.render import table
from dpr_jax import cli
from dpr_jax.errors import UserError
from dpr_jax.report.tables import LABELS

Results = dict[str, Any]
_REWARDS = {"baseline_relative": "log sft - log ref", "log_likelihood": "log sft",
            "endogenous": "endogenous"}


def with_interval(x: dict[str, Any] | None, signed: bool = False) -> str:
  """'0.312 [0.287, 0.338]' of a mean or a difference; "" of none."""
  if x is None:
    return ""
  value = x["difference"] if signed else x["mean"]
  sign = "+" if signed else ""
  low, high = x["ci95"]
  return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def p_value(p: float) -> str:
  return "p < 0.001" if p < 1e-3 else f"p {p:.3f}"


def of_metric(metric: str, runs: dict[str, Results]) -> str:
  """Systems by runs."""
  names = [n for n in LABELS if any(n in r["systems"] for r in runs.values())]
  names.sort(key=lambda n: n == "dpr")  # The last row.
  rows = [
      [LABELS[n], *(with_interval(r["systems"].get(n, {}).get(metric)) for r in runs.values())]
      for n in names
  ]
  return table(["", *runs], [row for row in rows if any(row[1:])])


def against(runs: dict[str, Results], system: str, metric: str) -> str:
  """A system less every other one that it is compared with, with p-values."""
  found = {
      run: {c["pair"][1]: c for c in results["comparisons"]
            if c["pair"][0] == system and c["metric"] == metric}
      for run, results in runs.items()
  }
  rows = []
  for name in LABELS:
    cells = [of.get(name) for of in found.values()]
    if any(cells):
      rows.append([f"{LABELS[system]} - {LABELS[name]}"] + [
          "" if c is None else f"{with_interval(c, signed=True)}, {p_value(c['p'])}" for c in cells
      ])
  return table(["", *runs], rows)


def corruption(runs: dict[str, Results]) -> str:
  """AUC of three rewards for tokens made wrong, by kind of task."""
  rows = []
  for kind in ("unique", "varied"):
    for reward, label in _REWARDS.items():
      found = [r.get("corruption", {}).get(kind, {}) for r in runs.values()]
      cells = [of.get(reward, {}).get("auc") for of in found]
      label += {"unique": ", one right answer", "varied": ", many right answers"}[kind]
      rows.append([label, *(with_interval(c) for c in cells)])
  return table(["", *runs], rows)


def fill(text: str, folder: pathlib.Path) -> str:
  """The page with its tables.

  Raises:
    UserError: a table names a file that there is not.
  """

  def one(match: re.Match) -> str:
    kind, *names = match[1].split()
    runs = {}
    for name in names:
      short = name.rpartition("/")[2]
      if short in runs:
        raise UserError(f"<!-- table:{match[1]} -->: two runs are called {short}")
      path = folder / f"{name}.json"
      if not path.is_file():
        raise UserError(f"<!-- table:{match[1]} -->: there is no {path}")
      runs[short] = json.loads(path.read_text(encoding="utf-8"))
    what, *of = kind.split(":")
    if what == "against" and len(of) == 2 and of[0] in LABELS:
      body = against(runs, *of)
    elif what == "corruption":
      body = corruption(runs)
    elif any(kind in metrics for r in runs.values() for metrics in r["systems"].values()):
      body = of_metric(kind, runs)
    else:
      raise UserError(f"<!-- table:{match[1]} -->: no run has the metric {kind!r}")
    return f"<!-- table:{match[1]} -->\n{body}\n<!-- /table -->"

  return re.sub(r"<!-- table:([^>]+?) -->.*?<!-- /table -->", one, text, flags=re.DOTALL)


def main(argv: Sequence[str]) -> None:
  if len(argv) != 2:
    raise UserError("usage: python -m benchmarks.findings docs/results docs/findings.md")
  folder, page = map(pathlib.Path, argv)
  for path, there in ((folder, folder.is_dir()), (page, page.is_file())):
    if not there:
      raise UserError(f"{path}: no such {'folder' if path == folder else 'file'}")
  page.write_text(fill(page.read_text(encoding="utf-8"), folder), encoding="utf-8")


if __name__ == "__main__":
  cli.run_door(main, sys.argv[1:])
