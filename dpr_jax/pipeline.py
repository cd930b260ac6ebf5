"""The order of stages: sft, ref, dpr, baselines, evaluate, report; for one seed or several."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax

from dpr_jax import config as config_lib
from dpr_jax import sharding
from dpr_jax.evals.results import build_results
from dpr_jax.report import gaming, write_report
from dpr_jax.stages.context import Run, set_up
from dpr_jax.stages.dpr import (
    dpr_stage,
    endogenous_stage,
    log_likelihood_stage,
    sentence_level_stage,
)
from dpr_jax.stages.evaluate import evaluate_stage
from dpr_jax.stages.on_demos import continued_sft_stage, dft_stage, iq_lm_stage
from dpr_jax.stages.on_pairs import gsil_stage, spin_stage
from dpr_jax.stages.plausibility import plausibility_stage
from dpr_jax.stages.reference import ref_stage
from dpr_jax.stages.sft import sft_stage
from dpr_jax.training.metrics import read_metrics
from dpr_jax.workdir import Workdir, write_json


def report_stage(workdir: Workdir, parts: list[Workdir], seeds: list[int]) -> dict[str, Any]:
  results = build_results([w.path for w in parts], seeds)
  lines = [read_metrics(w.stage("dpr") / "metrics.jsonl") for w in parts]
  if any(lines):
    results["gaming"] = gaming(results, {"dpr": lines})
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
    "sentence_level": sentence_level_stage,
    "endogenous": endogenous_stage,
    "log_likelihood": log_likelihood_stage,
}


def stages(config: config_lib.RunConfig) -> list[tuple[str, Callable[[Run], None]]]:
  """(name, stage) in the order in which they run."""
  trained = [("sft", sft_stage), ("ref", ref_stage), ("dpr", dpr_stage)]
  baselines = [(name, BASELINES[name]) for name in config.baseline.names]
  return [*trained, *baselines, ("evaluate", evaluate_stage), ("plausibility", plausibility_stage)]


def run_seed(
    config: config_lib.RunConfig, workdir: Workdir, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """All stages of one seed; returns its results."""
  run = set_up(config, workdir, mesh)
  for name, stage in stages(config):
    stage(run)
    sharding.barrier(name)
  return report_stage(workdir, [workdir], [config.seed])


def cache_compilations(workdir: Workdir) -> None:
  """Keeps compiled programs in the workdir, for its seeds and for a run that goes on.

  JAX_COMPILATION_CACHE_DIR names another place, to be shared by several runs.
  """
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(workdir.compilations))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def run(config: config_lib.RunConfig, workdir: str) -> dict[str, Any]:
  """Runs a config from wherever it stopped to its report.

  Args:
    workdir: a folder that does not exist, is empty, or holds an earlier part of the same run.

  Returns:
    The content of report/results.json.

  Raises:
    UserError: anything wrong with the config, the data, the weights or the workdir.
  """
  section = config.mesh
  mesh = sharding.make_mesh(section.data, section.fsdp, section.tensor)
  root = Workdir(workdir)
  root.check(config)
  cache_compilations(root)
  with jax.set_mesh(mesh):
    if config.seeds == 1:
      return run_seed(config, root, mesh)
    root.claim(config)
    seeds = list(range(config.seed, config.seed + config.seeds))
    parts = [Workdir(root.path / f"seed_{seed}") for seed in seeds]
    for seed, part in zip(seeds, parts):
      print(f"seed {seed}", file=sys.stderr)
      run_seed(dataclasses.replace(config, seed=seed, seeds=1), part, mesh)
    return report_stage(root, parts, seeds)
