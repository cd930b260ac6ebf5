"""The demonstrations of a user's file, each judged by models that were trained on others.

`methods.cleaned_sft` does it as a stage of a run; here its judging alone runs, on every record of
the file, with none held out. A workdir keeps the models of the folds, so that it can be resumed.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from dpr_jax import config as config_lib
from dpr_jax import lock, sharding
from dpr_jax.agreement import agree, check_shared
from dpr_jax.compilation_cache import keep_compilations
from dpr_jax.config.sections import DataSection
from dpr_jax.data.formats import dialogue_problem, parse_demo
from dpr_jax.data.records import iter_records
from dpr_jax.data.text_ids import token_texts
from dpr_jax.errors import UserError, naming
from dpr_jax.methods.cleaned_sft import CleanedSFT
from dpr_jax.run import Run, set_up
from dpr_jax.training.checkpoints import DamagedCheckpoint, make_way
from dpr_jax.workdir import Workdir

WRONG_METHOD = ("--method={} must be a method of the kind cleaned_sft with treatment='cut', "
                "without `like`")


@dataclasses.dataclass(frozen=True)
class JudgedRecord:
  """A record of the file with what was found of it."""

  record: dict[str, Any]
  source: str  # FILE:LINE, or FILE[INDEX].
  kept: bool = False
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


# What a line adds to a record, or must not keep of an earlier scoring.
_ADDED = ("tokens", "token_rewards", "logp_sft", "logp_ref", "endogenous", "reward", "filter_score",
          "filter_problem")


def check_method(config: config_lib.RunConfig, name: str) -> CleanedSFT:
  """The method that judges.

  Raises:
    UserError: it is of another kind, or does something else than to leave demonstrations out.
  """
  method = config.methods.get(name)
  if not isinstance(method, CleanedSFT) or method.like or method.treatment != "cut":
    raise UserError(WRONG_METHOD.format(name))
  return method


def of_file(config: Any, demos: str, name: str, set_apart: bool) -> config_lib.RunConfig:
  """The config of a run that judges a file.

  Args:
    config: an ml_collections config that is not resolved; it is changed.
    demos: the file.
    name: of the method.
    set_apart: whether what cannot be read as a demonstration is returned with its problem.

  Raises:
    UserError: as `config.resolve`, or another method than `check_method` takes.
  """
  # Before the config is resolved: what it would say of a method of another kind is of no use here.
  method = config.methods.get(name, {})
  if method.get("like") or "folds" not in method:
    raise UserError(WRONG_METHOD.format(name))
  plain = DataSection()
  with config.unlocked():
    config.compare, config.seeds, config.sweep.field = (name,), 1, ""
    config.data.demos = demos
    for field in ("tasks", "num_demos", "corrupt", "corruption", "minority"):
      config.data[field] = getattr(plain, field)  # The file is there in place of the tasks.
    if set_apart:
      config.data.on_empty = config.data.on_disorder = "drop"  # `_problems` has them.
  resolved = config_lib.resolve(config)
  check_method(resolved, name)
  return resolved


def judge_demos(
    config: config_lib.RunConfig, workdir: str, name: str,
    check: Callable[[Run], None] = lambda run: None,
) -> tuple[Run, list[dict[str, Any]]]:
  """The lines of `CleanedSFT.judge` of every demonstration of a config; none is held out.

  Args:
    workdir: a folder that does not exist, is empty, or holds an earlier part of the same.
    name: of the method.
    check: called before anything is written.

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
    keep_compilations(None, default=root.compilations)
    while True:  # A damaged checkpoint of a fold is trained again, as in a run.
      run = set_up(config, root, mesh, evaluated=False, check=check)
      try:
        return run, method.judge(run, name)
      except DamagedCheckpoint as damaged:
        make_way(damaged)


def judge_file(
    config: config_lib.RunConfig, workdir: str, name: str, set_apart: bool
) -> list[JudgedRecord]:
  """Every record of the file of a config, in its order.

  Args:
    config, workdir, name: see `judge_demos`; the config is one of `of_file`.
    set_apart: whether records that cannot be judged are returned with their problem.

  Raises:
    UserError: as in a run; a record has a field that would be overwritten; or, without `set_apart`,
      the first record that cannot be judged.
  """

  def check(run: Run) -> None:
    records, problems = list(iter_records(config.data.demos)), _problems(run)
    for record, source in records:
      if taken := [field for field in _ADDED if field in record]:
        raise UserError(f"{source}: field {taken[0]!r} is one that the scores are written to; "
                        "rename it, or leave it out")
    if problems and not set_apart:
      where, why = next((s, problems[s]) for _, s in records if s in problems)
      raise UserError(f"{where}: {why} ({len(problems)} of {len(records)} records cannot be "
                      "judged); mend them, or give --unjudged=FILE to set them apart")

  run, lines = judge_demos(config, workdir, name, check)
  return _records(run, check_method(config, name), lines)


def _problems(run: Run) -> dict[str, str]:
  """Source -> why a record cannot be judged."""
  out, data = {}, run.config.data
  examples = {example.source: example for example in run.data.examples}
  for record, source in iter_records(data.demos):
    example = examples.get(source)
    if example is None:  # The reader has left it out.
      demo = parse_demo(record, source, run.data.summary["format"])
      out[source] = dialogue_problem(demo) or f"beyond config.data.max_demos={data.max_demos}"
      continue
    length, fits = len(example.tokens), example.loss_mask[: data.row_length] > 0
    if length > data.row_length and data.overlong != "truncate":
      out[source] = (f"{length} tokens exceed config.data.row_length={data.row_length}; raise it, "
                     "or set config.data.overlong=truncate")
    elif not fits.any():
      out[source] = "no token of it is trained within config.data.row_length"
  return out


def _records(run: Run, method: CleanedSFT, lines: list[dict[str, Any]]) -> list[JudgedRecord]:
  problems, found = _problems(run), {}
  scores = method.scores_of(lines, run.config.seed)
  for demo, example, line, score in zip(
      run.data.demos, run.data.examples, lines, scores, strict=True
  ):
    if not line["judged"]:
      continue
    length = run.config.data.row_length
    trained = example.tokens[:length][example.loss_mask[:length] > 0]
    own = {"tokens": token_texts(trained, run.tokenizer),
           "token_rewards": line["token_rewards"], "logp_sft": line["logp_sft"],
           "reward": round(line["reward_sum"], 6)}
    found[demo.source] = JudgedRecord(
        {}, demo.source, line["kept"], "", demo.messages, own, round(float(score), 6)
    )
  return [
      dataclasses.replace(found[source], record=record) if source in found
      else JudgedRecord(record, source, problem=problems[source])
      for record, source in iter_records(run.config.data.demos)
  ]
