r"""Cuts a file of scored demonstrations or responses by their token rewards.

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
from dpr_jax.errors import UserError
from dpr_jax.evaluation.token_scores import NAMES, REDUCE

_FIELDS = {**NAMES, "logp_ref": "logp_ref"}
_LARGEST = 1e6  # nats per token.


def define(values: flags.FlagValues) -> None:
  flags.DEFINE_string("input", None, "What dpr_jax.score wrote.", flag_values=values)
  flags.DEFINE_string("kept", None, "JSONL to write; must not exist.", flag_values=values)
  flags.DEFINE_string("cut", "", "Also write the lines that are left out.", flag_values=values)
  flags.DEFINE_string("html", "", "Also write those as a heatmap page.", flag_values=values)
  flags.DEFINE_enum("by", "reward", [*_FIELDS, "length", "random"], "What decides.",
                    flag_values=values)
  flags.DEFINE_enum("reduce", "sum", [*REDUCE], "Over the tokens of a response.",
                    flag_values=values)
  flags.DEFINE_float("above", None, "Keep the lines with a higher score.", flag_values=values)
  flags.DEFINE_float("keep", None, "Keep this share of the lines.", lower_bound=0.0,
                     upper_bound=1.0, flag_values=values)
  flags.DEFINE_integer("seed", 0, "Of --by=random.", lower_bound=0, flag_values=values)


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
  values = cli.parse_flags(
      argv, entry_point="dpr_jax.filter", doc=__doc__, define=define,
      required={"input": "SCORED.jsonl", "kept": "KEPT.jsonl"},
  )
  if (values.above is None) == (values.keep is None):
    raise UserError("give --above=SCORE or --keep=SHARE, one of them")
  places: list[Any] = []
  for flag in ("kept", "cut", "html"):
    path = getattr(values, flag)
    places.append(models_cli.new_file(f"--{flag}", path, *filter(None, places)) if path else None)
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
  out, cut, html = places
  page = heatmap_page([lines[i] for i in order], f"What was cut by {values.by}, lowest first")
  write_lines(out, [line for line, c in zip(lines, chosen, strict=True) if c])
  if cut:
    write_lines(cut, [lines[i] for i in order])
  if html:
    write_atomically(html, page)
  print(f"kept {chosen.sum()} of {len(chosen)}; scores of the kept from {found[chosen].min():.4g}, "
        f"of the others up to {found[~chosen].max(initial=-np.inf):.4g}")


if __name__ == "__main__":
  cli.run_entry_point(main, kept="nothing was written")
