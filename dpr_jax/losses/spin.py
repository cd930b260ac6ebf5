"""SPIN: self-play fine-tuning, a logistic loss between demonstrations and own samples.

    loss = log(1 + exp(-beta [(log pi(y) - log pi_k(y)) - (log pi(y') - log pi_k(y'))]))

y is the demonstration, y' ~ pi_k the sample of the previous iterate, log-probs summed over
response tokens. Source: arXiv 2401.01335, section 4, with the logistic loss. After a round of
training the iterate becomes pi_k and samples anew; where pi_k is the distribution of the
demonstrations, the gradient vanishes on average.
"""

import jax
import jax.numpy as jnp

from dpr_jax.losses.pairs import PairBatch, log_ratios, pair_metrics


def make_spin_loss(model, *, beta: float = 0.1):
  """Returns loss_fn(variables, batch: PairBatch, rng) -> (loss_sum, weight, metrics).

  Args:
    beta: lambda in the paper, per nat of the summed log-ratio.

  loss_sum: nats summed over pairs; weight: their number. Metrics: see `pairs.pair_metrics`.

  Raises:
    ValueError: beta is not above 0.
  """
  if not beta > 0:
    raise ValueError(f"beta={beta} must be above 0")

  def loss_fn(variables, batch: PairBatch, rng):
    demo_B, generated_B, on_B = log_ratios(model, variables, batch, rng)
    # softplus: the loss is linear in a margin of thousands of nats, where exp would overflow.
    losses_B = jax.nn.softplus(-beta * (demo_B - generated_B))
    metrics = pair_metrics(demo_B, generated_B, on_B)
    return jnp.sum(on_B * losses_B), jnp.sum(on_B), metrics

  return loss_fn
