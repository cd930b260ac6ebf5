"""Which parameters serve as pi_ref, and how several of them are one reference.

The paper's reference is an earlier checkpoint, trained on half of the samples. Its two readings,
and others:

  midrun     a milestone of the SFT run at a fraction of its steps; costs nothing.
  half_data  a run of its own, with its full schedule, on a fraction of the demonstrations; as many
             passes over them as the SFT run makes over all.
  ema        the exponential moving average of the SFT weights at the end of the run,
                 ema_t = d ema_{t-1} + (1 - d) theta_t,   ema_0 = theta_0.
             It lags: the mean age of the weights in it is d / (1 - d) steps, so d = 0.99 is about
             the weights of 99 steps ago, smoothed. Beyond a third of the run's steps, the weights
             from which SFT started weigh in (with d^steps).
  ensemble_logmeanexp, ensemble_mean_logp
             several milestones, combined token by token (see `combine_logps`).

Everywhere `ref` is one pytree: the variables of one model, or a tuple of them for an ensemble
(under LoRA the members share the arrays of their base).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dpr_jax.errors import UserError

ENSEMBLES = {"ensemble_logmeanexp": "logmeanexp", "ensemble_mean_logp": "mean_logp"}


@dataclasses.dataclass(frozen=True)
class Member:
  """Where one set of reference variables is kept."""

  stage: str  # folder of the workdir.
  step: int  # of the checkpoint.
  part: str = "variables"  # of the checkpoint: variables | ema.


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


def reference_step(
    fraction: float, milestones: Sequence[float], steps: int, field: str = "fraction"
) -> int:
  """The step of the milestone at `fraction` of the SFT run.

  Raises:
    UserError: no milestone was kept there.
  """
  kept = milestone_steps(milestones, steps)
  for known, step in kept.items():
    if abs(known - fraction) < 1e-9:
      return step
  raise UserError(
      f"config.reference.{field}={fraction} is not among the kept milestones "
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


def reference_members(config, fraction: float | None = None) -> tuple[Member, ...]:
  """The checkpoints that make up pi_ref under a `RunConfig`; more than one for an ensemble.

  Args:
    fraction: what a selection has chosen in the place of config.reference.fraction.

  Raises:
    UserError: as `reference_step` and `reference_steps`.
  """
  section, sft = config.reference, config.sft
  fraction = section.fraction if fraction is None else fraction
  if section.kind == "half_data":
    return (Member("ref", reference_steps(fraction, sft.steps)),)
  if section.kind == "ema":
    return (Member("sft", sft.steps, "ema"),)
  if section.kind in ENSEMBLES:
    return tuple(
        Member("sft", reference_step(f, sft.milestones, sft.steps, f"fractions[{i}]"))
        for i, f in enumerate(section.fractions)
    )
  return (Member("sft", reference_step(fraction, sft.milestones, sft.steps)),)


def candidate_fractions(config) -> list[float]:
  """The milestones that a selection chooses from: all but the end, which is sft itself.

  Raises:
    UserError: fewer than two.
  """
  kept = milestone_steps(config.sft.milestones, config.sft.steps)
  found = [f for f in kept if kept[f] != config.sft.steps]
  if len(found) < 2:
    raise UserError(
        f"config.reference.select={config.reference.select} needs at least two "
        f"config.sft.milestones before the end; there are {found}"
    )
  return found


def combine_logps(logps: jax.Array, how: str) -> jax.Array:
  """Log-probs of K references -> those of their ensemble; the first axis counts the members.

  logmeanexp  log mean_k pi_k(a | s): the mixture of the next-token distributions, itself one. An
              action that any member finds likely has a small reward.
  mean_logp   mean_k log pi_k(a | s): the reward is then the mean of the K rewards. Not
              normalised, on purpose: log Z(s) depends on the state alone, but would add to the
              return of earlier tokens what no member says.

  Args:
    logps: float32 [K, ...]: of the sampled tokens [K, B, T], or of a vocabulary [K, B, C, V].

  Raises:
    ValueError: another name.
  """
  if how == "logmeanexp":
    return jax.nn.logsumexp(logps, axis=0) - math.log(logps.shape[0])
  if how == "mean_logp":
    return jnp.mean(logps, axis=0)
  raise ValueError(f"how={how!r} is not one of {', '.join(ENSEMBLES.values())}")
