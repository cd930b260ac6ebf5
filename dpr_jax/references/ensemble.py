"""Several checkpoints of the SFT run as one reference."""

import dataclasses

from dpr_jax.config.fields import setting
from dpr_jax.references.base import COMBINE, Reference, ReferenceKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ensemble(ReferenceKind):
  """Milestones of the SFT run, combined token by token (see `references.combine_logps`)."""

  kind = "ensemble"
  fractions: tuple[float, ...] = setting(
      (0.25, 0.5), "fractions of the SFT steps, among sft.milestones"
  )
  combine: str = setting("logmeanexp", "how the members' log-probs are combined", choices=COMBINE)

  def __post_init__(self):
    if len(set(self.fractions)) < 2:
      raise ValueError(f"fractions={self.fractions}: an ensemble needs at least two")

  def _steps(self, config):
    step = config.sft.milestone_step
    return [step(f, f"fractions[{i}]") for i, f in enumerate(self.fractions)]

  def check(self, config):
    steps = self._steps(config)
    if len(set(steps)) < len(steps):
      raise ValueError(f"fractions={self.fractions} are the steps {steps} of {config.sft.steps}; "
                       "an ensemble needs different ones")

  @property
  def num_members(self):
    return len(self.fractions)

  def __call__(self, run, dtype):
    steps = self._steps(run.config)
    return Reference(tuple(run.checkpoint("sft", s, dtype) for s in steps), self.combine)

  def describe(self):
    parts = ", ".join(f"{100 * f:g}%" for f in self.fractions)
    return f"ref the {self.combine.replace('_', ' ')} of SFT at {parts}"
