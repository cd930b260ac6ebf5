"""Methods that train from the model before SFT, as an SFT of their own, with the budget of SFT."""

import dataclasses

from dpr_jax.config.fields import overlay
from dpr_jax.methods.base import TrainedMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromStart(TrainedMethod):
  """Its fields override the budget of SFT in place of the shared one."""

  def budget(self, config):
    names = ("steps", "batch_size", "accumulation", "optimizer")
    of_sft = overlay(config.budget, {name: getattr(config.sft, name) for name in names})
    return super().budget(dataclasses.replace(config, budget=of_sft))

  def own_budget(self):
    return ", ".join(filter(None, ("that of SFT, from the model before it", super().own_budget())))
