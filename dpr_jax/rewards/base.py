"""What a token reward is: a function of the scores that its parameters name.

    def confident(sft_logp, ref_logp, sft_entropy):
      return jnp.where(sft_entropy < 1.0, sft_logp - ref_logp, 0.0)

The caller reads off its signature which scores to compute; a score that was not
computed is an error, never zeros. A reward that a config can name is a `Reward` with a `__call__`.
"""

import inspect
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from dpr_jax.config.fields import Value, kind_of


@struct.dataclass
class Scores:
  """Scores that a reward may need, float32 [B, T], aligned with the token; None: not computed."""

  sft_logp: jax.Array | None = None  # log pi_sft(y_t | s_t), nats.
  sft_logsumexp: jax.Array | None = None  # V(s_t) under sft: logsumexp of its logits.
  sft_entropy: jax.Array | None = None  # of pi_sft(. | s_t), nats.
  ref_logp: jax.Array | None = None  # log pi_ref(y_t | s_t), nats.
  ref_entropy: jax.Array | None = None  # of pi_ref(. | s_t); of several members their mean.
  policy_logp: jax.Array | None = None  # log pi_policy(y_t | s_t), nats.
  mask: jax.Array | None = None  # 1 on response tokens, EOS included.


RewardFn = Callable[..., jax.Array]


class Reward(Value):
  """A reward that a config can name: a frozen dataclass, called with the scores it needs."""

  # The reward of a token depends on its own log-probs alone, so that the same formula gives the
  # reward of every token of the vocabulary, and with it an expectation.
  pointwise: ClassVar[bool] = False
  # One token alone has a meaning; False where only sums do, and returns must be rewards-to-go.
  per_token: ClassVar[bool] = True


def needs(reward: RewardFn) -> frozenset[str]:
  """The scores that a reward needs.

  Raises:
    ValueError: a parameter that is no score; lists the scores.
  """
  names = [
      name for name, p in inspect.signature(reward).parameters.items() if p.default is p.empty
  ]
  known = list(Scores.__dataclass_fields__)
  for name in names:
    if name not in known:
      raise ValueError(f"a reward asks for {name!r}, which is no score; known: {', '.join(known)}")
  return frozenset(names)


def apply_reward(reward: RewardFn, scores: Scores) -> jax.Array:
  """Token rewards in nats, float32 [B, T]; 0 outside of `scores.mask`.

  Raises:
    ValueError: the reward asks for a score that was not computed.
  """
  values = {name: getattr(scores, name) for name in needs(reward)}
  for name, value in values.items():
    if value is None:
      raise ValueError(f"the reward asks for {name}, which was not computed")
  rewards = reward(**values)
  return jnp.where(scores.mask > 0, rewards, 0.0).astype(jnp.float32)


def check_pointwise(reward: RewardFn) -> None:
  """Raises ValueError where a reward has no exact expectation over the vocabulary."""
  if not getattr(reward, "pointwise", False) or not needs(reward) <= {"sft_logp", "ref_logp"}:
    name = kind_of(reward) if isinstance(reward, Value) else reward
    raise ValueError(f"reward={name!r} has no exact expectation: it is not a pointwise function of "
                     "sft_logp and ref_logp")
