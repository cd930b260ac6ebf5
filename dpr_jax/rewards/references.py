"""Which SFT checkpoints serve as pi_ref.

The paper's reference is an earlier checkpoint, trained on half of the samples. Here it
is `midrun`: a milestone of the same run at a fraction of its steps.
"""

from collections.abc import Sequence

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
