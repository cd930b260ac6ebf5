"""One step of Dense-Path REINFORCE: sample, score under sft and ref, compute advantages, update.

    python -m benchmarks.dpr_step --batch=16 --prompt=64 --new=64 --samples=4 --slots=8 --skew=16

Times the whole step (`main`) and its parts: `decode` (sampling, prefill included), `score`
(teacher-forced log-probs under both frozen models), `backward` (the train step). Then whole
steps with one thing left out each:

    no_refill       all rows decoded at once, until the longest response ends
    own_prefill     every row prefills its prompt
    rescored        the policy's log-probs by a third teacher-forced pass
    no_chunks       the logits of all response columns at once

--variants=gradients times instead the whole step with the sampled gradient, of per-token returns
(`main`), and the one with the exact gradient over the whole vocabulary (`exact`), and prints their
ratio.

--skew=MEAN makes lengths geometric, as in rollout.py. --lora_rank=R trains adapters: policy, sft
and ref are then three over one base. --variants=main leaves the rest out, so that the memory is
that of the step.
"""

import dataclasses
import functools
import sys

import jax
import numpy as np

from benchmarks import common, counts, rounds
from benchmarks.rollout import skewed_stops
from dpr_jax import cli, sharding
from dpr_jax.config import OptimizerConfig
from dpr_jax.data.batches import PromptBatch
from dpr_jax.errors import UserError
from dpr_jax.keys import make_key
from dpr_jax.losses import (
    full_vocabulary,
    full_vocabulary_batch,
    make_full_vocabulary_loss,
    make_reinforce_loss,
    reinforce_batch,
)
from dpr_jax.models import Transformer
from dpr_jax.models.logprobs import chunk_columns
from dpr_jax.models.lora import split_trainable
from dpr_jax.models.variables import cast
from dpr_jax.references.base import Reference
from dpr_jax.rewards.control import KLControl
from dpr_jax.rollout import make_rollout_step
from dpr_jax.rollout.sampler import generate
from dpr_jax.rollout.scoring import score_response
from dpr_jax.training import make_train_step
from dpr_jax.training.dpr_step import DPRStep
from dpr_jax.training.optimizer import make_optimizer

advantages = functools.partial(
    reinforce_batch, returns="per_token", variance_baseline="position_mean"
)


@dataclasses.dataclass(frozen=True)
class Tricks:
  """What a whole step may do without."""

  slots: int
  samples: int
  rescore: bool = False
  chunks: bool = True  # of logits, as --logits_budget has it.
  exact: bool = False  # the gradient over the whole vocabulary.


def moved(variables, factor):
  """Variables near others: those of a frozen model that differs a little."""
  shardings = jax.tree.map(lambda x: x.sharding, variables)
  scale = jax.jit(lambda tree: jax.tree.map(lambda x: (x * factor).astype(x.dtype), tree),
                  out_shardings=shardings)
  return scale(variables)


