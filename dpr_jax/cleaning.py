"""The demonstrations of a user's file, each judged by models that were trained on others.

`methods.cleaned_sft` does it as a stage of a run; here its judging alone runs, on every record of
the file, with none held out. A workdir keeps the models of the folds, so that it can be resumed.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dpr_jax import config as config_lib
from dpr_jax import lock, sharding
from dpr_jax.agreement import agree, check_shared
from dpr_jax.compilation_cache import keep_compilations
from dpr_jax.data.records import iter_records
from dpr_jax.data.text_ids import token_texts
from dpr_jax.errors import UserError, naming
from dpr_jax.methods.cleaned_sft import CleanedSFT
from dpr_jax.run import Run, set_up
from dpr_jax.workdir import Workdir

WRONG_METHOD = ("--method={} must be a method of the kind cleaned_sft with treatment='cut', "
                "without `like`")


@dataclasses.dataclass(frozen=True)
class JudgedRecord:
  """A record of the file with what was found of it."""

  record: dict[str, Any]
  source: str  # FILE:LINE, or FILE[INDEX].
  kept: bool
  problem: str = ""  # why it could not be judged.
  messages: tuple[Any, ...] = ()
  scores: dict[str, Any] = dataclasses.field(default_factory=dict)  # as `dpr_jax.score` names them.
  score: float | None = None  # what decided, nats.

  @property
  def judged(self) -> bool:
    return not self.problem

  def line(self) -> dict[str, Any]:
    """The record with its scores."""
    found = {**self.scores, "filter_score": self.score} if self.judged else {
        "filter_problem": self.problem}
    return {**self.record, **found}


def check_method(config: config_lib.RunConfig, name: str) -> CleanedSFT:
  """The method that judges.

  Raises:
    UserError: it is of another kind, or does something else than to leave demonstrations out.
  """
  method = config.methods.get(name)
  if not isinstance(method, CleanedSFT) or method.like or method.treatment != "cut":
    raise UserError(WRONG_METHOD.format(name))
  return method


def judge_demos(
    config: config_lib.RunConfig, workdir: str, name: str,
    check: Callable[[Run], None] = lambda run: None,
) -> tuple[Run, list[dict[str, Any]]]:
  """The lines of `CleanedSFT.judge` of every demonstration of a config; none is held out.

  Args:
    workdir: a folder that does not exist, is empty, or holds an earlier part of the same.
    name: of the method.
    check: called before anything is trained.

  Raises:
    UserError: as in a run.
  """
  method, section = check_method(config, name), config.mesh
  data = dataclasses.replace(config.data, holdout=0)
  config = dataclasses.replace(config, data=data, compare=(name,), seeds=1)
  with naming("config.mesh"):
    mesh = sharding.make_mesh(section.data, section.fsdp, section.tensor)
  root = Workdir(workdir)
  with contextlib.ExitStack() as held:
    agree(lambda: held.enter_context(lock.locked(root.path, "--workdir")), seconds=2 * lock.STALE)
    held.enter_context(jax.set_mesh(mesh))
    check_shared(root.path, f"--workdir={workdir}")
    run = set_up(config, root, mesh, evaluated=False)
    keep_compilations(None, default=root.compilations)
    check(run)
    return run, method.judge(run, name)


def judge_file(
    config: config_lib.RunConfig, workdir: str, name: str, demos: str, may_fail: bool,
) -> list[JudgedRecord]:
  """Every record of a file, in its order.

  Args:
    config, workdir, name: see `judge_demos`; the data section says how the file is read.
    demos: the file.
    may_fail: whether records that cannot be judged are returned with their problem.

  Raises:
    UserError: as in a run; or, without `may_fail`, the first record that cannot be judged.
  """

  def check(run: Run) -> None:
    problems = _problems(run)
    if problems and not may_fail:
      where, why = next(iter(problems.items()))
      raise UserError(f"{where}: {why} ({len(problems)} of {len(run.data.demos)} records cannot be "
                      "judged); mend them, or give --unjudged=FILE to set them apart")

  config = dataclasses.replace(config, data=dataclasses.replace(config.data, demos=demos))
  run, lines = judge_demos(config, workdir, name, check)
  return _records(run, check_method(config, name), lines, demos)


def _problems(run: Run) -> dict[str, str]:
  """Source -> why a demonstration cannot be judged."""
  out, data = {}, run.config.data
  for example in run.data.examples:
    length, fits = len(example.tokens), example.loss_mask[: data.row_length] > 0
    if length > data.row_length and data.overlong != "truncate":
      out[example.source] = (f"{length} tokens exceed config.data.row_length={data.row_length}; "
                             "raise it, or set config.data.overlong=truncate")
    elif not fits.any():
      out[example.source] = "no token of it is trained within config.data.row_length"
  return out


def _records(
    run: Run, method: CleanedSFT, lines: list[dict[str, Any]], path: str
) -> list[JudgedRecord]:
  found, problems = {}, _problems(run)
  scores = method.scores_of(lines, run.config.seed)
  for demo, example, line, score in zip(
      run.data.demos, run.data.examples, lines, scores, strict=True
  ):
    own: dict[str, Any] = {}
    if line["judged"]:
      length = run.config.data.row_length
      trained = example.tokens[:length][example.loss_mask[:length] > 0]
      own = {"tokens": token_texts(trained, run.tokenizer),
             "token_rewards": line["token_rewards"], "logp_sft": line["logp_sft"],
             "reward": round(line["reward_sum"], 6)}
    found[demo.source] = JudgedRecord(
        {}, demo.source, line["kept"], problems.get(demo.source, ""), demo.messages, own,
        round(float(score), 6) if np.isfinite(score) else None,
    )
  out = []
  for record, source in iter_records(path):
    judged = found.get(source)
    if judged is None:  # config.data.on_empty=drop, on_disorder=drop or max_demos.
      judged = JudgedRecord({}, source, False, "it is left out by config.data")
    out.append(dataclasses.replace(judged, record=record))
  return out
