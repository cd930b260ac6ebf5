"""GSIL: self-imitation as density-ratio estimation; see losses/gsil.py."""

import dataclasses

from dpr_jax.config.fields import setting
from dpr_jax.losses import make_gsil_loss
from dpr_jax.losses.gsil import KINDS
from dpr_jax.methods.on_pairs import PairMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSIL(PairMethod):
  """See the module docstring."""

  kind = "gsil"
  title = "GSIL"
  divergence: str = setting("bernoulli", "estimator of the density ratio", choices=KINDS)
  alpha: float = setting(0.1, "factor of the log-ratio of a response, per nat", low=1e-6)

  offset: float = setting(0.0, "added to the scaled log-ratio")
  max_exponent: float = setting(5.0, "exponent beyond which exp continues as its tangent", above=0)

  def loss(self, model):
    return make_gsil_loss(
        model, kind=self.divergence, alpha=self.alpha, offset=self.offset,
        max_exponent=self.max_exponent,
    )


DEFAULTS = {"gsil": GSIL()}