class Workload(common.Workload):
  """`main`, its parts, and the whole steps that lack something."""

  def build(self):
    args = self.args
    self.model, variables = common.load_model(args, self.mesh, training=True)
    cfg = self.model.cfg
    common.check_length(cfg, args.prompt + args.new)
    self.stops = (skewed_stops(cfg.vocab_size, args.skew, args.seed) if args.skew
                  else (cfg.vocab_size,))  # An id that no token has: nothing ends a response.
    self.optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6), 1000)
    trainable, frozen = split_trainable(variables)
    del variables
    self.sft = {**frozen, **cast(trainable, cfg.dtype)}
    self.ref = {**frozen, **moved(cast(trainable, cfg.dtype), 1.01)}
    # Without a control to carry: the state that the train step and all whole steps take.
    step = make_train_step(make_reinforce_loss(self.model), self.optimizer)
    self.state = step.init(trainable, make_key(args.seed), frozen)
    del trainable
    shape = (args.batch // args.samples, args.prompt)
    tokens = np.random.default_rng(args.seed + 1).integers(0, cfg.vocab_size, shape, dtype=np.int32)
    few = PromptBatch(tokens, np.full(shape[:1], args.prompt, np.int32))
    self.few = sharding.place(few, self.mesh)
    self.own = sharding.place(
        jax.tree.map(lambda x: np.repeat(x, args.samples, axis=0), few), self.mesh
    )
    self.key = make_key(args.seed + 2)
    self.first_key = jax.random.fold_in(self.key, 0)  # That of step 0.
    tricks = Tricks(args.slots, args.samples)
    self.main_parts = None
    self.variants = {"main": self.step("main", tricks)}
    if args.variants == "all":
      self.variants |= {"decode": self.decode(), "score": self.score(), "backward": self.backward}
      for name, changes in {
          "no_refill": {"slots": 0},
          "own_prefill": {"samples": 1},
          "rescored": {"rescore": True},
          "no_chunks": {"chunks": False},
      }.items():
        changed = dataclasses.replace(tricks, **changes)
        if changed != tricks:
          self.variants[name] = self.step(name, changed)
    if args.variants == "gradients":
      self.variants["exact"] = self.step("exact", dataclasses.replace(tricks, exact=True))
    columns = args.prompt + args.new
    forward = counts.forward_flops(cfg, args.batch, columns, args.new)
    itemsize = np.dtype(jax.numpy.dtype(cfg.dtype)).itemsize
    slots = args.slots or args.batch
    return {
        "model": common.model_facts(args, cfg),
        "shape": {name: getattr(args, name) for name in (
            "batch", "prompt", "new", "samples", "slots", "skew")}
        | {"chunk_columns": chunk_columns(cfg, args.batch)},
        "dtype": cfg.dtype,
        "tokens": args.batch * args.new,  # At most; the report has those that were sampled.
        "prefill_flops": counts.forward_flops(cfg, args.batch // args.samples, args.prompt, 1),
        "score_flops": 2 * forward,
        "train_flops": counts.train_flops(cfg, args.batch, columns, args.new),
        "step_flops": counts.forward_flops(cfg, slots, args.new, args.new, first=args.prompt)
        / args.new,
        "step_bytes": counts.decode_bytes(cfg, slots, args.prompt, args.new, itemsize),
        "logits_bytes": 4 * args.batch * args.new * cfg.vocab_size,
    }

  def step(self, name, tricks):
    """A variant: a whole step; they take turns with one state."""
    model = self.model
    if not tricks.chunks:
      model = Transformer(dataclasses.replace(model.cfg, logits_budget=1e6))
    rollout_step = make_rollout_step(
        model, max_new_tokens=self.args.new, stop_ids=self.stops,
        samples_per_prompt=tricks.samples, slots=tricks.slots, rescore=tricks.rescore,
        extras=("states",) if tricks.exact else (),
    )
    loss = make_full_vocabulary_loss(model) if tricks.exact else make_reinforce_loss(model)
    train_step = make_train_step(loss, self.optimizer)
    prompts = self.few if tricks.samples > 1 else self.own
    if name == "main":
      self.main_parts = rollout_step, train_step, prompts
    dpr_step = DPRStep(
        rollout_step, train_step, full_vocabulary_batch if tricks.exact else advantages,
        KLControl(beta=1.0), self.sft, self.ref, self.key,
        attach=full_vocabulary.attach if tricks.exact else None,
    )

    def call():
      # The sampling key is made of the step: all variants and rounds sample the same lengths.
      zero = jax.device_put(np.int32(0), self.state.step.sharding)
      self.state, metrics = dpr_step(self.state.replace(step=zero), prompts)
      return self.state, metrics

    return call

  def rollout(self):
    """One rollout of the kind of `main`, kept for the parts."""
    if not hasattr(self, "_rollout"):
      rollout_step, _, prompts = self.main_parts
      self._rollout = rollout_step(
          self.state.variables, self.sft, self.ref, prompts, self.first_key
      )
    return self._rollout

  def decode(self):
    args = self.args
    prompts = self.main_parts[2]
    program = jax.jit(
        lambda variables, prompts, key: generate(
            self.model, (variables,), prompts, key, max_new_tokens=args.new, stop_ids=self.stops,
            samples_per_prompt=args.samples, slots=args.slots, with_entropy=True,
        )
    )
    return lambda: program(self.state.variables, prompts, self.first_key)

  def score(self):
    program = jax.jit(
        lambda sft, ref, tokens, segment_ids: score_response(
            self.model, sft=sft, ref=Reference.of(ref), policy=None, tokens_BxS=tokens,
            segment_ids_BxS=segment_ids, start=self.args.prompt,
        )[0]
    )
    return lambda: program(
        self.sft, self.ref, self.rollout().tokens, self.rollout().segment_ids
    )

  def backward(self):
    if not hasattr(self, "_batch"):
      self._batch, _ = jax.jit(lambda r: advantages(r, beta=1.0))(self.rollout())
    self.state, metrics = self.main_parts[1](self.state, self._batch)
    return self.state, metrics

  def compiled(self):
    rollout_step, train_step, prompts = self.main_parts
    batch = jax.eval_shape(lambda r: advantages(r, beta=1.0)[0], self.rollout())
    place = lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding.batch_sharding(self.mesh))
    return {
        "rollout": rollout_step.lower(
            self.state.variables, self.sft, self.ref, prompts, self.key).compile(),
        "train": train_step.lower(self.state, jax.tree.map(place, batch)).compile(),
    }

  def finish(self):
    facts = super().finish()
    with jax.set_mesh(self.mesh):
      rollout = self.rollout()
    facts["lengths"] = np.asarray(rollout.lengths).tolist()
    facts["decode_steps"] = int(rollout.decode_steps)
    return facts


def flags():
  parser = common.parser(__doc__)
  parser.add_argument("--batch", type=common.positive, default=16, help="rollouts")
  parser.add_argument("--prompt", type=common.positive, default=64, help="tokens")
  parser.add_argument("--new", type=common.positive, default=64, help="tokens, at most")
  parser.add_argument("--samples", type=common.positive, default=4, help="rollouts a prompt")
  parser.add_argument("--slots", type=int, default=8, help="decoded at a time; 0: all")
  parser.add_argument("--skew", type=float, default=16.0, help="mean length; 0: all of --new")
  parser.add_argument("--variants", choices=("all", "main", "gradients"), default="all")
  return parser


def check(args):
  if args.batch % args.samples:
    raise UserError(f"--batch={args.batch} is not a multiple of --samples={args.samples}")
  if not 0 <= args.slots <= args.batch:
    raise UserError(f"--slots={args.slots} must lie between 0 and --batch={args.batch}")
  if args.skew < 0 or 0 < args.skew < 1:
    raise UserError(f"--skew={args.skew} is a mean length: at least 1, or 0 for none")


def report(ours, peak_rates):
  setup, facts, devices = ours.setup, ours.facts, ours.setup["devices"]["count"]
  flops_s, bytes_s = peak_rates["flops_per_s"] * devices, peak_rates["bytes_per_s"] * devices
  seconds = ours.median("main")
  steps, tokens = facts["decode_steps"], sum(facts["lengths"])
  dense = setup["prefill_flops"] + setup["score_flops"] + setup["train_flops"]
  decode_step = max(setup["step_flops"] / flops_s, setup["step_bytes"] / bytes_s)
  bound = dense / flops_s + steps * decode_step
  out = {
      "tokens_per_s": tokens / seconds, "sampled_tokens": tokens, "decode_steps": steps,
      "longest": max(facts["lengths"]),
      "mfu": (dense + steps * setup["step_flops"]) / seconds / flops_s,
      "roofline_seconds": bound, "roofline_share": bound / seconds,
  }
  if "exact" in ours.rounds[0]:
    exact = ours.median("exact")
    out["gradients"] = {"sampled": seconds, "exact": exact, "ratio": exact / seconds}
  if "decode" in ours.rounds[0]:
    parts = {name: ours.median(name) for name in ("decode", "score", "backward")}
    out["parts_seconds"] = parts
    out["shares"] = {name: x / sum(parts.values()) for name, x in parts.items()}
    without = [n for n in ours.rounds[0] if n not in ("main", *parts)]
    out["without"] = {
        name: {"seconds": ours.median(name), "gain": ours.median(name) / seconds}
        for name in without
    }
    # What formulas say of the same steps; docs/performance.md explains them.
    samples = setup["shape"]["samples"]
    prefill = setup["prefill_flops"] / flops_s
    decode = max(parts["decode"] - prefill, 0.0)
    change = {
        "no_refill": decode * ((max(facts["lengths"]) - 1) / max(steps, 1) - 1),
        "own_prefill": (samples - 1) * prefill,
        "rescored": parts["score"] / 2,
        "no_chunks": 0.0,
    }
    out["predicted_gain"] = {n: (seconds + change[n]) / seconds for n in without}
  if "programs" in facts:
    out["programs"] = facts["programs"]
  return out


def main(argv):
  args = common.parse(flags(), argv)
  check(args)
  return rounds.run("benchmarks.dpr_step", argv, args, Workload, report)


if __name__ == "__main__":
  cli.run_entry_point(main, sys.argv[1:])
