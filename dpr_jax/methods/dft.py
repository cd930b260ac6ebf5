"""Dynamic fine-tuning: tokens weighted by their own probability; see losses/dft.py."""

import dataclasses

from dpr_jax.losses import make_dft_loss
from dpr_jax.methods.on_demos import DemoMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class DFT(DemoMethod):
  """See the module docstring."""

  kind = "dft"
  title = "DFT"

  def loss(self, model):
    return make_dft_loss(model)


DEFAULTS = {"dft": DFT()}
