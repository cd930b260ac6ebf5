"""Runs a config: SFT, Dense-Path REINFORCE, controls, evaluation, report.

    python -m dpr_jax.main --config=configs/smoke.py --workdir=DIR [--config.sft.steps=200 ...]

The same command after an interruption goes on where it stopped. --profile_steps=3:5 writes a
profiler trace of these steps of every trained stage to DIR/profile. --compilation_cache=FOLDER
keeps compiled programs where other runs find them; otherwise they are in the workdir.
"""

import dataclasses
import sys
from collections.abc import Sequence

from absl import flags

from dpr_jax import cli, compilations


def parse(argv: Sequence[str]):
  """Command line -> (RunConfig, workdir, folder of compiled programs or None).

  Raises:
    UserError: naming the flag or the field, and what would be right.
  """
  from dpr_jax import config as config_lib
  from dpr_jax.flags import parse_config
  from dpr_jax.training import profiling

  def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_string(
        "profile_steps", None, "FIRST:LAST, steps of each trained stage to trace, counted from 1.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "compilation_cache", None, f"{compilations.HELP} in the workdir.", flag_values=values
    )

  config, values = parse_config(
      argv,
      door="dpr_jax.main",
      doc=__doc__,
      define=define,
      required={"config": "configs/smoke.py", "workdir": "runs/smoke"},
  )
  run_config = config_lib.resolve(config)
  for where, steps in (("config.log.profile_steps", run_config.log.profile_steps),
                       ("--profile_steps", values.profile_steps)):
    if steps is not None:
      profiling.parse_steps(steps, where)
  if values.profile_steps is not None:
    log = dataclasses.replace(run_config.log, profile_steps=values.profile_steps)
    run_config = dataclasses.replace(run_config, log=log)
  if values.compilation_cache:
    compilations.check_folder(values.compilation_cache)
  return run_config, values.workdir, values.compilation_cache


def main(argv: Sequence[str]) -> None:
  run_config, workdir, compilation_cache = parse(argv)
  from dpr_jax import distributed

  distributed.initialize()
  import jax

  from dpr_jax import pipeline

  results = pipeline.run(run_config, workdir, compilation_cache)
  if jax.process_index() == 0:
    print(summary(results, workdir))


def summary(results, workdir: str) -> str:
  """The table that ends a run; of a sweep, one for each point."""
  if "sweep" in results:
    sweep = results["sweep"]
    parts = [f"{sweep['field']} = {p['value']}\n{_table(p)}" for p in sweep["points"]]
  else:
    parts = [_table(results)]
  return "\n".join([*parts, f"report: {workdir}/report/report.html"])


def _table(results) -> str:
  metrics = [
      m
      for m in ("accuracy_sampled", "accuracy_greedy", "token_f1_sampled", "length_sampled",
                "reverse_kl", "forward_kl")
      if any(m in s for s in results["systems"].values())
  ]
  lines = [f"{'system':<22}" + "".join(f"{m:>28}" for m in metrics)]
  for name, values in results["systems"].items():
    cells = []
    for metric in metrics:
      x = values.get(metric)
      cells.append("" if x is None else f"{x['mean']:.3f} [{x['ci95'][0]:.3f}, {x['ci95'][1]:.3f}]")
    lines.append(f"{name:<22}" + "".join(f"{c:>28}" for c in cells))
  if results.get("gaming"):
    lines.append(results["gaming"]["text"])
  return "\n".join(lines)


if __name__ == "__main__":
  cli.run_door(main)
  sys.exit(0)
