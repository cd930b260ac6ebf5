"""Summarizes runs of a study, and fills the tables of a page from the summaries.

    python -m benchmarks.findings summarize RUN_DIR ... --output=docs/results/NAME.json \\
        [--page=docs/findings.md] [--command="what made the runs"]
    python -m benchmarks.findings docs/results docs/findings.md

A table of a page stands between <!-- table:KIND NAME --> and <!-- /table -->, where NAME is that of
a summary. `summarize` reads the report/results.json of each run and keeps what the page's tables
of NAME print, at the printed precision. A run goes by the name of its folder. KIND is one of

    METRIC                       accuracy_sampled, length_sampled, reverse_kl, ...: systems by runs
    against:SYSTEM:METRIC        SYSTEM (dpr, reward_to_go) minus every other system, with p-values
    minus:SYSTEM:METRIC          every other system minus SYSTEM
    differences:METRIC           every pair that was compared
    corruption                   AUC of the rewards that were judged

With a single run, METRIC may be several metrics separated by commas, which become the columns.
"""

import argparse
import json
import math
import pathlib
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.render import table
from dpr_jax import cli
from dpr_jax.errors import UserError
from dpr_jax.report.tables import column, label

Results = dict[str, Any]
Key = tuple[str, ...]  # What a row shows: a system, a pair of them, or a kind of task and a reward.
Cell = list[float]  # [mean, low, high], or [difference, low, high, p].

_MARKED = re.compile(r"<!-- table:(\S+) ([^>\s]+) -->.*?<!-- /table -->", re.DOTALL)


# --- Runs to a summary ----------------------------------------------------------------------------


def _rounded(x: float) -> float:
  return float(f"{x:.3f}")


def _interval(x: dict[str, Any] | None) -> Cell | None:
  return None if x is None else [_rounded(v) for v in (x["mean"], *x["ci95"])]


def _difference(x: dict[str, Any]) -> Cell:
  # Below 0.001 it is printed as `p < 0.001`, so it must not be rounded up to 0.001.
  p = 0.0 if x["p"] < 1e-3 else _rounded(x["p"])
  return [*(_rounded(v) for v in (x["difference"], *x["ci95"])), p]


def _cells(kind: str, results: Results) -> dict[Key, Cell | None]:
  """One column of a table: the cells of one run for one metric, by row."""
  what, *of = kind.split(":")
  if what == "corruption":
    found = results.get("corruption", {})
    groups = [group for group in found if group != "all"] or list(found)
    return {(group, reward): _interval(of.get("auc")) for group in groups
            for reward, of in found[group].items() if isinstance(of, dict)}
  if of:
    which = {"against": 0, "minus": 1}.get(what)
    return {
        tuple(c["pair"]): _difference(c)
        for c in results["comparisons"]
        if c["metric"] == of[-1] and (which is None or c["pair"][which] == of[0])
    }
  return {(name,): _interval(metrics[kind]) for name, metrics in results["systems"].items()
          if kind in metrics}


def _merged(runs: Sequence[Results]) -> Results:
  """What the runs say of their systems, metrics and rewards."""
  fields = ("labels", "columns", "corruption_titles")
  return {f: {k: v for r in runs for k, v in r.get(f, {}).items()} for f in fields}


def _rank(labels: dict[str, str], mains: set[str]) -> Callable[[Key], list[float]]:
  """Systems in the order of the report, those without a label behind them, the main one last."""
  order = {name: i for i, name in enumerate(labels)}
  of = lambda name: math.inf if name in mains else order.get(name, len(order))
  return lambda key: [of(name) for name in key]


def _label(key: Key, kind: str, about: Results) -> str:
  if kind == "corruption":
    group, reward = (about["corruption_titles"].get(name, name) for name in key)
    return f"{reward}, {group}"
  return " - ".join(label(about, name) for name in key)


def _heading(metric: str, about: Results) -> str:
  found = column(about, metric)
  # Shares are not printed as per cent.
  return found["label"] if found["unit"] in ("", "%") else f"{found['label']} ({found['unit']})"


def summarize_table(kind: str, runs: dict[str, Results]) -> dict[str, Any]:
  """{"columns": headings, "rows": {label: a cell or None for each column}}.

  Raises:
    UserError: no run has such values, or several metrics are asked of several runs.
  """
  prefix, colon, metrics = kind.rpartition(":")
  metrics = metrics.split(",")
  if len(metrics) > 1 and len(runs) > 1:
    raise UserError(f"table:{kind}: several metrics can be shown of one run, not of {len(runs)}")
  columns = [_cells(f"{prefix}{colon}{m}", r) for r in runs.values() for m in metrics]
  about, mains = _merged(list(runs.values())), {r.get("main", "") for r in runs.values()}
  keys = list(dict.fromkeys(key for cells in columns for key in cells))
  if kind != "corruption":
    keys.sort(key=_rank(about["labels"], mains))
  if not any(cells.get(key) for cells in columns for key in keys):
    raise UserError(f"table:{kind}: no run has it")
  return {
      "columns": [_heading(m, about) for m in metrics] if len(metrics) > 1 else list(runs),
      "rows": {_label(key, kind, about): [cells.get(key) for cells in columns] for key in keys},
  }


