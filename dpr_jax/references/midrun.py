"""An earlier checkpoint of SFT: the paper's reference, read as "half of the samples seen"."""

import dataclasses

from dpr_jax.config.fields import setting
from dpr_jax.references.base import Reference, ReferenceKind, sft_milestones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Midrun(ReferenceKind):
  """A milestone of the SFT run, which costs nothing."""

  kind = "midrun"
  fraction: float = setting(0.5, "fraction of the SFT steps, among sft.milestones")

  def check(self, config):
    sft_milestones(config).step(self.fraction)

  def __call__(self, run, dtype):
    step = sft_milestones(run.config).step(self.fraction)
    return Reference((run.checkpoint("sft", step, dtype),))

  def describe(self):
    return f"ref at {100 * self.fraction:g}% of SFT"
