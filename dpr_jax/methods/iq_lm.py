"""IQ-LM: SFT with the chi-square regularizer of IQ-Learn; see losses/iq_lm.py."""

import dataclasses

from dpr_jax.config.fields import setting
from dpr_jax.losses import make_iq_lm_loss
from dpr_jax.methods.on_demos import DemoMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class IQLM(DemoMethod):
  """See the module docstring."""

  kind = "iq_lm"
  title = "IQ-LM"
  lam: float = setting(1.0, "lambda, nats; the regularizer is weaker the larger it is", low=1e-6)

  def loss(self, model):
    return make_iq_lm_loss(model, lam=self.lam)


DEFAULTS = {"iq_lm": IQLM()}
