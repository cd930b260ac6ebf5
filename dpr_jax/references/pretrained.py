"""The model from which SFT started."""

import dataclasses

from dpr_jax.references.base import Reference, ReferenceKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained(ReferenceKind):
  """The weights from which SFT started: everything that SFT has learned is then rewarded."""

  kind = "pretrained"

  def __call__(self, run, dtype):
    return Reference((run.initial_variables(dtype),))

  def describe(self):
    return "ref the model before SFT"
