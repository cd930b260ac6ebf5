"""GSIL: self-imitation as density-ratio estimation between demonstrations and own samples.

    u = alpha (log pi(y) - log pi_k(y)) + offset         v likewise of the sample y' ~ pi_k
    loss = l_demo(u) + l_generated(v)

    divergence  l_demo(u)          l_generated(v)
    bernoulli   -log s(u)          -log s(-v)            s: the logistic function
    brier       (1 - s(u))^2 / 2   s(v)^2 / 2
    hinge       max(0, 1 - u)      max(0, 1 + v)
    kliep       -u                 exp(v) - 1
    lsif        -exp(u)            exp(2 v) / 2

Log-probs are summed over response tokens. Source: arXiv 2410.10093, "How to Leverage
Demonstration Data in Alignment for Large Language Model? A Self-Imitation Learning
Perspective"; every divergence but hinge is a Bregman form of density-ratio estimation (Sugiyama,
Suzuki, Kanamori 2012), minimal where exp(u) is the ratio of demonstrations to samples.

Beyond `max_exponent`, exp continues as its tangent, so that one pair cannot outweigh a batch by
more than exp(max_exponent) (its square for lsif).
"""

import dataclasses

import jax
import jax.numpy as jnp

from dpr_jax.config.fields import setting
from dpr_jax.methods.on_pairs import PairMethod

DIVERGENCES = ("bernoulli", "brier", "hinge", "kliep", "lsif")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSIL(PairMethod):
  """See the module docstring."""

  kind = "gsil"
  title = "GSIL"
  divergence: str = setting("bernoulli", "estimator of the density ratio", choices=DIVERGENCES)
  alpha: float = setting(0.1, "factor of the log-ratio of a response, per nat", low=1e-6)

  offset: float = setting(0.0, "added to the scaled log-ratio")
  max_exponent: float = setting(5.0, "exponent beyond which exp continues as its tangent", above=0)

  def pair_losses(self, demo_B, generated_B):
    u_B, v_B = self.alpha * demo_B + self.offset, self.alpha * generated_B + self.offset
    demo_losses_B, generated_losses_B = gsil_terms(self.divergence, u_B, v_B, self.max_exponent)
    return demo_losses_B + generated_losses_B


def bounded_exp(x: jax.Array, most: float) -> jax.Array:
  """exp(x) up to x = most, then its tangent: finite, and still with a gradient that points back."""
  below = jnp.minimum(x, most)
  return jnp.exp(below) * (1.0 + (x - below))


def gsil_terms(
    divergence: str, u: jax.Array, v: jax.Array, max_exponent: float
) -> tuple[jax.Array, jax.Array]:
  """(l_demo(u), l_generated(v)), elementwise, of the table above.

  Raises:
    ValueError: another divergence.
  """
  if divergence == "bernoulli":
    return jax.nn.softplus(-u), jax.nn.softplus(v)
  if divergence == "brier":
    return jnp.square(jax.nn.sigmoid(-u)) / 2, jnp.square(jax.nn.sigmoid(v)) / 2
  if divergence == "hinge":
    return jax.nn.relu(1.0 - u), jax.nn.relu(1.0 + v)
  if divergence == "kliep":
    return -u, bounded_exp(v, max_exponent) - 1.0
  if divergence == "lsif":
    return -bounded_exp(u, max_exponent), bounded_exp(2.0 * v, 2.0 * max_exponent) / 2
  raise ValueError(f"divergence={divergence!r} is not one of {DIVERGENCES}")


DEFAULTS = {"gsil": GSIL()}
