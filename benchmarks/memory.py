"""Peak memory against vocabulary, length, batch, logits, adapters and remat; a process a case.

    python -m benchmarks.memory --what=sft,score,dpr --vocab_sizes=49152,262144 \
        --lengths=256,512 --batches=4,8 --logits_budgets=0.25,1000 --lora_ranks=0,16 \
        --remats=none,dots

Of each list the first value is the base, and the others are tried one at a time. A dpr step
takes half of the length as prompt, half as response. A case has the peak of its process (or
device), what the compiler says of its programs, and the largest array with a dimension of the
vocabulary in their text, `largest_logits_bytes`; `btv_live` says whether one of any dtype has
as many elements as [batch, scored columns, vocabulary]. It does where one chunk holds all columns,
as with --logits_budgets=1000: that case shows what chunks save.
"""

import argparse
import json
import os
import sys

from benchmarks import common, rounds
from dpr_jax import cli
from dpr_jax.errors import UserError

REMATS = ("none", "dots", "full")
AXES = ("vocab_sizes", "lengths", "batches", "logits_budgets", "lora_ranks", "remats")
MODULES = {"sft": "sft_step", "score": "score", "dpr": "dpr_step"}


def flags():
  parser = common.parser(__doc__)
  parser.add_argument("--what", default="sft,score,dpr", help="of sft, score, dpr")
  for name, default, text in (
      ("vocab_sizes", "0", "0: that of the config"), ("lengths", "256", "tokens a row"),
      ("batches", "4", "rows"), ("logits_budgets", "0.25", "GiB per device"),
      ("lora_ranks", "0", "0: all parameters are trained"),
      ("remats", "none", "none, dots, full: what the backward pass recomputes"),
  ):
    parser.add_argument(f"--{name}", default=default, help=f"list; {text}")
  return parser


def cases(args: argparse.Namespace) -> list[dict]:
  """One case a value: the base of all lists, then each other value of each list.

  Raises:
    UserError: a list that is none, a task that there is not.
  """
  lists = {"remats": args.remats.split(",")}
  for name in lists["remats"]:
    if name not in REMATS:
      raise UserError(f"--remats={args.remats}: {name!r} is not one of {', '.join(REMATS)}")
  for name in AXES[:-1]:
    try:
      number = float if name == "logits_budgets" else int
      lists[name] = [number(x) for x in getattr(args, name).split(",")]
    except ValueError:
      raise UserError(f"--{name}={getattr(args, name)} must be whole numbers with commas, "
                      "for example 4,8") from None
  base = {name: values[0] for name, values in lists.items()}
  out = []
  for what in args.what.split(","):
    if what not in MODULES:
      raise UserError(f"--what={what} is not one of {', '.join(MODULES)}")
    tried = [base] + [{**base, n: v} for n, values in lists.items() for v in values[1:]]
    # Scoring trains nothing: adapters and remat do not matter.
    alike = lambda case: all(case[n] == base[n] for n in ("lora_ranks", "remats"))
    out += [{"what": what, **case} for case in tried if what != "score" or alike(case)]
  return out


def command(args: argparse.Namespace, case: dict) -> list[str]:
  """Flags of the script that a case runs."""
  passed = ("model", "config", "dtype", "mesh", "seed")
  out = [f"--{name}={getattr(args, name)}" for name in passed]
  out += [f"--vocab_size={case['vocab_sizes']}", f"--logits_budget={case['logits_budgets']}",
          f"--lora_rank={case['lora_ranks']}", f"--remat={case['remats']}",
          f"--batch={case['batches']}", "--programs"]
  length = case["lengths"]
  if case["what"] != "dpr":
    return [*out, f"--length={length}"]
  new = max(length // 2, 1)
  return [*out, f"--prompt={length - new}", f"--new={new}", "--samples=1", "--slots=0",
          "--skew=0", "--variants=main"]


def measure(args: argparse.Namespace, case: dict) -> dict:
  module = f"benchmarks.{MODULES[case['what']]}"
  opener = lambda: rounds.open_side(module, command(args, case), args.in_process)
  side = rounds.alternate({"ours": opener}, args.repeats, args.sequential)["ours"]
  logits = side.setup["logits_bytes"]
  programs = side.facts["programs"]
  largest = lambda unit: max(p[f"largest_logits_{unit}"] for p in programs.values())
  params = side.setup["model"]["params"]
  return {
      "what": case["what"], "vocab_size": side.setup["model"]["vocab_size"],
      "length": case["lengths"], "batch": case["batches"],
      "chunk_columns": side.setup["shape"]["chunk_columns"], "lora_rank": case["lora_ranks"],
      "remat": case["remats"],
      "params": params,
      "seconds": side.median("main"),
      "tokens_per_s": side.setup["tokens"] / side.median("main"),
      "compile_seconds": side.setup["compile_seconds"]["main"],
      "peak_bytes": side.facts["peak_bytes"],
      "program_bytes": {name: p["total"] for name, p in programs.items()},
      "argument_bytes": max(p["arguments"] for p in programs.values()),
      "temporary_bytes": max(p["temporaries"] for p in programs.values()),
      "logits_bytes": logits,
      "largest_logits_bytes": largest("bytes"),
      # The first column of a row is not scored.
      "btv_live": largest("elements") >= (
          logits // 4 - case["batches"] * side.setup["model"]["vocab_size"]
      ),
      "devices": side.setup["devices"], "dtype": side.setup["dtype"],
      "model": side.setup["model"]["source"],
  }


def main(argv):
  args = common.parse(flags(), argv)
  load = os.getloadavg()[0]
  done = [measure(args, case) for case in cases(args)]
  record = {
      "benchmark": "memory", "model": done[0]["model"], "devices": done[0]["devices"],
      "dtype": done[0]["dtype"], "repeats": args.repeats,
      "peak_of": "all sides in one process" if args.in_process else "own process or device",
      "cases": [{k: v for k, v in case.items() if k not in ("model", "devices", "dtype")}
                for case in done],
      "load_average": load, "versions": rounds.versions(),
  }
  print(json.dumps(record), flush=True)
  return record


if __name__ == "__main__":
  cli.run_entry_point(main, sys.argv[1:])
