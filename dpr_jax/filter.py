r"""Cuts a file of demonstrations by their token rewards, or one that is scored already.

    python -m dpr_jax.filter --demos=DEMOS.jsonl --config=configs/smollm2_135m.py --workdir=DIR \
        --kept=KEPT.jsonl --cut=CUT.jsonl --html=CUT.html

trains the model of the config on parts of the file, judges each demonstration by models that have
not seen it, and keeps those with a reward of at least 0 (see docs/cleaning.md). The fields of
--config.methods.cleaned_sft say how; --method names another method of its kind. DIR keeps the
models; the same command resumes, where the files to write are not there yet. Every record ends up
in one of three files: KEPT.jsonl, CUT.jsonl (the lowest reward first), and --unjudged, without
which a record that cannot be judged is an error.

    python -m dpr_jax.score --sft=CKPT --ref=CKPT --input=DEMOS.jsonl --output=SCORED.jsonl
    python -m dpr_jax.filter --input=SCORED.jsonl --kept=KEPT.jsonl --above=0
    python -m dpr_jax.filter --input=SCORED.jsonl --kept=KEPT.jsonl --cut=CUT.jsonl --keep=0.75

Each line gets a "filter_score": --reduce (sum, mean or min) over its tokens of --by: the reward
log pi_sft - log pi_ref, or what it is compared with: log pi_sft, log pi_ref, the endogenous reward,
the length, a random number. --above keeps the lines above a score, in nats; --keep the share with
the highest scores. KEPT.jsonl has the lines in the order of the input, and `dpr_jax.main` reads it
as demonstrations; CUT.jsonl the others, the lowest first; --html shows these, token by token.

A model that was trained on a demonstration likes it better: for a cut of its own training data,
score each half with a model that was trained on the other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from dpr_jax import cli
from dpr_jax.cli import models as models_cli
from dpr_jax.cli.flags import flag_value
from dpr_jax.errors import UserError
from dpr_jax.evaluation.token_scores import NAMES, REDUCE

_FIELDS = {**NAMES, "logp_ref": "logp_ref"}
_LARGEST = 1e6  # nats per token.
_SHOWN = 200  # demonstrations that a page shows of what was cut.
_DECIDED = ("--config.compare", "--config.seeds", "--config.data.demos", "--config.data.holdout")
_OF_SCORED = ("input", "by", "reduce", "above", "keep", "seed")  # Flags of one way alone,
_OF_DEMOS = ("demos", "workdir", "method", "unjudged")  # and of the other.


def define(values: flags.FlagValues) -> None:
  text = lambda name, default, what: flags.DEFINE_string(name, default, what, flag_values=values)
  text("input", None, "What dpr_jax.score wrote.")
  text("demos", None, "Or demonstrations, in any format that training reads.")
  text("workdir", None, "With --demos: folder of the models of the folds.")
  text("method", "cleaned_sft", "With --demos: method of the config that judges.")
  text("kept", None, "JSONL to write; must not exist.")
  text("cut", None, "Also write the lines that are left out.")
  text("unjudged", None, "With --demos: JSONL of what cannot be judged, with its filter_problem.")
  text("html", None, "Also write a heatmap page of what is left out.")
  flags.DEFINE_enum("by", "reward", [*_FIELDS, "length", "random"], "What decides.",
                    flag_values=values)
  flags.DEFINE_enum("reduce", "sum", [*REDUCE], "Over the tokens of a response.",
                    flag_values=values)
  flags.DEFINE_float("above", None, "Keep the lines with a higher score.", flag_values=values)
  flags.DEFINE_float("keep", None, "Keep this share of the lines.", lower_bound=0.0,
                     upper_bound=1.0, flag_values=values)
  flags.DEFINE_integer("seed", 0, "Of --by=random.", lower_bound=0, flag_values=values)


def _refuse(values: flags.FlagValues, names: Sequence[str], because: str) -> None:
  for name in names:
    if values[name].present:
      raise UserError(f"--{name} has no effect with --{because}; leave it out")


def scores(
    records: Sequence[Mapping[str, Any]], by: str, reduce: str, seed: int, name: str
) -> np.ndarray:
  """The score of each line, float64 [N]; the higher, the better.

  Args:
    name: of the file, for errors.

  Raises:
    UserError: a line without the field that decides.
  """
  if by == "random":
    return np.random.default_rng(seed).permutation(len(records)).astype(np.float64)
  out = np.empty(len(records))
  for i, record in enumerate(records):
    field = _FIELDS.get(by, "token_rewards")
    values = record.get(field)
    numbers = isinstance(values, list) and all(type(x) in (int, float) for x in values)
    if not numbers or not values or not all(abs(x) < _LARGEST for x in values):
      raise UserError(f"{name}: record {i + 1}: field {field!r} must be a list of numbers below "
                      f"{_LARGEST:g}, one per token, as dpr_jax.score writes it")
    out[i] = len(values) if by == "length" else REDUCE[reduce](values)
  return out


def kept(found: np.ndarray, above: float | None, share: float | None) -> np.ndarray:
  """Which lines are kept, bool [N]: those above a score, or a share with the highest.

  Of equal scores the earlier lines are kept.
  """
  if above is not None:
    return found > above
  chosen = np.argsort(-found, kind="stable")[: round(share * len(found))]
  return np.isin(np.arange(len(found)), chosen)


@cli.readable
def main(argv: Sequence[str]) -> None:
  if flag_value(argv, "demos"):
    return judge(argv)
  values = cli.parse_flags(
      argv, entry_point="dpr_jax.filter", doc=__doc__, define=define,
      required={"input": "SCORED.jsonl", "kept": "KEPT.jsonl"},
  )
  _refuse(values, _OF_DEMOS, "input")
  if (values.above is None) == (values.keep is None):
    raise UserError("give --above=SCORE or --keep=SHARE, one of them")
  out, cut, html = _places(values, "kept", "cut", "html")
  from dpr_jax.data.records import iter_records
  from dpr_jax.paths import write_atomically
  from dpr_jax.report.heatmap import heatmap_page
  from dpr_jax.workdir import write_lines

  records = [record for record, _ in iter_records(values.input)]
  found = scores(records, values.by, values.reduce, values.seed, values.input)
  chosen = kept(found, values.above, values.keep)
  if not chosen.any():
    raise UserError(f"--input={values.input}: no line is kept; the highest score is "
                    f"{found.max():.4g}")
  lines = [{**r, "filter_score": round(float(s), 6)} for r, s in zip(records, found, strict=True)]
  order = [i for i in np.argsort(found, kind="stable") if not chosen[i]]
  page = heatmap_page([lines[i] for i in order], f"What was cut by {values.by}, lowest first")
  write_lines(out, [line for line, c in zip(lines, chosen, strict=True) if c])
  if cut:
    write_lines(cut, [lines[i] for i in order])
  if html:
    write_atomically(html, page)
  print(f"kept {chosen.sum()} of {len(chosen)}; scores of the kept from {found[chosen].min():.4g}, "
        f"of the others up to {found[~chosen].max(initial=-np.inf):.4g}")


def _places(values: flags.FlagValues, *names: str) -> list[Any]:
  """The files of these flags, checked to be new; None where a flag is not set."""
  places: list[Any] = []
  for name in names:
    path = getattr(values, name)
    places.append(models_cli.new_file(f"--{name}", path, *filter(None, places)) if path else None)
  return places


# --- Demonstrations that are not scored yet -------------------------------------------------------


def judge(argv: Sequence[str]) -> None:
  """The way of --demos: see the module docstring."""
  from dpr_jax import agreement, distributed

  distributed.initialize()
  values, config = agreement.agree(lambda: _parse_judging(argv), _given)
  import jax

  from dpr_jax import cleaning
  from dpr_jax.agreement import agree

  main_process = jax.process_index() == 0
  files = ("kept", "cut", "unjudged", "html")
  kept_at, cut_at, unjudged_at, html_at = agree(
      lambda: _places(values, *files) if main_process else [None] * len(files))
  found = cleaning.judge_file(config, values.workdir, values.method, bool(values.unjudged))
  if not main_process:
    return
  from dpr_jax.paths import write_atomically
  from dpr_jax.workdir import write_lines

  kept_ones = [x for x in found if x.kept]
  cut = sorted((x for x in found if x.judged and not x.kept), key=lambda x: x.score)
  unjudged = [x for x in found if not x.judged]
  if not kept_ones:
    raise UserError(f"--demos={values.demos}: no demonstration is kept; the highest score is "
                    f"{cut[-1].score:.4g}; set --config.methods.{values.method}.keep to a share")
  if html_at:
    write_atomically(html_at, _page(values.demos, kept_ones, cut, unjudged))
  for path, part in ((kept_at, kept_ones), (cut_at, cut), (unjudged_at, unjudged)):
    if path:
      write_lines(path, [x.line() for x in part])
  print(f"{len(found)} demonstrations: kept {len(kept_ones)}, cut {len(cut)}, not judged "
        f"{len(unjudged)}")


def _parse_judging(argv: Sequence[str]) -> tuple[flags.FlagValues, Any]:
  from dpr_jax import cleaning

  values = cli.parse_flags(
      argv, entry_point="dpr_jax.filter", doc=__doc__, define=define,
      required={"config": "configs/smollm2_135m.py", "workdir": "runs/filter",
                "kept": "KEPT.jsonl", "cut": "CUT.jsonl"},
  )
  _refuse(values, _OF_SCORED, "demos")
  for arg in argv:
    field = arg.partition("=")[0]
    if field in _DECIDED or field.startswith("--config.sweep."):
      raise UserError(f"{field} has no effect with --demos; leave it out")
  config = cleaning.of_file(values.config, values.demos, values.method, bool(values.unjudged))
  return values, config


def _given(parsed: tuple[flags.FlagValues, Any]) -> dict[str, Any]:
  """What all processes must be given."""
  from dpr_jax import config as config_lib
  from dpr_jax.workdir import code_fingerprint, versions

  values, config = parsed
  return {"config": config_lib.to_json(config), "--method": values.method,
          "--unjudged": bool(values.unjudged), "versions": versions(),
          "code of dpr_jax": code_fingerprint()}


def _page(name: str, kept_ones: Sequence[Any], cut: Sequence[Any], unjudged: Sequence[Any]) -> str:
  from dpr_jax.report.heatmap import heatmap_sections

  row = lambda x: {"messages": x.messages, **x.scores}
  nearest = sorted(kept_ones, key=lambda x: x.score)
  total = len(kept_ones) + len(cut) + len(unjudged)
  return heatmap_sections(
      {
          "Cut, the lowest score first": [row(x) for x in cut[:_SHOWN]],
          "Kept, closest to the cut": [row(x) for x in nearest[: _SHOWN // 4]],
          "Kept, the highest score first": [row(x) for x in nearest[::-1][: _SHOWN // 8]],
      },
      f"What was cut of {name}",
      f"Of {total} demonstrations {len(kept_ones)} are kept, {len(cut)} cut and {len(unjudged)} "
      "not judged. A token is blue where models trained on other demonstrations came to find it "
      "likelier while they were trained, orange where less likely. Of the cut at most "
      f"{_SHOWN} are shown.",
  )


if __name__ == "__main__":
  cli.run_entry_point(main, kept="nothing was written")
