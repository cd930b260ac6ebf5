"""What fingerprints, locks and checks cost, as a share of the time of a training step.

    python -m benchmarks.overhead --batch=4 --length=256 [--every=200]

Times, in one process and in turn with SFT steps, what a stage does beside its steps so that nothing
is lost in silence: of every step (its line of metrics, the question whether to stop), of every
checkpoint (fingerprints of all arrays and of the files), and once per run (fingerprints of the base
weights, checking the arrays of a restored checkpoint, taking the lock).
"""

import functools
import json
import pathlib
import statistics
import sys
import tempfile

import jax
from etils import epath

from benchmarks import common, sft_step
from dpr_jax import cli, fingerprints, inputs, lock, signals
from dpr_jax.training.checkpoints import Checkpoints
from dpr_jax.training.integrity import fingerprint, record_files
from dpr_jax.training.metrics import MetricsWriter
from dpr_jax.weights import save_pretrained


def flags():
  parser = sft_step.flags()
  parser.add_argument("--every", type=common.positive, default=200,
                      help="steps between checkpoints")
  return parser


def measure(args, folder: pathlib.Path) -> dict[str, dict[str, float]]:
  """Medians in seconds: of a step, and of each check by how often it is made."""
  with jax.set_mesh(common.make_mesh(args)):
    work = sft_step.Workload(args)
    work.setup()
    save_pretrained(folder / "base", work.model.cfg, work.state.trainable["params"])
    with Checkpoints(folder / "checkpoints") as checkpoints:
      checkpoints.save(work.state, 1, {"next_step": 1})
      checkpoints.wait()
    writer = MetricsWriter(folder, stage="sft", steps=10**6, progress=False)
    times: dict[str, list[float]] = {}

    def hold():
      with lock.locked(folder / "locked", "--workdir"):
        pass

    def line(step, metrics):
      writer.write(step, metrics)
      writer.flush()
      signals.reached()

    saved_folder = epath.Path(folder / "checkpoints/1")
    state_of = lambda: (work.state.trainable, work.state.opt_state, work.state.rng)
    fingerprint(state_of())  # Compiled here.
    for step in range(1, args.repeats + 1):
      times.setdefault("step", []).append(common.timed(work.once))
      _, metrics = jax.block_until_ready(work.once())
      fingerprints._of_version.cache_clear()
      saved = state_of()
      for name, check, given in (
          ("each_step/line_of_metrics_and_signals", line, (step, metrics)),
          ("each_checkpoint/fingerprints_of_arrays", fingerprint, (saved,)),
          ("each_checkpoint/fingerprints_of_files", record_files, (saved_folder,)),
          ("once/fingerprints_of_base", inputs.pretrained_files, (folder / "base",)),
          ("once/arrays_of_a_restored_checkpoint", fingerprint, (saved,)),
          ("once/lock", hold, ()),
      ):
        times.setdefault(name, []).append(common.timed(functools.partial(check, *given)))
    return {name: statistics.median(t) for name, t in times.items()}


def main(argv):
  args = common.parse(flags(), argv)
  with tempfile.TemporaryDirectory(prefix="overhead") as folder:
    found = measure(args, pathlib.Path(folder))
  step = found.pop("step")
  total = {kind: sum(t for name, t in found.items() if name.startswith(kind))
           for kind in ("each_step", "each_checkpoint", "once")}
  print(json.dumps({
      "benchmark": "overhead", "config": args.model or args.config, "batch": args.batch,
      "length": args.length, "device": jax.devices()[0].device_kind, "every": args.every,
      "step_seconds": step, "seconds": found,
      "share_of_step": (total["each_step"] + total["each_checkpoint"] / args.every) / step,
      "once_in_steps": total["once"] / step,
  }))


if __name__ == "__main__":
  cli.run_entry_point(main, sys.argv[1:])
