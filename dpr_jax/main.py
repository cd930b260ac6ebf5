"""Runs a config: SFT, Dense-Path REINFORCE, controls, evaluation, report.

    python -m dpr_jax.main --config=configs/smoke.py --workdir=DIR [--config.sft.steps=200 ...]

The same command after an interruption goes on where it stopped. --profile_steps=3:5 writes a
profiler trace of these steps of every trained stage to DIR/profile.
"""

import dataclasses
import difflib
import re
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dpr_jax import cli
from dpr_jax.errors import UserError


def parse(argv: Sequence[str]):
  """Command line -> (RunConfig, workdir).

  Raises:
    UserError: naming the flag or the field, and what would be right.
  """
  from dpr_jax import config as config_lib
  from dpr_jax.training import profiling

  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file(
      "config", None, "A file of configs/, NAME.py or NAME.py:arg.", lock_config=True,
      flag_values=values, sys_argv=["dpr_jax.main", *argv],
  )
  workdir = flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
  profile = flags.DEFINE_string(
      "profile_steps", None, "FIRST:LAST, steps of each trained stage to trace, counted from 1.",
      flag_values=values,
  )
  flags.DEFINE_bool("help", False, "Shows this text.", short_name="h", flag_values=values)
  try:
    rest = values(["dpr_jax.main", *argv])[1:]
    if config.value is not None:
      config.value.to_dict()  # A file that failed to load says so only when it is used.
  except OSError as e:
    path = config_path(argv)
    raise UserError(f"--config={path}: {e.strerror or 'no such file'}; expected a file such as "
                    "configs/smoke.py") from None
  except Exception as e:  # A config file is a program: it can raise anything.
    check_fields(argv)
    # An error inside of the file arrives as a traceback in a string; its end says it.
    raise UserError(re.split(r"\b[\w.]*Error: ", str(e))[-1]) from None
  if values.help:
    print(__doc__)
    raise SystemExit(0)
  if rest:
    raise UserError(f"{rest[0]!r} is not a flag; fields are set as --config.FIELD=VALUE")
  for flag, example in ((config, "configs/smoke.py"), (workdir, "runs/smoke")):
    if flag is config and flag.value is None and config_path(argv):
      raise UserError(f"--config={config_path(argv)}: its get_config returns nothing; it must "
                      "return the config")
    if flag.value is None:
      raise UserError(f"--{flag.name} is missing; for example --{flag.name}={example}")
  run_config = config_lib.resolve(config.value)
  for where, steps in (("config.log.profile_steps", run_config.log.profile_steps),
                       ("--profile_steps", profile.value)):
    if steps is not None:
      profiling.parse_steps(steps, where)
  if profile.value is not None:
    log = dataclasses.replace(run_config.log, profile_steps=profile.value)
    run_config = dataclasses.replace(run_config, log=log)
  return run_config, workdir.value


def config_path(argv: Sequence[str]) -> str:
  """The value of --config on a command line, "" if there is none."""
  for i, arg in enumerate(argv):
    if arg == "--config" and i + 1 < len(argv):
      return argv[i + 1]
    if arg.startswith("--config="):
      return arg.partition("=")[2]
  return ""


def check_fields(argv: Sequence[str]) -> None:
  """Raises UserError for the first --config.FIELD that no config has, with the nearest name."""
  from dpr_jax.config import default_config

  for arg in argv:
    if not arg.startswith("--config."):
      continue
    section, path = default_config(), arg.partition("=")[0].removeprefix("--config.")
    for name in path.split("."):
      if not hasattr(section, "keys") or name not in section:
        known = list(section.keys()) if hasattr(section, "keys") else []
        near = difflib.get_close_matches(name, known, 1)
        hint = f"known: {', '.join(sorted(known)) or 'none'}"
        if near:
          hint = f"did you mean {near[0]!r}?"
        raise UserError(f"--config.{path}: {name!r} is not a field; {hint}")
      section = section[name]


def main(argv: Sequence[str]) -> None:
  run_config, workdir = parse(argv)
  from dpr_jax import distributed

  distributed.initialize()
  import jax

  from dpr_jax import pipeline

  results = pipeline.run(run_config, workdir)
  if jax.process_index() == 0:
    print(summary(results, workdir))


def summary(results, workdir: str) -> str:
  """The table that ends a run."""
  metrics = [
      m
      for m in ("accuracy_sampled", "accuracy_greedy", "token_f1_sampled", "length_sampled")
      if any(m in s for s in results["systems"].values())
  ]
  lines = [f"{'system':<22}" + "".join(f"{m:>26}" for m in metrics)]
  for name, values in results["systems"].items():
    cells = []
    for metric in metrics:
      x = values.get(metric)
      cells.append("" if x is None else f"{x['mean']:.3f} [{x['ci95'][0]:.3f}, {x['ci95'][1]:.3f}]")
    lines.append(f"{name:<22}" + "".join(f"{c:>26}" for c in cells))
  lines.append(f"report: {workdir}/report/report.html")
  return "\n".join(lines)


if __name__ == "__main__":
  cli.run_door(main)
  sys.exit(0)
