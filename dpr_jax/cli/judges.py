"""Flags of a judge: --judge, what implies one, and its fields as --judge.FIELD."""

from collections.abc import Sequence
from typing import Any

from absl import flags

from dpr_jax.cli.flags import flag_value
from dpr_jax.cli.values import make_value, value_class
from dpr_jax.errors import UserError, naming

PACKAGE = "dpr_jax.evaluation.judges"
_SHORT = {"judge_url": "judge.url", "judge_model": "judge.model"}


def judge_class(argv: Sequence[str]) -> type | None:
  """What --judge names, or --judge_url and --judge_model imply; None without any."""
  from dpr_jax.evaluation.judges.base import Judge

  kind, url, model = (flag_value(argv, name) for name in ("judge", *_SHORT))
  kind = kind or ("endpoint" if url else "reward_model" if model else "")
  return value_class("judge", PACKAGE, kind, Judge) if kind else None


def define_judge_flags(values: flags.FlagValues) -> None:
  """Those that do not depend on the judge."""
  flags.DEFINE_string("judge", "", "A kind, module:Class, file.py:Class; the next two imply one.",
                      flag_values=values)
  flags.DEFINE_string("judge_url", "", "Endpoint, as in http://localhost:8000/v1.",
                      flag_values=values)
  flags.DEFINE_string("judge_model", "", "Its model; without --judge_url the folder of a reward "
                      "model.", flag_values=values)


def make_judge(values: flags.FlagValues, cls: type) -> Any:
  """The judge that the flags describe; UserError for a bad field."""
  for short, field in _SHORT.items():
    if values[short].value:
      if field not in values:
        raise UserError(f"--{short}: --judge={values.judge} has no {field.partition('.')[2]}")
      values[field].value = values[short].value
  judge = make_value(values, "judge", cls)
  with naming("--judge"):
    judge.check(None)
  return judge


def judge_of(values: flags.FlagValues, cls: type | None, benchmark: Any) -> Any:
  """The judge of a benchmark that needs one, else None.

  Raises:
    UserError: none, where one is needed; one for a benchmark that has no use for it; a bad field.
  """
  from dpr_jax.evaluation.benchmarks.judged import JudgedBenchmark

  judged = isinstance(benchmark, JudgedBenchmark)
  if judged and cls is None:
    raise UserError(f"--benchmark={values.benchmark} needs a judge: --judge_url and --judge_model "
                    "for an endpoint, or --judge_model=FOLDER for a local reward model")
  if not judged and (cls or values.judge_prompts):
    raise UserError(f"--{'judge' if cls else 'judge_prompts'}: --benchmark={values.benchmark} is "
                    "scored without a judge")
  if not judged:
    return None
  judge = make_judge(values, cls)
  if judge.rewards and values.judge_prompts:
    raise UserError("--judge_prompts: a judge that gives rewards has no prompt; leave it out")
  return judge
