"""Teacher-forced log-probs of given tokens under one model, without gradients.

    python -m benchmarks.score --batch=8 --length=192 [--peer=torch,tunix]
"""

import sys

import jax
import numpy as np

from benchmarks import common, counts, rounds
from dpr_jax import cli, sharding
from dpr_jax.models.logprobs import chunk_columns, token_logprobs


class Workload(common.Workload):
  """Variant `main`: log-probs of every token of the batch."""

  def build(self):
    args = self.args
    self.model, self.variables = common.load_model(args, self.mesh, training=False)
    cfg = self.model.cfg
    common.check_length(cfg, args.length)
    shape = (args.batch, args.length)
    tokens = np.random.default_rng(args.seed).integers(0, cfg.vocab_size, shape, dtype=np.int32)
    self.tokens = sharding.place(tokens, self.mesh)
    self.score = jax.jit(
        lambda variables, tokens: token_logprobs(self.model, variables, tokens).logp
    )
    self.variants = {"main": lambda: self.score(self.variables, self.tokens)}
    return {
        "model": common.model_facts(args, cfg),
        "shape": {"batch": args.batch, "length": args.length,
                  "chunk_columns": chunk_columns(cfg, args.batch)},
        "dtype": cfg.dtype,
        "tokens": args.batch * args.length,
        "flops": counts.forward_flops(cfg, args.batch, args.length, args.length - 1),
        "logits_bytes": 4 * args.batch * args.length * cfg.vocab_size,
    }

  def compiled(self):
    return {"score": self.score.lower(self.variables, self.tokens).compile()}


def flags():
  parser = common.parser(__doc__, peers=("torch", "tunix"))
  parser.add_argument("--batch", type=common.positive, default=8, help="rows")
  parser.add_argument("--length", type=common.positive, default=192, help="tokens a row")
  return parser


def main(argv):
  args = common.parse(flags(), argv)
  task = {"name": "score", "batch": args.batch, "length": args.length}
  return rounds.run("benchmarks.score", argv, args, Workload, rounds.arithmetic, task)


if __name__ == "__main__":
  cli.run_entry_point(main, sys.argv[1:])
