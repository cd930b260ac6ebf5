r"""Puts systems side by side: one page of folders that dpr_jax.evaluate has filled.

    python -m dpr_jax.compare --results=SFT=evals/sft --results=DPR=evals/dpr --output=PAGE.html

A value of --results is NAME=FOLDER, with no / in NAME, or a FOLDER alone, whose systems are then
called as their models. FOLDER is an evaluation, or holds some, at any depth; it may be a pattern
such as 'evals/*'. The first system is the baseline. Several evaluations of one system that differ
in nothing but the model or the seed are its runs.

PAGE.html has figures with 95% intervals, paired differences, win rates, accuracy against coverage
over temperatures, length and repetition, and responses side by side: with their token rewards where
--token_rewards names a file that dpr_jax.score wrote of a responses.jsonl. PAGE.json has all
figures.
"""

import glob
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from dpr_jax import cli
from dpr_jax.cli import models as models_cli
from dpr_jax.errors import UserError
from dpr_jax.paths import Path, absolute, as_path, in_bucket, write_atomically

_FILE = "responses.jsonl"


def define(values: flags.FlagValues) -> None:
  flags.DEFINE_multi_string("results", None, "NAME=FOLDER, or FOLDER; may be repeated.",
                            flag_values=values)
  flags.DEFINE_string("output", None, "HTML to write, with a .json beside it; must not exist.",
                      flag_values=values)
  flags.DEFINE_multi_string("token_rewards", [], "What dpr_jax.score wrote; may be repeated.",
                            flag_values=values)
  flags.DEFINE_string("title", "Systems side by side", "Heading of the page.", flag_values=values)


def split_name(spec: str) -> tuple[str, str]:
  """(name or "", pattern) of a value of --results; folders of a sweep have a = in their paths."""
  name, equals, pattern = spec.partition("=")
  whole = not equals or "/" in name or pathlib.Path(spec).exists()
  return ("", spec) if whole else (name, pattern)


def find_folders(spec: str) -> tuple[str, list[Path]]:
  """(name or "", evaluations) of a value of --results.

  Raises:
    UserError: there are none.
  """
  name, pattern = split_name(spec)
  places = [pattern] if in_bucket(pattern) or as_path(pattern).exists() else sorted(
      glob.glob(pattern, recursive=True))
  found = []
  for place in map(absolute, places):
    below = lambda place=place: sorted(p.parent for p in place.glob(f"**/{_FILE}"))
    found += [place] if (place / _FILE).exists() else below()
  if not found:
    raise UserError(f"--results={spec}: no folder there that dpr_jax.evaluate has filled; expected "
                    f"NAME=FOLDER, with a {_FILE} in it or below")
  return name, found


def short_names(models: Sequence[str]) -> dict[str, str]:
  """Model -> the last parts of its path, as few as tell all apart."""
  parts = {m: pathlib.PurePath(m).parts for m in dict.fromkeys(models)}
  for count in range(1, max(map(len, parts.values())) + 1):
    short = {m: "/".join(p[-count:]) for m, p in parts.items()}
    if len(set(short.values())) == len(short):
      break
  return short


def read_scored(paths: Sequence[str]) -> dict[tuple[str, str], Mapping[str, Any]]:
  """(prompt, response) -> a line that `score` wrote.

  Raises:
    UserError: a line without token rewards.
  """
  from dpr_jax.data.records import iter_records

  out = {}
  for path in paths:
    for record, where in iter_records(path):
      if not all(isinstance(record.get(name), list) for name in ("tokens", "token_rewards")):
        raise UserError(f"{where}: has no tokens and token_rewards; --token_rewards takes what "
                        "dpr_jax.score wrote of a responses.jsonl")
      out[str(record.get("prompt")), str(record.get("response"))] = record
  return out


@cli.readable
def main(argv: Sequence[str]) -> None:
  values = cli.parse_flags(
      argv, entry_point="dpr_jax.compare", doc=__doc__, define=define,
      required={"results": "DPR=evals/dpr", "output": "PAGE.html"},
  )
  page = models_cli.new_file("--output", values.output)
  if page.suffix != ".html":
    raise UserError(f"--output={values.output} must end with .html")
  figures = models_cli.new_file("--output", str(page.with_suffix(".json")), page)
  named = [(name, path) for name, paths in map(find_folders, values.results) for path in paths]
  for i, (_, path) in enumerate(named):
    if path.resolve() in [other.resolve() for _, other in named[:i]]:
      raise UserError(f"--results names {path} twice")
  from dpr_jax.evaluation.evaluated import read_evaluation
  from dpr_jax.evaluation.side_by_side import side_by_side
  from dpr_jax.report.side_by_side import headlines, side_by_side_page
  from dpr_jax.workdir import write_json

  folders = [read_evaluation(path, name) for name, path in named]
  names = short_names([f.model for f in folders])
  for f in folders:
    if not f.system and names[f.model] in {name for name, _ in named}:
      raise UserError(f"--results={f.path}: would be called {names[f.model]}, as its model is, and "
                      "other folders have that name; expected NAME=FOLDER here, with the same name "
                      "if it is a run of that system")
  results = side_by_side([f.called(f.system or names[f.model]) for f in folders])
  scored = read_scored(values.token_rewards)
  shown = {(e["prompt"], r["response"]) for e in results["examples"]
           for r in e["responses"].values()}
  if scored and not shown & set(scored):
    raise UserError(f"--token_rewards={values.token_rewards[0]}: holds none of the responses that "
                    "the page shows; score the responses.jsonl of these folders")
  html = side_by_side_page(results, scored, values.title)
  write_json(figures, results)
  write_atomically(page, html)
  print("\n".join([*headlines(results), f"page: {page}", f"figures: {figures}"]))


if __name__ == "__main__":
  cli.run_entry_point(main, kept="nothing was written")
