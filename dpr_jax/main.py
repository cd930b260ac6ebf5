"""Runs a config: SFT, Dense-Path REINFORCE, other methods, evaluation, report.

    python -m dpr_jax.main --config=configs/smoke.py --workdir=DIR [--config.sft.steps=200 ...]

DIR may be in a bucket, gs://BUCKET/RUN. Rerun the same command after an interruption to resume.
After a divergence --resume_with_changes goes on from the last checkpoint with another optimizer.
--config.reference.kind=ema takes another kind of reference. --profile_steps=3:5 writes a profiler
trace of these steps of every trained stage to DIR/profile. --compilation_cache=FOLDER keeps
compiled programs where other runs find them; otherwise they are in the workdir.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from dpr_jax import cli, compilation_cache, paths


def parse(argv: Sequence[str]):
  """Command line -> (RunConfig, the arguments of `pipeline.run` that follow it).

  Raises:
    UserError: naming the flag or the field, and what would be right.
  """
  from dpr_jax import config as config_lib
  from dpr_jax.config.sections import parse_steps
  from dpr_jax.errors import naming

  def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_string(
        "profile_steps", None, "FIRST:LAST, steps of each trained stage to trace, counted from 1.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "compilation_cache", None, f"{compilation_cache.HELP} in the workdir.", flag_values=values
    )
    flags.DEFINE_bool(
        "resume_with_changes", False, "Goes on with other optimizers of stages that are not "
        "finished; config.json keeps the history.", flag_values=values,
    )

  values = cli.parse_flags(
      argv,
      entry_point="dpr_jax.main",
      doc=__doc__,
      define=define,
      required={"config": "configs/smoke.py", "workdir": "runs/smoke"},
  )
  with naming("--workdir"):
    paths.as_path(values.workdir)
  run_config = config_lib.resolve(values.config)
  cli.check_methods(argv, run_config.methods)
  if values.profile_steps is not None:
    with naming("--profile_steps"):
      parse_steps(values.profile_steps)
    log = dataclasses.replace(run_config.log, profile_steps=values.profile_steps)
    run_config = dataclasses.replace(run_config, log=log)
  if values.compilation_cache:
    compilation_cache.check_folder(values.compilation_cache)
  return run_config, {
      "workdir": values.workdir,
      "compilation_cache": values.compilation_cache,
      "with_changes": values.resume_with_changes,
  }


@cli.readable
def main(argv: Sequence[str]) -> None:
  from dpr_jax import agreement, distributed

  distributed.initialize()
  run_config, how = agreement.agree(lambda: parse(argv))
  import jax

  from dpr_jax import pipeline

  results = pipeline.run(run_config, **how)
  if jax.process_index() == 0:
    print(summary(results, how["workdir"]))


def summary(results: Mapping[str, Any], workdir: str) -> str:
  """The table that ends a run; of a sweep, one for each point."""
  columns = results["columns"]
  if "sweep" in results:
    sweep = results["sweep"]
    parts = [f"{sweep['field']} = {p['value']}\n{_table(p, columns)}" for p in sweep["points"]]
  else:
    parts = [_table(results, columns)]
    parts += [verdict["text"] for name, verdict in results.get("gaming", {}).items()
              if name == results["main"]]
  return "\n".join([*parts, f"report: {workdir}/report/report.html"])


def _table(results: Mapping[str, Any], columns: Mapping[str, Any]) -> str:
  main = [
      name for name, column in columns.items()
      if column["main"] and "/" not in name
      and any(name in s for s in results["systems"].values())
  ]
  lines = [f"{'system':<22}" + "".join(f"{m:>28}" for m in main)]
  for name, values in results["systems"].items():
    cells = []
    for metric in main:
      x = values.get(metric)
      cells.append("" if x is None else f"{x['mean']:.3f} [{x['ci95'][0]:.3f}, {x['ci95'][1]:.3f}]")
    lines.append(f"{name:<22}" + "".join(f"{c:>28}" for c in cells))
  return "\n".join(lines)


if __name__ == "__main__":
  cli.run_entry_point(main)
  sys.exit(0)
