"""Which SFT checkpoint serves as pi_ref.

The paper's reference is an earlier checkpoint, trained on half of the samples. Two readings:

  midrun     a milestone of the SFT run at a fraction of its steps; costs nothing.
  half_data  a run of its own, with its full schedule, on a fraction of the demonstrations; as many
             passes over them as the SFT run makes over all.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dpr_jax.errors import UserError


def milestone_steps(fractions: Sequence[float], steps: int) -> dict[float, int]:
  """Fraction of the run -> step at which its checkpoint is kept. The end is always kept.

  Raises:
    UserError: a fraction outside of (0, 1], or so small that it falls on step 0.
  """
  out = {}
  for fraction in sorted({*fractions, 1.0}):
    step = round(fraction * steps)
    if not 0 < fraction <= 1 or step < 1:
      raise UserError(
          f"config.sft.milestones: {fraction} of {steps} steps is step {step}; fractions lie in "
          "(0, 1] and reach step 1 at least"
      )
    out[fraction] = step
  return out


def reference_step(fraction: float, milestones: Sequence[float], steps: int) -> int:
  """The step of the `midrun` reference at `fraction` of the SFT run.

  Raises:
    UserError: no milestone was kept there.
  """
  kept = milestone_steps(milestones, steps)
  for known, step in kept.items():
    if abs(known - fraction) < 1e-9:
      return step
  raise UserError(
      f"config.reference.fraction={fraction} is not among the kept milestones "
      f"{sorted(kept)}; add it to config.sft.milestones"
  )


def reference_steps(fraction: float, steps: int) -> int:
  """Steps of the `half_data` reference: the SFT run's, times the share of demonstrations.

  Raises:
    UserError: the fraction is outside of (0, 1), or gives no step.
  """
  if not 0 < fraction < 1 or round(fraction * steps) < 1:
    raise UserError(
        f"config.reference.fraction={fraction} must lie between 0 and 1 and leave at least one of "
        f"the {steps} SFT steps"
    )
  return round(fraction * steps)


def reference_checkpoint(config) -> tuple[str, int]:
  """(stage, step) of the checkpoint that is pi_ref under a `RunConfig`.

  Raises:
    UserError: as `reference_step` and `reference_steps`.
  """
  fraction, sft = config.reference.fraction, config.sft
  if config.reference.kind == "half_data":
    return "ref", reference_steps(fraction, sft.steps)
  return "sft", reference_step(fraction, sft.milestones, sft.steps)


def combine_logps(logps_KxBxT: jax.Array, how: str) -> jax.Array:
  """Log-probs of an ensemble from those of its K members, over the first axis."""
  if how == "logmeanexp":
    return jax.nn.logsumexp(logps_KxBxT, axis=0) - jnp.log(float(logps_KxBxT.shape[0]))
  return jnp.mean(logps_KxBxT, axis=0)
