"""SPIN: self-play fine-tuning; see losses/spin.py."""

import dataclasses

from dpr_jax.config.fields import setting
from dpr_jax.losses import make_spin_loss
from dpr_jax.methods.on_pairs import PairMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class SPIN(PairMethod):
  """See the module docstring."""

  kind = "spin"
  title = "SPIN"
  beta: float = setting(0.1, "factor of the log-ratio of a response, per nat", low=1e-6)

  def loss(self, model):
    return make_spin_loss(model, beta=self.beta)


DEFAULTS = {"spin": SPIN()}
