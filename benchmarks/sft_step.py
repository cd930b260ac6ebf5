"""One step of supervised fine-tuning: forward, backward, AdamW with clipping.

    python -m benchmarks.sft_step --batch=4 --length=256 [--peer=torch,trl,tunix]

Every token of a row is trained; nothing is padded. The peers do the same step on random
weights of the same shape: a plain torch loop, TRL's SFTTrainer, Tunix's PeftTrainer.
"""

import sys

import numpy as np

from benchmarks import common, counts, rounds
from dpr_jax import cli, sharding
from dpr_jax.config import OptimizerConfig
from dpr_jax.data.batches import SFTBatch
from dpr_jax.keys import make_key
from dpr_jax.losses import make_sft_loss
from dpr_jax.models.logprobs import chunk_columns
from dpr_jax.models.lora import split_trainable
from dpr_jax.training import make_train_step
from dpr_jax.training.optimizer import make_optimizer


class Workload(common.Workload):
  """Variant `main`: one step; the state of the last one is donated to it."""

  def build(self):
    args = self.args
    self.model, variables = common.load_model(args, self.mesh, training=True)
    cfg = self.model.cfg
    common.check_length(cfg, args.length)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5), 1000)
    self.step = make_train_step(
        make_sft_loss(self.model), optimizer, accumulation=args.accumulation
    )
    trainable, frozen = split_trainable(variables)
    del variables
    self.state = self.step.init(trainable, make_key(args.seed), frozen)
    shape = (args.batch, args.length)
    tokens = np.random.default_rng(args.seed).integers(0, cfg.vocab_size, shape, dtype=np.int32)
    self.batch = sharding.place(
        SFTBatch(tokens, np.ones(shape, np.int32), np.ones(shape, np.float32)), self.mesh
    )
    self.variants = {"main": self.once}
    return {
        "model": common.model_facts(args, cfg),
        "shape": {"batch": args.batch, "length": args.length, "accumulation": args.accumulation,
                  "chunk_columns": chunk_columns(cfg, args.batch // args.accumulation),
                  "remat": args.remat},
        "dtype": cfg.dtype,
        "tokens": args.batch * args.length,
        # The first token of a row has no past, and the last predicts nothing.
        "flops": counts.train_flops(cfg, args.batch, args.length, args.length - 1),
        "logits_bytes": 4 * args.batch * args.length * cfg.vocab_size,
    }

  def once(self):
    self.state, metrics = self.step(self.state, self.batch)
    return self.state, metrics

  def compiled(self):
    return {"step": self.step.lower(self.state, self.batch).compile()}


def flags():
  parser = common.parser(__doc__, peers=("torch", "trl", "tunix"))
  parser.add_argument("--batch", type=common.positive, default=4, help="rows")
  parser.add_argument("--length", type=common.positive, default=256, help="tokens a row")
  parser.add_argument("--accumulation", type=common.positive, default=1, help="micro-batches")
  return parser


def main(argv):
  args = common.parse(flags(), argv)
  task = {"name": "sft", "batch": args.batch, "length": args.length}
  return rounds.run("benchmarks.sft_step", argv, args, Workload, rounds.arithmetic, task)


if __name__ == "__main__":
  cli.run_entry_point(main, sys.argv[1:])
