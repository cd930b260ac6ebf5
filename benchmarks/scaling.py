"""The SFT step over more and more devices, the global batch staying the same.

    python -m benchmarks.scaling --devices=1,2,4 --axis=fsdp --batch=8 --length=128

By default devices are forced host devices: they share the cores of one machine, so tokens/s
cannot rise. What shows is the cost of partitioning (`efficiency`: tokens/s over those of the
first entry), how memory a device falls, and which collectives the program has. --gpus takes real
ones: `speedup` over the number of devices is then what is usually called efficiency.
"""

import json
import os
import sys

from benchmarks import common, rounds
from dpr_jax import cli
from dpr_jax.errors import UserError


def flags():
  parser = common.parser(__doc__)
  parser.add_argument("--devices", default="1,2,4", help="list; how many")
  parser.add_argument("--axis", choices=("data", "fsdp", "tensor"), default="fsdp",
                      help="of the mesh, to which all devices go")
  parser.add_argument("--gpus", action="store_true", help="real GPUs instead of host devices")
  parser.add_argument("--batch", type=common.positive, default=8, help="rows, over all devices")
  parser.add_argument("--length", type=common.positive, default=128, help="tokens a row")
  return parser


def environment(count: int, gpus: bool) -> dict[str, str]:
  if gpus:
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count)))}
  forced = f"--xla_force_host_platform_device_count={count}"
  flags_ = f"{os.environ.get('XLA_FLAGS', '')} {forced}".strip()
  return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags_}


def main(argv):
  args = common.parse(flags(), argv)
  numbers = [int(n) for n in args.devices.split(",") if n.isdecimal() and int(n)]
  if len(numbers) != len(args.devices.split(",")):
    raise UserError(f"--devices={args.devices} must be whole numbers with commas, for example "
                    "1,2,4")
  if args.axis != "tensor" and any(args.batch % n for n in numbers):
    raise UserError(f"--batch={args.batch} must be a multiple of each of --devices={args.devices}")
  load = os.getloadavg()[0]
  passed = ("model", "config", "vocab_size", "dtype", "remat", "logits_budget", "lora_rank",
            "seed", "batch", "length")
  runs, peak_rates = [], None
  for count in numbers:
    mesh = ",".join(str(count if axis == args.axis else 1) for axis in ("data", "fsdp", "tensor"))
    argv_ = [*(f"--{n}={getattr(args, n)}" for n in passed), f"--mesh={mesh}", "--programs"]
    sides = rounds.alternate(
        {
            "peak_rates": lambda: rounds.open_peak_rates(args),
            "ours": lambda: rounds.open_side(
                "benchmarks.sft_step", argv_, False, environment(count, args.gpus)  # noqa: B023
            ),
        },
        args.repeats, args.sequential,
    )
    ours, peak_rates = sides["ours"], rounds.peak_rates_lib.best(sides["peak_rates"].rounds)
    program = ours.facts["programs"]["step"]
    seconds = ours.median("main")
    # Host devices share the measured peak rates; each GPU has it to itself.
    peak_flops = peak_rates["flops_per_s"] * (count if args.gpus else 1)
    runs.append({
        "devices": count, "seconds": seconds, "tokens_per_s": ours.setup["tokens"] / seconds,
        "mfu": ours.setup["flops"] / seconds / peak_flops,
        "compile_seconds": ours.setup["compile_seconds"]["main"],
        "peak_bytes": ours.facts["peak_bytes"],
        "program_bytes_per_device": program["total"],
        "argument_bytes_per_device": program["arguments"],
        "collectives": program["collectives"],
    })
  for run in runs:
    run["speedup"] = run["tokens_per_s"] / runs[0]["tokens_per_s"]
    run["efficiency"] = run["speedup"] / (run["devices"] / numbers[0] if args.gpus else 1)
  record = {
      "benchmark": "scaling", "model": ours.setup["model"], "shape": ours.setup["shape"],
      "axis": args.axis, "forced_host_devices": not args.gpus, "dtype": ours.setup["dtype"],
      "repeats": args.repeats, "peak_rates": peak_rates, "runs": runs,
      "peak_of": "process of all devices" if not args.gpus else "one device",
      "load_average": load, "versions": rounds.versions(),
  }
  print(json.dumps(record), flush=True)
  return record


if __name__ == "__main__":
  cli.run_entry_point(main, sys.argv[1:])
