"""Reward transforms: small functions (rewards, context) -> rewards, applied in a stated order.

They trade fidelity to the log-ratio for robustness: one token with a reward of -12 can
otherwise outweigh a whole batch. All give 0 where the mask is 0, whatever the input is there.

A config names them as a list, applied from first to last: ("center", "clip:2", "scale:0.5").
In code, any function of the same shape is one more:

    def skip_first(rewards, context):
      first = jnp.arange(rewards.shape[1])[None, :] == 0
      return jnp.where(first, 0.0, rewards)

    reinforce_batch(rollout, beta=1.0, transform=compose([clip(-2, 2), skip_first]))
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpr_jax.rewards.shaping import standardized


@struct.dataclass
class RewardContext:
  """What a transform may read beside the rewards. Float32 [B, T], None where not computed."""

  mask: jax.Array  # 1 on the response tokens that are trained, EOS included.
  expected_rewards: Any = None  # E_{a ~ policy(. | s_t)} r(s_t, a) of untransformed rewards, nats.
  sft_entropy: Any = None  # of pi_sft(. | s_t), nats.
  ref_entropy: Any = None  # of pi_ref(. | s_t), nats.

  @classmethod
  def of(cls, rollout: Any, mask: jax.Array) -> "RewardContext":
    """The context of a `rollout.Rollout`, with the mask that the loss uses."""
    names = ("expected_rewards", "sft_entropy", "ref_entropy")
    return cls(mask=mask, **{name: getattr(rollout, name, None) for name in names})


Transform = Callable[[jax.Array, RewardContext], jax.Array]


def _needed(context: RewardContext, name: str, by: str) -> jax.Array:
  value = getattr(context, name)
  if value is None:
    raise ValueError(f"the transform {by} needs {name} of the rollout, which were not computed")
  return value


def scale(factor: float) -> Transform:
  """Multiplies every reward."""
  return lambda rewards, context: rewards * factor


def clip(low: float, high: float) -> Transform:
  """Clips each token's reward to [low, high] nats."""
  return lambda rewards, context: jnp.clip(rewards, low, high)


def zscore_by_position(epsilon: float = 1e-6) -> Transform:
  """(r - mean) / std over the rows that have a token at that position of the response.

  Removes what is common to a position, a pressure on length included. A position with
  one row becomes 0.
  """
  return lambda rewards, context: standardized(rewards, context.mask, 0, epsilon)


def mask_unsure(nats: float) -> Transform:
  """Zero where the entropies of sft and of ref both exceed `nats`.

  Where neither model knows how to continue, the difference of two flat distributions is noise
  about which of many equals was sampled. One confident model is enough to keep the reward:
  a sure sft against an unsure ref is what was learnt in between.
  """

  def apply(rewards, context):
    sft, ref = (_needed(context, f"{name}_entropy", "mask_unsure") for name in ("sft", "ref"))
    return jnp.where((sft > nats) & (ref > nats), 0.0, rewards)

  return apply


def center() -> Transform:
  """r(s_t, a_t) - E_{a ~ policy} r(s_t, a): what the choice of the token earned.

  The mean reward of a state is taken away, and with it the pressure to continue that
  E_{a ~ sft} r = KL(sft || ref) >= 0 exerts. Beware of what that means for returns: centered
  rewards of later tokens have mean 0 given the past, so under on-policy sampling the expected
  gradient of a reward-to-go is that of `returns="per_token"` (gamma = 0), whose optimum is
  contrastive decoding; the later tokens only add variance. Pair it with per_token unless that is
  what is to be shown.
  """
  return lambda rewards, context: rewards - _needed(context, "expected_rewards", "center")


def compose(transforms: Sequence[Transform]) -> Transform:
  """Applies transforms from first to last, in float32; none at all is the identity.

  Masks what each of them returns.
  """

  def apply(rewards, context):
    on = context.mask > 0
    rewards = jnp.where(on, rewards, 0.0).astype(jnp.float32)
    for transform in transforms:
      rewards = jnp.where(on, transform(rewards, context), 0.0)
    return rewards

  return apply


# --- From the config --------------------------------------------------------------------------

# Name -> (function, numbers it takes, how it is written, extras of rollouts that it reads, whether
# what it makes of a token's reward depends on that reward alone).
_SPECS = {
    "scale": (scale, (1,), "scale:FACTOR, not 0", (), True),
    "clip": (
        clip, (1, 2), "clip:NATS (to [-NATS, NATS]) or clip:LOW:HIGH with LOW below HIGH", (), True
    ),
    "zscore": (zscore_by_position, (0,), "zscore", (), False),
    "mask_unsure": (
        mask_unsure, (1,), "mask_unsure:NATS, above 0", ("sft_entropy", "ref_entropy"), False
    ),
    "center": (center, (0,), "center, the first of the list", ("expected_rewards",), False),
}


def _parse_one(spec: str, index: int) -> tuple[str, tuple[float, ...]]:
  """'clip:2' -> ('clip', (-2.0, 2.0)). ValueError naming the entry."""
  name, *rest = spec.split(":")
  where = f"transforms[{index}]={spec!r}"
  if name not in _SPECS:
    raise ValueError(f"{where}: {name!r} is not one of {', '.join(_SPECS)}")
  _, counts, usage, *_ = _SPECS[name]
  try:
    numbers = tuple(float(x) for x in rest)
  except ValueError:
    raise ValueError(f"{where}: expected {usage}") from None
  good = len(numbers) in counts and all(math.isfinite(x) for x in numbers)
  if good and name == "clip":
    numbers = (-numbers[0], numbers[0]) if len(numbers) == 1 else numbers
    good = numbers[0] < numbers[1]
  elif good and name == "scale":
    good = numbers[0] != 0
  elif good and name == "mask_unsure":
    good = numbers[0] > 0
  elif name == "center":  # The expected rewards are those of the untransformed reward.
    good = good and index == 0
  if not good:
    raise ValueError(f"{where}: expected {usage}")
  return name, numbers


def parse(specs: Sequence[str]) -> Transform:
  """Specs of a config (see `_SPECS`) -> one transform, which applies them from first to last.

  Raises:
    ValueError: naming the entry, and what would be right.
  """
  found = [_parse_one(spec, i) for i, spec in enumerate(specs)]
  return compose([_SPECS[name][0](*numbers) for name, numbers in found])


def needs(specs: Sequence[str]) -> frozenset[str]:
  """The extras that rollouts must compute for these transforms; see `rollout.step.EXTRAS`."""
  names = {_parse_one(spec, i)[0] for i, spec in enumerate(specs)}
  return frozenset(extra for name in names for extra in _SPECS[name][3])


def check_pointwise(specs: Sequence[str]) -> None:
  """Raises ValueError, naming it, for a transform that reads more than the reward of one token.

  The others give the transformed reward of every token of the vocabulary; what
  `rewards.base.check_pointwise` is for rewards.
  """
  for i, spec in enumerate(specs):
    if not _SPECS[_parse_one(spec, i)[0]][4]:
      fine = ", ".join(name for name, (*_, pointwise) in _SPECS.items() if pointwise)
      raise ValueError(f"transforms[{i}]={spec!r} is no function of the reward of one token alone; "
                       f"use {fine}")
