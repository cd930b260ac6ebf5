"""What steers and what stops the KL to SFT. Pure functions of scalars, jittable."""

import dataclasses

import jax
import jax.numpy as jnp

WINDOW = 10.0  # steps over which the KL of the budget is averaged.
_MAX_ERROR = 0.2  # of the proportional controller, on either side.


def next_beta(beta: jax.Array, kl: jax.Array, target: float, gain: float) -> jax.Array:
  """A step of the proportional controller of Ziegler et al. (arXiv 1909.08593, section 2.2).

      error = clip((kl - target) / target, -0.2, 0.2)
      beta' = beta (1 + gain * error)

  A KL above its target raises the price of KL, and one below lowers it. The clip keeps one noisy
  batch (a sampled KL may even be negative) from moving beta far.

  Args:
    kl, target: nats per response.
    gain: 0.1 in the paper.
  """
  error = jnp.clip((kl - target) / target, -_MAX_ERROR, _MAX_ERROR)
  return beta * (1.0 + gain * error)


def moving_mean(
    mean: jax.Array, count: jax.Array, value: jax.Array, window: float = WINDOW
) -> tuple[jax.Array, jax.Array]:
  """(mean, count) after one more value: plain at first, exponential after `window` values."""
  count = jnp.minimum(count + 1.0, window)
  return mean + (value - mean) / count, count


@dataclasses.dataclass(frozen=True)
class KLControl:
  """What a policy carries from step to step to steer or to stop its KL to SFT."""

  beta: float  # weight of the KL to SFT; with `target_kl` that of the first step.
  target_kl: float = 0.0  # nats per response; steers beta. 0 keeps it fixed.
  beta_gain: float = 0.1  # of that control.
  kl_budget: float = 0.0  # nats per response; bounds the moving mean of the KL. 0: no bound.

  def initial(self) -> dict[str, float]:
    """The scalars before the first step (`TrainState.control`)."""
    out = {"beta": self.beta} if self.target_kl else {}
    return {**out, "kl_mean": 0.0, "kl_count": 0.0} if self.kl_budget else out

  def next(self, control: dict[str, jax.Array], kl: jax.Array) -> dict[str, jax.Array]:
    """The scalars after a step whose sampled KL was `kl`, nats per response."""
    out = dict(control)
    if "beta" in control:
      out["beta"] = next_beta(control["beta"], kl, self.target_kl, self.beta_gain)
    if "kl_mean" in control:
      out["kl_mean"], out["kl_count"] = moving_mean(control["kl_mean"], control["kl_count"], kl)
    return out