def read_runs(folders: Sequence[pathlib.Path]) -> dict[str, Results]:
  """The results of each run, by the name of its folder.

  Raises:
    UserError: a folder has no report, or two folders have the same name.
  """
  runs = {}
  for folder in folders:
    name, path = folder.resolve().name, folder / "report" / "results.json"
    if name in runs:
      raise UserError(f"{folder}: two runs are called {name}")
    if not path.is_file():
      raise UserError(f"{path}: no such file; it is written by the report of a run")
    runs[name] = json.loads(path.read_text(encoding="utf-8"))
  return runs


def as_text(command: Sequence[str], tables: dict[str, dict[str, Any]]) -> str:
  """A summary as JSON with a line for each row of a table."""
  line = lambda x: json.dumps(x, ensure_ascii=False)
  joined = lambda lines: ",\n".join(lines)
  parts = [
      f'  {line(kind)}: {{"columns": {line(t["columns"])}, "rows": {{\n'
      + joined(f"    {line(label)}: {line(cells)}" for label, cells in t["rows"].items())
      + "}}"
      for kind, t in tables.items()
  ]
  said = joined(f"  {line(c)}" for c in command)
  return f'{{"command": [\n{said}],\n"tables": {{\n{joined(parts)}}}}}\n'


def summarize(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.findings summarize")
  parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN_DIR")
  parser.add_argument("--output", required=True, type=pathlib.Path, help="the summary to write")
  parser.add_argument("--page", default=pathlib.Path("docs/findings.md"), type=pathlib.Path,
                      help="the page whose tables it holds")
  parser.add_argument("--command", help="what made the runs, kept in the summary; by default what "
                      "the summary it replaces says")
  args = parser.parse_args(argv)
  if not args.page.is_file():
    raise UserError(f"--page={args.page}: no such file")
  name = args.output.stem
  kinds = [kind for kind, of in _MARKED.findall(args.page.read_text(encoding="utf-8"))
           if of == name]
  if not kinds:
    raise UserError(f"--output={args.output}: {args.page} has no <!-- table:KIND {name} -->")
  runs = read_runs(args.runs)
  tables = {kind: summarize_table(kind, runs) for kind in kinds}
  made = args.command.splitlines() if args.command else []
  if args.command is None and args.output.is_file():
    made = read_summary(args.output)["command"][:-1]  # The last line is that of this command.
  words = [*map(str, args.runs), f"--output={args.output}"]
  if args.page != parser.get_default("page"):
    words.append(f"--page={args.page}")
  command = [*made, f"python -m benchmarks.findings summarize {shlex.join(words)}"]
  args.output.parent.mkdir(parents=True, exist_ok=True)
  args.output.write_text(as_text(command, tables), encoding="utf-8")


# --- Summaries to a page --------------------------------------------------------------------------


def cell_text(cell: Cell | None) -> str:
  """'0.312 [0.287, 0.338]' of a mean, '+0.054 [+0.024, +0.084], p 0.005' of a difference."""
  if cell is None:
    return ""
  value, low, high, *p = cell
  sign = "+" if p else ""
  text = f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
  if p:
    text += ", p < 0.001" if p[0] < 1e-3 else f", p {p[0]:.3f}"
  return text


def read_summary(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text(encoding="utf-8"))


def fill(text: str, folder: pathlib.Path) -> str:
  """The page with its tables.

  Raises:
    UserError: a table names a summary that does not exist, or one that lacks the table.
  """

  def one(match: re.Match) -> str:
    kind, name = match.groups()
    mark, path = f"<!-- table:{kind} {name} -->", folder / f"{name}.json"
    if not path.is_file():
      raise UserError(f"{mark}: there is no {path}")
    found = read_summary(path)["tables"].get(kind)
    if found is None:
      raise UserError(f"{mark}: {path} has no such table; `python -m benchmarks.findings "
                      "summarize` adds it from the runs")
    rows = [[label, *map(cell_text, cells)] for label, cells in found["rows"].items()]
    return f"{mark}\n{table(['', *found['columns']], rows)}\n<!-- /table -->"

  return _MARKED.sub(one, text)


def main(argv: Sequence[str]) -> None:
  if argv and argv[0] == "summarize":
    return summarize(argv[1:])
  if len(argv) != 2:
    raise UserError("usage: python -m benchmarks.findings docs/results docs/findings.md, or "
                    "python -m benchmarks.findings summarize RUN_DIR ... --output=SUMMARY.json")
  folder, page = map(pathlib.Path, argv)
  for path, there in ((folder, folder.is_dir()), (page, page.is_file())):
    if not there:
      raise UserError(f"{path}: no such {'folder' if path == folder else 'file'}")
  page.write_text(fill(page.read_text(encoding="utf-8"), folder), encoding="utf-8")


if __name__ == "__main__":
  cli.run_entry_point(main, sys.argv[1:])
