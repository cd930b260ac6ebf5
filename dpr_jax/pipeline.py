"""The order of a run: sft, the reference, the methods that are compared, evaluation, report.

For one seed or several, and for one config or the points of a sweep.
"""

import contextlib
import dataclasses
import datetime
import sys
from typing import Any

import jax

from dpr_jax import config as config_lib
from dpr_jax import lock, sharding
from dpr_jax import sweep as sweep_lib
from dpr_jax.agreement import agree, check_shared
from dpr_jax.changes import record_changes
from dpr_jax.compilation_cache import keep_compilations
from dpr_jax.errors import naming
from dpr_jax.evaluation.evaluate import evaluate, write_corruption, write_heatmaps
from dpr_jax.evaluation.reference_quality import measure_reference
from dpr_jax.evaluation.results import build_results, build_sweep_results
from dpr_jax.inputs import today
from dpr_jax.methods.sft import sft_stage
from dpr_jax.report import gaming, write_report
from dpr_jax.run import Run, set_up
from dpr_jax.training.checkpoints import DamagedCheckpoint, make_way
from dpr_jax.training.metrics import read_metrics
from dpr_jax.workdir import Workdir, code_fingerprint, versions, write_json


def make_reference(run: Run) -> None:
  """Makes the reference, measures it, and maybe selects it."""
  run.config.reference.prepare(run)
  measure_reference(run)


def train_method(run: Run, name: str) -> None:
  """Trains a method, if it does."""
  method = run.config.methods[name]
  if method.trained:
    method.train(run, name)
    sharding.barrier(name)


def run_stages(run: Run) -> dict[str, Any]:
  """Everything of one seed; returns its results."""
  sft_stage(run)
  sharding.barrier("sft")
  make_reference(run)
  sharding.barrier("ref")
  for name in run.config.compare:
    train_method(run, name)
  evaluate(run)
  write_corruption(run)
  write_heatmaps(run)
  sharding.barrier("evaluation")
  return report(run.workdir, [run.workdir], [run.config.seed])


def report(workdir: Workdir, parts: list[Workdir], seeds: list[int]) -> dict[str, Any]:
  """results.json and the page of one seed or of several."""
  results = build_results([w.path for w in parts], seeds)
  verdicts = {}
  for name in results["labels"]:
    lines = [read_metrics(w.stage(name) / "metrics.jsonl") for w in parts]
    if any("reward" in line for of_seed in lines for line in of_seed[:1]):
      verdicts[name] = gaming(results, {name: lines}, name)
  if verdicts:
    results["gaming"] = verdicts
  if jax.process_index() == 0:
    write_json(workdir.report / "results.json", results)
    write_report(workdir.path)
  return results


def sweep_seed(run: Run) -> dict[str, Any]:
  """What all points of a sweep share, then each point; returns the results of one seed."""
  config, workdir = run.config, run.workdir
  shared = sweep_lib.shared(config)
  if shared.sft:
    sft_stage(run)
    sharding.barrier("sft")
  if shared.reference:
    make_reference(run)
    sharding.barrier("ref")
  for name in shared.methods:
    train_method(run, name)
  evaluate(run, shared.systems, measured=shared.reference)
  if shared.evaluation and shared.systems:
    write_corruption(run)
  sharding.barrier("shared")
  for point in sweep_lib.points(config):
    print(f"{config.sweep.field} = {point.value}", file=sys.stderr)
    part = set_up(point.config, Workdir(workdir.path / point.name), run.mesh, like=run)
    if jax.process_index() == 0:
      sweep_lib.adopt(shared, workdir, part.workdir)
    sharding.barrier("adopt")
    run_stages(part)
  return sweep_report(config, workdir, [workdir], [config.seed])


def sweep_report(
    config: config_lib.RunConfig, workdir: Workdir, parts: list[Workdir], seeds: list[int]
) -> dict[str, Any]:
  """results.json and the page of a sweep, of one seed or of several."""
  results = build_sweep_results(
      [w.path for w in parts],
      seeds,
      config.sweep.field,
      {point.value: point.name for point in sweep_lib.points(config)},
  )
  if jax.process_index() == 0:
    write_json(workdir.report / "results.json", results)
    write_report(workdir.path)
  return results


def run(
    config: config_lib.RunConfig,
    workdir: str,
    compilation_cache: str | None = None,
    with_changes: bool = False,
) -> dict[str, Any]:
  """Runs a config from wherever it stopped to its report.

  Args:
    workdir: a folder that does not exist, is empty, or holds an earlier part of the same run.
    compilation_cache: folder of compiled programs; None takes JAX_COMPILATION_CACHE_DIR, else one
      in the workdir, for its seeds and for a run that is resumed.
    with_changes: the run in `workdir` may have begun with other optimizers (see changes.py).

  Returns:
    The content of report/results.json.

  Raises:
    UserError: anything wrong with the config, the data, the weights or the workdir.
  """
  if config.sweep.field:
    sweep_lib.points(config)  # All of them are valid, before anything starts.
  section = config.mesh
  with naming("config.mesh"):
    mesh = sharding.make_mesh(section.data, section.fsdp, section.tensor)
  root = Workdir(workdir)
  agree(
      lambda: None if with_changes else root.check(config),
      lambda _: {"config": config_lib.to_json(config), "versions": versions(),
                 "code of dpr_jax": code_fingerprint()},
  )

  def finish(
      config: config_lib.RunConfig, workdir: Workdir, day: datetime.date | None = None
  ) -> dict[str, Any]:
    """All stages of one seed; a damaged checkpoint of a finished one is trained again."""
    stages = sweep_seed if config.sweep.field else run_stages
    while True:
      try:
        return stages(set_up(config, workdir, mesh, day=day))
      except DamagedCheckpoint as damaged:
        if not damaged.directory.is_relative_to(workdir.path):
          raise
        make_way(damaged)

  with contextlib.ExitStack() as held:
    agree(
        lambda: held.enter_context(lock.locked(root.path, "--workdir")), seconds=2 * lock.STALE
    )
    held.enter_context(jax.set_mesh(mesh))
    check_shared(root.path, f"--workdir={workdir}")
    if with_changes:
      record_changes(root, config)
    agree(lambda: root.check(config))  # Another run may have begun before this one held the lock.
    keep_compilations(compilation_cache, default=root.compilations)
    if config.seeds == 1:
      return finish(config, root)
    day = today()  # The same prompts for all seeds, also of those that begin later.
    if root.config_file.exists():
      then = root.read_config().get("inputs", {})
      day = datetime.date.fromisoformat(then.get("date", day.isoformat()))
    root.claim(config, inputs={"date": day.isoformat()})
    seeds = list(range(config.seed, config.seed + config.seeds))
    parts = [Workdir(root.path / f"seed_{seed}") for seed in seeds]
    for seed, part in zip(seeds, parts):
      print(f"seed {seed}", file=sys.stderr)
      finish(dataclasses.replace(config, seed=seed, seeds=1), part, day)
    if config.sweep.field:
      return sweep_report(config, root, parts, seeds)
    return report(root, parts, seeds)
