"""How fast the sampled and the exact gradient approach the optimum of per-token DPR, on a table.

    python -m benchmarks.closed_form --rows=64 --steps=400 --learning_rate=0.05

Prints one JSON line. A policy over the token MDP of a small language (`dpr_jax/theory`) starts at a
random sft; ref is a flatter sft with noise. At each step the package's sampler draws --rows
responses, and its train step updates the policy: with REINFORCE on the return of each token
(`sampled`), or over the whole vocabulary in the states of those responses (`exact`, `forward` for
KL(target || policy)). All of them start with the same responses and use the same sampling keys.
`total_variation` has, by gradient, the distance of the distribution over responses to that of the
closed form, softmax((1 + 1 / beta) Q_sft - (1 / beta) Q_ref), after as many steps as `checkpoints`
says: the mean over prompts and --instances.
"""

import argparse
import functools
import json
import sys
import time

import jax
import numpy as np
import optax

from benchmarks.common import positive
from dpr_jax import cli
from dpr_jax.data.batches import PromptBatch
from dpr_jax.keys import make_key
from dpr_jax.losses import (
    full_vocabulary,
    full_vocabulary_batch,
    make_full_vocabulary_loss,
    make_reinforce_loss,
    reinforce_batch,
)
from dpr_jax.rewards.control import KLControl
from dpr_jax.rollout import make_rollout_step
from dpr_jax.theory import TokenMDP
from dpr_jax.theory.exact import TabularModel
from dpr_jax.theory.optimum import contrastive
from dpr_jax.theory.values import total_variation
from dpr_jax.training import make_train_step
from dpr_jax.training.dpr_step import DPRStep

_GRADIENTS = {"sampled": None, "exact": "reverse_kl", "forward": "forward_kl"}


def flags() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name, default, text in (
      ("rows", 64, "responses per step"), ("steps", 400, "updates"), ("every", 50, "steps"),
      ("prompts", 4, "of the language"), ("vocab_size", 6, "of the language"),
      ("max_length", 4, "longest response, tokens"), ("instances", 3, "random languages"),
  ):
    parser.add_argument(f"--{name}", type=positive, default=default, help=text)
  parser.add_argument("--beta", type=float, default=1.0, help="weight of the KL to sft")
  parser.add_argument("--learning_rate", type=float, default=0.05,
                      help="of Adam, with a cosine decay to 0; logits per step")
  parser.add_argument("--seed", type=int, default=0)
  return parser


def _step(model, sft, ref, gradient: str, args, seed: int) -> DPRStep:
  divergence = _GRADIENTS[gradient]
  optimizer = optax.adam(optax.cosine_decay_schedule(args.learning_rate, args.steps), b2=0.95)
  if divergence is None:
    loss, attach = make_reinforce_loss(model), None
    make_batch = functools.partial(
        reinforce_batch, returns="per_token", variance_baseline="position_mean"
    )
  else:
    loss, attach = make_full_vocabulary_loss(model, divergence=divergence), full_vocabulary.attach
    make_batch = full_vocabulary_batch
  rollout_step = make_rollout_step(
      model, max_new_tokens=args.max_length, stop_ids=(model.mdp.eos,),
      extras=("states",) if divergence else (),
  )
  return DPRStep(
      rollout_step, make_train_step(loss, optimizer), make_batch, KLControl(beta=args.beta), sft,
      ref, make_key(seed), attach=attach,
  )


def distances(gradient: str, args: argparse.Namespace, seed: int) -> list[float]:
  """Mean total variation over prompts after 0, `every`, 2 `every`, ... steps, of one instance."""
  rng = np.random.default_rng(seed)
  mdp = TokenMDP(args.prompts, args.vocab_size, args.max_length, eos=0)
  sft_SxA = mdp.random_logits(rng)
  ref_SxA = 0.5 * sft_SxA + mdp.random_logits(rng, 0.3)
  star_SxA = contrastive(sft_SxA, ref_SxA, args.beta)
  model = TabularModel(mdp)
  sft, ref = model.variables(sft_SxA), model.variables(ref_SxA)
  step = _step(model, sft, ref, gradient, args, seed)
  state = step.init(model.variables(sft_SxA), make_key(seed))
  rows = np.resize(np.arange(args.prompts), args.rows)
  prompts = PromptBatch(
      tokens=(mdp.vocab_size + rows[:, None]).astype(np.int32), lengths=np.ones(args.rows, np.int32)
  )
  found = []
  for done in range(args.steps + 1):
    if done % args.every == 0:
      table_SxA = np.asarray(state.trainable["params"]["table"], np.float64)
      found.append(float(total_variation(mdp, table_SxA, star_SxA).mean()))
    if done < args.steps:
      state, _ = step(state, prompts)
  return found


def run(args: argparse.Namespace) -> dict:
  seeds = [args.seed + i for i in range(args.instances)]
  curves, seconds = {}, {}
  for gradient in _GRADIENTS:
    start = time.perf_counter()
    mean = np.mean([distances(gradient, args, seed) for seed in seeds], axis=0)
    curves[gradient] = [float(f"{x:.3g}") for x in mean]
    seconds[gradient] = round(time.perf_counter() - start, 1)
  return {
      "benchmark": "closed_form", **vars(args), "versions": {"jax": jax.__version__},
      "checkpoints": list(range(0, args.steps + 1, args.every)), "total_variation": curves,
      "seconds": seconds,
  }


def main(argv):
  print(json.dumps(run(flags().parse_args(argv))))


if __name__ == "__main__":
  cli.run_entry_point(main, sys.argv[1:])
