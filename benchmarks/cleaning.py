"""How well the sign of the cross-fitted reward finds wrong demonstrations, setting by setting.

    python -m benchmarks.cleaning --workdir=runs/cleaning --seeds=5 --output=FOUND.json \\
        --setting=share10:corrupt=0.1,sft=middle \\
        --setting=folds4:corrupt=0.2,sft=middle:folds=4,reference_fraction=0.5

A setting is NAME:ARGUMENT[:FIELDS], ARGUMENT that of configs/research.py, FIELDS those of
`CleanedSFT`. Only the folds are trained; nothing is trained on what is kept. Prints a JSON line per
setting with what `evaluation.cleaning.summarize` says, in per cent, and writes all of them. A
setting that is finished is not made again.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import sys
from typing import Any

from dpr_jax import cleaning, cli
from dpr_jax.config import resolve
from dpr_jax.errors import UserError
from dpr_jax.evaluation.cleaning import summarize
from dpr_jax.workdir import write_json

_CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "research.py"


@dataclasses.dataclass(frozen=True)
class Setting:
  name: str
  argument: str
  fields: dict[str, Any]

  @classmethod
  def parse(cls, text: str) -> "Setting":
    """Raises UserError where it is not NAME:ARGUMENT[:FIELDS]."""
    name, _, rest = text.partition(":")
    argument, _, changes = rest.partition(":")
    pairs = [pair.partition("=") for pair in filter(None, changes.split(","))]
    if not name or not argument or not all(eq for _, eq, _ in pairs):
      raise UserError(f"--setting={text} must be NAME:ARGUMENT[:FIELD=VALUE,...]")
    return cls(name, argument, {key: _value(value) for key, _, value in pairs})

  def config(self, seed: int):
    spec = importlib.util.spec_from_file_location("research", _CONFIG)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(_CONFIG.parent))
    spec.loader.exec_module(module)
    config = module.get_config(self.argument)
    config.seed, config.compare = seed, ("cleaned_sft",)
    config.log.tensorboard = config.log.progress = False
    for key, value in self.fields.items():
      if key not in config.methods.cleaned_sft:
        raise UserError(f"--setting={self.name}: cleaned_sft has no field {key!r}")
      config.methods.cleaned_sft[key] = value
    return resolve(config)


def _value(text: str) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError:
    return text


def measure(setting: Setting, workdir: pathlib.Path, seeds: range) -> dict[str, Any]:
  """The figures of a setting, [mean, low, high] each, in per cent."""
  judged = []
  for seed in seeds:
    folder = workdir / setting.name / f"seed_{seed}"
    judged.append(cleaning.judge_demos(setting.config(seed), str(folder), "cleaned_sft")[1])
  per_cent = lambda of: [round(100 * x, 1) for x in (of["mean"], *of["ci95"])]
  return {"setting": setting.name, "argument": setting.argument, "fields": setting.fields,
          "seeds": len(seeds), "demos": len(judged[0]),
          **{name: per_cent(of) for name, of in summarize(judged).items()}}


def main(argv) -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.cleaning")
  parser.add_argument("--setting", action="append", required=True, metavar="NAME:ARGUMENT[:FIELDS]")
  parser.add_argument("--workdir", required=True, type=pathlib.Path)
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--first_seed", type=int, default=0)
  parser.add_argument("--output", type=pathlib.Path, help="JSON list to write, or to add to")
  args = parser.parse_args(argv)
  settings = [Setting.parse(text) for text in args.setting]
  for setting in settings:
    setting.config(args.first_seed)  # All of them are valid, before anything starts.
  found = json.loads(args.output.read_text()) if args.output and args.output.exists() else []
  for setting in settings:
    row = measure(setting, args.workdir, range(args.first_seed, args.first_seed + args.seeds))
    print(json.dumps(row), flush=True)
    found = [x for x in found if x["setting"] != setting.name] + [row]
    if args.output:
      write_json(args.output, found)


if __name__ == "__main__":
  cli.run_entry_point(main, sys.argv[1:])
