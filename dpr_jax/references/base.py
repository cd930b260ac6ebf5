"""A reference policy as one pytree, and what a kind of reference is."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from dpr_jax.config.fields import Value

COMBINE = ("logmeanexp", "mean_logp")


@struct.dataclass
class Reference:
  """pi_ref: the variables of one model, or of several that are combined token by token."""

  members: tuple[Any, ...]  # variables, {"params": ...} and maybe "lora", of each model.
  combine: str = struct.field(pytree_node=False, default="logmeanexp")  # one of COMBINE.

  @classmethod
  def of(cls, variables: Any) -> "Reference":
    """A reference as it is, or the variables of one model as a reference."""
    return cls((variables,)) if isinstance(variables, Mapping) else variables

  def logps(self, score: Callable[[Any], jax.Array]) -> jax.Array:
    """Log-probs under the reference.

    Args:
      score: variables of one model -> its log-probs, float32, of any shape.
    """
    return combine_logps(jnp.stack([score(member) for member in self.members]), self.combine)


def combine_logps(logps: jax.Array, how: str) -> jax.Array:
  """Log-probs of K models -> those of their combination; the first axis counts the models.

  logmeanexp  log mean_k pi_k(a | s): the mixture of the next-token distributions, itself one. An
              action that any member finds likely has a small reward.
  mean_logp   mean_k log pi_k(a | s): the reward is then the mean of the K rewards. Not
              normalized, on purpose: log Z(s) depends on the state alone, but would add to the
              return of earlier tokens what no member says.

  Args:
    logps: float32 [K, ...]: of the sampled tokens [K, B, T], or of a vocabulary [K, B, C, V].

  Raises:
    ValueError: another name.
  """
  if how not in COMBINE:
    raise ValueError(f"combine={how!r} is not one of {', '.join(COMBINE)}")
  if logps.shape[0] == 1:
    return logps[0]
  if how == "logmeanexp":
    return jax.nn.logsumexp(logps, axis=0) - math.log(logps.shape[0])
  return jnp.mean(logps, axis=0)


class ReferenceKind(Value):
  """How a run gets its reference: a frozen dataclass that is called with the run."""

  ema_decay: ClassVar[float] = 0.0  # of the moving average that SFT must keep; 0 keeps none.
  measured: ClassVar[bool] = False  # chosen by what is measured of its candidates.

  def __call__(self, run: Any, dtype: str) -> Reference:
    """The reference of a `run.Run`, in `dtype`; after SFT and `prepare`."""
    raise NotImplementedError

  def prepare(self, run: Any) -> None:
    """Trains or chooses what the reference is made of; a run that is resumed calls it again."""

  @property
  def num_members(self) -> int:
    """Models that score a response, for planning."""
    return 1

  def checkpoints(self) -> Mapping[str, str]:
    """The CKPTs from outside of the run that it reads, by field; they must stay as they are."""
    return {}

  def candidates(self, run: Any) -> list["ReferenceKind"]:
    """What is measured on training prompts: the reference, or those it is chosen among."""
    return [self]

  def choose(self, candidates: Sequence[Mapping[str, Any]]) -> int | None:
    """Index of the candidate that reference.json names as chosen; None where there is no choice.

    Args:
      candidates: what was measured of each: text, kl, kl_se, reward_mean, reward_std, snr, auc.

    Raises:
      ValueError: none can be chosen.
    """

  def describe(self) -> str:
    """For the report, as in "ref at 50% of SFT"."""
    raise NotImplementedError
