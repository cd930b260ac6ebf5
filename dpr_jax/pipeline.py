"""The order of stages: sft, ref, dpr, baselines, evaluate, report.

For one seed or several, and for one config or the points of a sweep.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax

from dpr_jax import config as config_lib
from dpr_jax import sharding
from dpr_jax import sweep as sweep_lib
from dpr_jax.compilations import keep_compilations
from dpr_jax.evals.results import build_results, build_sweep_results
from dpr_jax.report import gaming, write_report
from dpr_jax.stages.context import Run, set_up
from dpr_jax.stages.dpr import (
    REINFORCED,
    dpr_stage,
    endogenous_stage,
    log_likelihood_stage,
    reward_to_go_stage,
    sentence_level_stage,
)
from dpr_jax.stages.evaluate import evaluate_stage
from dpr_jax.stages.expert import expert_stage
from dpr_jax.stages.on_demos import continued_sft_stage, dft_stage, iq_lm_stage
from dpr_jax.stages.on_pairs import gsil_stage, spin_stage
from dpr_jax.stages.plausibility import plausibility_stage
from dpr_jax.stages.reference import ref_stage
from dpr_jax.stages.sft import sft_stage
from dpr_jax.training.metrics import read_metrics
from dpr_jax.workdir import Workdir, write_json


def report_stage(workdir: Workdir, parts: list[Workdir], seeds: list[int]) -> dict[str, Any]:
  results = build_results([w.path for w in parts], seeds)
  for name in ("dpr", *REINFORCED):
    lines = [read_metrics(w.stage(name) / "metrics.jsonl") for w in parts]
    if any(lines):
      verdict = gaming(results, {name: lines}, name)
      if name == "dpr":
        results["gaming"] = verdict
      else:
        results.setdefault("gaming_of_ablations", {})[name] = verdict
  if jax.process_index() == 0:
    write_json(workdir.report / "results.json", results)
    write_report(workdir.path)
  return results


BASELINES: dict[str, Callable[[Run], None]] = {
    "continued_sft": continued_sft_stage,
    "dft": dft_stage,
    "iq_lm": iq_lm_stage,
    "spin": spin_stage,
    "gsil": gsil_stage,
    "reward_to_go": reward_to_go_stage,
    "sentence_level": sentence_level_stage,
    "endogenous": endogenous_stage,
    "log_likelihood": log_likelihood_stage,
}


def stages(config: config_lib.RunConfig) -> list[tuple[str, Callable[[Run], None]]]:
  """(name, stage) in the order in which they run."""
  trained = [("sft", sft_stage), ("ref", ref_stage), ("dpr", dpr_stage)]
  baselines = [(name, BASELINES[name]) for name in config.baseline.names]
  judged = [
      ("evaluate", evaluate_stage), ("plausibility", plausibility_stage), ("expert", expert_stage)
  ]
  return [*trained, *baselines, *judged]


def run_seed(
    config: config_lib.RunConfig, workdir: Workdir, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """All stages of one seed, or all points of its sweep; returns its results."""
  if config.sweep.field:
    return sweep_seed(config, workdir, mesh)
  return _run_stages(set_up(config, workdir, mesh))


def _run_stages(run: Run) -> dict[str, Any]:
  for name, stage in stages(run.config):
    stage(run)
    sharding.barrier(name)
  return report_stage(run.workdir, [run.workdir], [run.config.seed])


def sweep_seed(
    config: config_lib.RunConfig, workdir: Workdir, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """What all points share, then each point; returns the results of the sweep of one seed."""
  what = sweep_lib.shared(config)
  run = set_up(config, workdir, mesh)
  for name, stage in stages(config):
    if name in what.stages:
      stage(run)
      sharding.barrier(name)
  if what.evaluated:
    evaluate_stage(run, what.evaluated)
    sharding.barrier("evaluate shared")
    expert_stage(run, what.evaluated)
    sharding.barrier("expert shared")
  for point in sweep_lib.points(config):
    print(f"{config.sweep.field} = {point.value}", file=sys.stderr)
    part = set_up(point.config, Workdir(workdir.path / point.name), mesh, like=run)
    if jax.process_index() == 0:
      sweep_lib.adopt(what, workdir, part.workdir)
    sharding.barrier("adopt")
    _run_stages(part)
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
    config: config_lib.RunConfig, workdir: str, compilation_cache: str | None = None
) -> dict[str, Any]:
  """Runs a config from wherever it stopped to its report.

  Args:
    workdir: a folder that does not exist, is empty, or holds an earlier part of the same run.
    compilation_cache: folder of compiled programs; None takes JAX_COMPILATION_CACHE_DIR, else one
      in the workdir, for its seeds and for a run that goes on.

  Returns:
    The content of report/results.json.

  Raises:
    UserError: anything wrong with the config, the data, the weights or the workdir.
  """
  if config.sweep.field:
    sweep_lib.points(config)  # All of them are valid, before anything starts.
  section = config.mesh
  mesh = sharding.make_mesh(section.data, section.fsdp, section.tensor)
  root = Workdir(workdir)
  root.check(config)
  keep_compilations(compilation_cache, default=root.compilations)
  with jax.set_mesh(mesh):
    if config.seeds == 1:
      return run_seed(config, root, mesh)
    root.claim(config)
    seeds = list(range(config.seed, config.seed + config.seeds))
    parts = [Workdir(root.path / f"seed_{seed}") for seed in seeds]
    for seed, part in zip(seeds, parts):
      print(f"seed {seed}", file=sys.stderr)
      run_seed(dataclasses.replace(config, seed=seed, seeds=1), part, mesh)
    if config.sweep.field:
      return sweep_report(config, root, parts, seeds)
    return report_stage(root, parts, seeds)
