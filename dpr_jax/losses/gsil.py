"""GSIL: self-imitation as density-ratio estimation between demonstrations and own samples.

    u = alpha (log pi(y) - log pi_k(y)) + offset         v likewise of the sample y' ~ pi_k
    loss = l_demo(u) + l_generated(v)

    kind        l_demo(u)          l_generated(v)
    bernoulli   -log s(u)          -log s(-v)            s: the logistic function
    brier       (1 - s(u))^2 / 2   s(v)^2 / 2
    hinge       max(0, 1 - u)      max(0, 1 + v)
    kliep       -u                 exp(v) - 1
    lsif        -exp(u)            exp(2 v) / 2

Log-probs are summed over response tokens. Source: arXiv 2410.10093, "How to Leverage
Demonstration Data in Alignment for Large Language Model? A Self-Imitation Learning
Perspective"; every kind but hinge is a Bregman form of density-ratio estimation (Sugiyama,
Suzuki, Kanamori 2012), minimal where exp(u) is the ratio of demonstrations to samples.
"""

import jax
import jax.numpy as jnp

from dpr_jax.losses.pairs import PairBatch, log_ratios, pair_metrics

KINDS = ("bernoulli", "brier", "hinge", "kliep", "lsif")


def bounded_exp(x: jax.Array, most: float) -> jax.Array:
  """exp(x) up to x = most, then its tangent: finite, and still with a gradient that points back."""
  below = jnp.minimum(x, most)
  return jnp.exp(below) * (1.0 + (x - below))


def gsil_terms(
    kind: str, u: jax.Array, v: jax.Array, max_exponent: float
) -> tuple[jax.Array, jax.Array]:
  """(l_demo(u), l_generated(v)), elementwise, of the table above.

  Raises:
    ValueError: another kind.
  """
  if kind == "bernoulli":
    return jax.nn.softplus(-u), jax.nn.softplus(v)
  if kind == "brier":
    return jnp.square(jax.nn.sigmoid(-u)) / 2, jnp.square(jax.nn.sigmoid(v)) / 2
  if kind == "hinge":
    return jax.nn.relu(1.0 - u), jax.nn.relu(1.0 + v)
  if kind == "kliep":
    return -u, bounded_exp(v, max_exponent) - 1.0
  if kind == "lsif":
    return -bounded_exp(u, max_exponent), bounded_exp(2.0 * v, 2.0 * max_exponent) / 2
  raise ValueError(f"kind={kind!r} is not one of {KINDS}")


def make_gsil_loss(
    model,
    *,
    kind: str = "bernoulli",
    alpha: float = 0.1,
    offset: float = 0.0,
    max_exponent: float = 5.0,
):
  """Returns loss_fn(variables, batch: PairBatch, rng) -> (loss_sum, weight, metrics).

  Args:
    kind: one of KINDS.
    alpha: a, per nat of the summed log-ratio.
    offset: c, added to u and v; no unit.
    max_exponent: of kliep and lsif, beyond which exp continues as its tangent, so that one
      pair cannot outweigh a batch by more than exp(max_exponent) (its square for lsif).

  loss_sum: summed over pairs; weight: their number. Metrics: see `pairs.pair_metrics`.

  Raises:
    ValueError: another kind, or alpha not above 0.
  """
  if kind not in KINDS:
    raise ValueError(f"kind={kind!r} is not one of {KINDS}")
  if not alpha > 0:
    raise ValueError(f"alpha={alpha} must be above 0")

  def loss_fn(variables, batch: PairBatch, rng):
    demo_B, generated_B, on_B = log_ratios(model, variables, batch, rng)
    u_B, v_B = alpha * demo_B + offset, alpha * generated_B + offset
    demo_losses_B, generated_losses_B = gsil_terms(kind, u_B, v_B, max_exponent)
    losses_B = demo_losses_B + generated_losses_B
    metrics = pair_metrics(demo_B, generated_B, on_B)
    return jnp.sum(on_B * losses_B), jnp.sum(on_B), metrics

  return loss_fn
