"""GSM8K demonstrations of which some end in a wrong number, to see whether cleaning finds them.

    python -m benchmarks.altered_gsm8k --data=train.jsonl --limit=400 --share=0.1 --output=FILE
    python -m dpr_jax.filter --demos=FILE --config.eval.benchmark.kind=gsm8k ...

The solution stays as it is, and "#### N" gets another number: N plus or minus 1 to a half of it.
`answer` keeps the right one, by which the benchmark tells what is wrong.
"""

import argparse
import json
import pathlib
import random
import sys

from dpr_jax import cli
from dpr_jax.data.formats import read_demos


def altered(text: str, rng: random.Random) -> str:
  """The response with another final number of about the size."""
  head, mark, number = text.rpartition("#### ")
  value = int(number.strip().replace(",", ""))
  step = rng.randint(1, max(1, abs(value) // 2))
  return f"{head}{mark}{value + rng.choice((-step, step))}"


def main(argv) -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.altered_gsm8k")
  parser.add_argument("--data", required=True, type=pathlib.Path)
  parser.add_argument("--output", required=True, type=pathlib.Path)
  parser.add_argument("--limit", type=int, default=0)
  parser.add_argument("--share", type=float, default=0.1)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args(argv)
  demos = read_demos(args.data, "gsm8k", limit=args.limit).demos
  rng = random.Random(args.seed)
  wrong = set(rng.sample(range(len(demos)), round(args.share * len(demos))))
  lines = []
  for i, demo in enumerate(demos):
    response = altered(demo.response, rng) if i in wrong else demo.response
    lines.append({"prompt": demo.messages[0]["content"], "response": response,
                  "answer": demo.answer})
  args.output.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
  print(json.dumps({"demos": len(demos), "altered": len(wrong)}))


if __name__ == "__main__":
  cli.run_entry_point(main, sys.argv[1:])
