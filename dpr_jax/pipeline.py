"""The order of stages: sft, ref, dpr, baselines, evaluate, report; for one seed or several."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax

from dpr_jax import config as config_lib
from dpr_jax import sharding
from dpr_jax.evals.results import build_results
from dpr_jax.report import write_report
from dpr_jax.stages.context import Run, set_up
from dpr_jax.stages.continued_sft import continued_sft_stage
from dpr_jax.stages.dpr import dpr_stage
from dpr_jax.stages.evaluate import evaluate_stage
from dpr_jax.stages.sft import ref_stage, sft_stage
from dpr_jax.workdir import Workdir, write_json


def report_stage(workdir: Workdir, parts: list[Workdir], seeds: list[int]) -> dict[str, Any]:
  results = build_results([w.path for w in parts], seeds)
  if jax.process_index() == 0:
    write_json(workdir.report / "results.json", results)
    write_report(workdir.path)
  return results


STAGES: tuple[tuple[str, Callable[[Run], None]], ...] = (
    ("sft", sft_stage),
    ("ref", ref_stage),
    ("dpr", dpr_stage),
    ("continued_sft", continued_sft_stage),
    ("evaluate", evaluate_stage),
)


def run_seed(
    config: config_lib.RunConfig, workdir: Workdir, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """All stages of one seed; returns its results."""
  run = set_up(config, workdir, mesh)
  for name, stage in STAGES:
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
