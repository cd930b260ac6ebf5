"""The moving average of the SFT weights."""

import dataclasses

from dpr_jax.config.fields import setting
from dpr_jax.references.base import Reference, ReferenceKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMA(ReferenceKind):
  """ema_t = d ema_{t-1} + (1 - d) theta_t with ema_0 = theta_0, at the end of the SFT run.

  It lags: the mean age of the weights in it is d / (1 - d) steps, so d = 0.99 is about the weights
  of 99 steps ago, smoothed. Beyond a third of the run's steps, the weights from which SFT started
  count noticeably (with d^steps).
  """

  kind = "ema"
  decay: float = setting(0.99, "decay of the average per step", low=0.1, high=0.999999)

  @property
  def ema_decay(self):
    return self.decay

  def __call__(self, run, dtype):
    return Reference((run.checkpoint("sft", run.config.sft.steps, dtype, "ema"),))

  def describe(self):
    return f"ref the moving average of SFT (decay {self.decay:g})"
