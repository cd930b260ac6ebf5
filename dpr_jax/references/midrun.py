"""An earlier checkpoint of SFT: the paper's reference, read as "half of the samples seen"."""

import dataclasses

from dpr_jax.config.fields import setting
from dpr_jax.references.base import Reference, ReferenceKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Midrun(ReferenceKind):
  """A milestone of the SFT run, which costs nothing."""

  kind = "midrun"
  fraction: float = setting(0.5, "fraction of the SFT steps, among sft.milestones")

  def check(self, config):
    sft = config.sft
    if sft.milestone_step(self.fraction) == sft.steps:
      raise ValueError(f"fraction={self.fraction} of {sft.steps} steps is the last of them: ref "
                       "would be sft, and every reward 0; name an earlier milestone")

  def __call__(self, run, dtype):
    step = run.config.sft.milestone_step(self.fraction)
    return Reference((run.checkpoint("sft", step, dtype),))

  def describe(self):
    return f"ref at {100 * self.fraction:g}% of SFT"
