"""Sampling: tokens/s of a batch, and what refilled slots and a shared prefill give.

    python -m benchmarks.rollout --batch=8 --prompt=64 --new=128 [--peer=torch,tunix]
    python -m benchmarks.rollout --skew=32 --slots=8 --skew_rows=32 --samples=4

Without --skew and --samples, nothing ends a response: every row gets --new tokens, at
temperature 1 from the whole vocabulary, and the peers do the same.

--skew=MEAN ends a response at any token of a fixed random part 1 / MEAN of the vocabulary, which
on random weights makes lengths geometric with about that mean: many short ones, a few of full
length. --skew_rows rows are then decoded in three ways: `plain`, batches of --slots rows one
after another, each as long as its longest response; `refilled`, --slots slots that take the
next row when a response ends; `wide`, all rows at once, with the memory that takes.

--samples=n answers --batch / n prompts n times each, with every prompt prefilled once
(`shared`) or once a row (`own`).
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, counts, rounds
from dpr_jax import cli, sharding
from dpr_jax.data.batches import PromptBatch
from dpr_jax.errors import UserError
from dpr_jax.keys import make_key, row_keys
from dpr_jax.rollout.sampler import generate


def skewed_stops(vocab_size: int, mean: float, seed: int) -> tuple[int, ...]:
  """A random part 1 / mean of the vocabulary, at least one id."""
  count = max(1, round(vocab_size / mean))
  ids = np.random.default_rng(seed).choice(vocab_size, count, replace=False)
  return tuple(sorted(int(i) for i in ids))


class Workload(common.Workload):
  """`main`, `prefill`, and those of --skew and --samples."""

  def build(self):
    args = self.args
    self.model, self.variables = common.load_model(args, self.mesh, training=False)
    cfg = self.model.cfg
    common.check_length(cfg, args.prompt + args.new)
    self.key = make_key(args.seed)
    self.results = {}
    self.programs = {}
    stops = skewed_stops(cfg.vocab_size, args.skew, args.seed) if args.skew else ()
    prompts = self.prompts(args.batch)
    self.variants = {
        "main": self.sampler("main", [prompts], new=args.new),
        "prefill": self.sampler("prefill", [prompts], new=1),
    }
    if args.skew:
      rows = self.prompts(args.skew_rows)
      size = args.slots
      parts = [jax.tree.map(lambda x: x[i:i + size], rows)  # noqa: B023
               for i in range(0, args.skew_rows, size)]
      skewed = dict(new=args.new, stop_ids=stops)
      self.variants |= {
          "plain": self.sampler("plain", parts, **skewed),
          "refilled": self.sampler("refilled", [rows], slots=size, **skewed),
          "wide": self.sampler("wide", [rows], **skewed),
      }
    if args.samples > 1:
      few = jax.tree.map(lambda x: x[:: args.samples], prompts)
      own = jax.tree.map(lambda x: np.repeat(x, args.samples, axis=0), few)
      short = dict(new=args.samples_new)
      self.variants |= {
          "shared": self.sampler("shared", [few], samples_per_prompt=args.samples, **short),
          "own": self.sampler("own", [own], **short),
      }
    itemsize = np.dtype(jax.numpy.dtype(cfg.dtype)).itemsize
    return {
        "model": common.model_facts(args, cfg),
        "shape": {name: getattr(args, name) for name in (
            "batch", "prompt", "new", "skew", "slots", "skew_rows", "samples", "samples_new")},
        "dtype": cfg.dtype,
        "tokens": args.batch * args.new,
        "prefill_flops": counts.forward_flops(cfg, args.batch, args.prompt, 1),
        "decode_flops": counts.forward_flops(
            cfg, args.batch, args.new - 1, args.new - 1, first=args.prompt
        ),
        "decode_bytes": (args.new - 1) * counts.decode_bytes(
            cfg, args.batch, args.prompt, args.new - 1, itemsize
        ),
    }

  def prompts(self, rows):
    args = self.args
    shape = (rows, args.prompt)
    tokens = np.random.default_rng(args.seed + 1).integers(
        0, self.model.cfg.vocab_size, shape, dtype=np.int32
    )
    return PromptBatch(tokens, np.full((rows,), args.prompt, np.int32))

  def sampler(self, name, parts, *, new, stop_ids=(), **how):
    """A variant: one program, called for each part."""
    program = jax.jit(
        lambda variables, prompts, keys: generate(
            self.model, (variables,), prompts, keys, max_new_tokens=new, stop_ids=stop_ids, **how
        )
    )
    rows = [len(part.lengths) * how.get("samples_per_prompt", 1) for part in parts]
    keys = jnp.split(row_keys(self.key, sum(rows)), np.cumsum(rows)[:-1])
    parts = [sharding.place(part, self.mesh) for part in parts]
    self.programs[name] = (program, parts[0], keys[0])

    def call():
      # Parts of one batch: however it is split, the responses are the same.
      self.results[name] = [
          program(self.variables, part, own) for part, own in zip(parts, keys, strict=True)
      ]
      return self.results[name]

    return call

  def compiled(self):
    return {name: program.lower(self.variables, part, keys).compile()
            for name, (program, part, keys) in self.programs.items()}

  def finish(self):
    facts = super().finish()
    facts["lengths"] = {
        name: np.concatenate([np.asarray(g.lengths) for g in out]).tolist()
        for name, out in self.results.items()
    }
    facts["steps"] = {
        name: int(sum(int(g.steps) for g in out)) for name, out in self.results.items()
    }
    return facts


def flags():
  parser = common.parser(__doc__, peers=("torch", "tunix"))
  parser.add_argument("--batch", type=common.positive, default=8, help="rows")
  parser.add_argument("--prompt", type=common.positive, default=64, help="tokens")
  parser.add_argument("--new", type=common.positive, default=128, help="tokens, at most")
  parser.add_argument("--skew", type=float, default=0.0, help="mean length; 0: without")
  parser.add_argument("--slots", type=common.positive, default=8, help="rows decoded at a time")
  parser.add_argument("--skew_rows", type=common.positive, default=32)
  parser.add_argument("--samples", type=common.positive, default=1,
                      help="per prompt; 1: no shared prefill")
  parser.add_argument("--samples_new", type=common.positive, default=16, help="tokens of these")
  return parser


def check(args):
  if args.new < 2:
    raise UserError(f"--new={args.new} must be at least 2: the first token comes of the prefill")
  if args.skew and args.skew_rows % args.slots:
    raise UserError(f"--skew_rows={args.skew_rows} is not a multiple of --slots={args.slots}")
  if args.skew < 0 or 0 < args.skew < 1:
    raise UserError(f"--skew={args.skew} is a mean length: at least 1, or 0 for none")
  if args.batch % args.samples:
    raise UserError(f"--batch={args.batch} is not a multiple of --samples={args.samples}")


def plain_steps(lengths, slots):
  """Decoding steps of plain batches of these rows: the longest of each; the prefill gives one."""
  return sum(max(lengths[i:i + slots]) - 1 for i in range(0, len(lengths), slots))


def report(ours, peak_rates):
  setup, facts, devices = ours.setup, ours.facts, ours.setup["devices"]["count"]
  flops_s, bytes_s = peak_rates["flops_per_s"] * devices, peak_rates["bytes_per_s"] * devices
  seconds, prefill = ours.median("main"), ours.median("prefill")
  decode = max(seconds - prefill, 1e-9)
  bound = setup["prefill_flops"] / flops_s + max(
      setup["decode_flops"] / flops_s, setup["decode_bytes"] / bytes_s
  )
  out = {
      "prefill_seconds": prefill,
      "decode_tokens_per_s": (setup["tokens"] - setup["shape"]["batch"]) / decode,
      "bandwidth_share": setup["decode_bytes"] / decode / bytes_s,
      "mfu": (setup["prefill_flops"] + setup["decode_flops"]) / seconds / flops_s,
      "roofline_seconds": bound,
      "roofline_share": bound / seconds,
  }
  lengths, steps, slots = facts["lengths"], facts["steps"], setup["shape"]["slots"]
  if "refilled" in lengths:
    skewed = {}
    for name in ("plain", "refilled", "wide"):
      total = sum(lengths[name])
      skewed[name] = {
          "seconds": ours.median(name), "tokens": total, "steps": steps[name],
          "longest": max(lengths[name]), "tokens_per_s": total / ours.median(name),
      }
    mine = lengths["refilled"]
    out["skewed"] = {
        **skewed,
        # What plain batches would need for the very responses that the slots gave.
        "predicted_step_ratio": plain_steps(mine, slots) / max(
            (sum(mine) - len(mine)) / slots, 1),
        "step_ratio": plain_steps(mine, slots) / max(steps["refilled"], 1),
        "gain": skewed["refilled"]["tokens_per_s"] / skewed["plain"]["tokens_per_s"],
    }
  if "shared" in lengths:
    n = setup["shape"]["samples"]
    own, shared = ours.median("own"), ours.median("shared")
    out["shared_prefill"] = {
        "samples": n, "own_seconds": own, "shared_seconds": shared, "gain": own / shared,
        # (n - 1) / n of the prefill is saved.
        "predicted_gain": own / max(own - prefill * (n - 1) / n, 1e-9),
    }
  return out


def main(argv):
  args = common.parse(flags(), argv)
  check(args)
  task = {"name": "rollout", "batch": args.batch, "prompt": args.prompt, "new": args.new}
  return rounds.run("benchmarks.rollout", argv, args, Workload, report, task)


if __name__ == "__main__":
  cli.run_entry_point(main, sys.argv[1:])
