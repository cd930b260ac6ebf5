"""SFT on part of the demonstrations: the paper's reference, read as "half the data"."""

import dataclasses

from dpr_jax.config.fields import setting
from dpr_jax.references.base import Reference, ReferenceKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfData(ReferenceKind):
  """A run of its own, with its full schedule, on a fraction of the demonstrations."""

  kind = "half_data"
  fraction: float = setting(0.5, "fraction of the training demonstrations and of the SFT steps")

  def steps(self, config) -> int:
    """Updates of its run.

    Raises:
      ValueError: the fraction is outside of (0, 1), or gives no step or all of them.
    """
    steps = round(self.fraction * config.sft.steps)
    if not 0 < self.fraction < 1 or not 1 <= steps < config.sft.steps:
      raise ValueError(f"fraction={self.fraction} must lie between 0 and 1 and leave at least one "
                       f"of the {config.sft.steps} SFT steps, but not all of them")
    return steps

  def check(self, config):
    self.steps(config)

  def prepare(self, run):
    rows = run.data.rows
    # Rows are in random order: the first of them are a sample.
    run.fine_tune(
        "ref", rows.first(max(1, round(self.fraction * len(rows)))), self.steps(run.config)
    )

  def __call__(self, run, dtype):
    return Reference((run.checkpoint("ref", self.steps(run.config), dtype),))

  def describe(self):
    return f"ref trained on {100 * self.fraction:g}% of the demonstrations"
