"""More steps of SFT: what any other method has to beat."""

import dataclasses

from dpr_jax.losses import make_sft_loss
from dpr_jax.methods.on_demos import DemoMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuedSFT(DemoMethod):
  """See the module docstring."""

  kind = "continued_sft"
  title = "Continued SFT"

  def loss(self, model):
    return make_sft_loss(model)


DEFAULTS = {"continued_sft": ContinuedSFT()}
