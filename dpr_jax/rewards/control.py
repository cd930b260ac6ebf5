"""What steers and what stops the KL to SFT. Pure functions of scalars, jittable."""

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
    kl, target: nats a response.
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


def initial_control(*, beta: float, target_kl: float, kl_budget: float) -> dict[str, float]:
  """What a state carries for these settings (`TrainState.control`); nothing where both are 0."""
  out = {"beta": beta} if target_kl else {}
  return {**out, "kl_mean": 0.0, "kl_count": 0.0} if kl_budget else out


def next_control(
    control: dict[str, jax.Array], kl: jax.Array, *, target_kl: float, beta_gain: float
) -> dict[str, jax.Array]:
  """The scalars after a step whose sampled KL was `kl`, nats a response."""
  out = dict(control)
  if "beta" in control:
    out["beta"] = next_beta(control["beta"], kl, target_kl, beta_gain)
  if "kl_mean" in control:
    out["kl_mean"], out["kl_count"] = moving_mean(control["kl_mean"], control["kl_count"], kl)
  return out
