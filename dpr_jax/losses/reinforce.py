"""Dense-Path REINFORCE: the policy gradient of token rewards with a KL to SFT.

    loss = - sum_t m_t stop_gradient(A_t) log pi(y_t | s_t) / loss_aggregation

One update per batch of rollouts, so there is no importance ratio. Advantages are made
once from the whole batch of rollouts (`reinforce_batch`), before it is split into
micro-batches; the loss only multiplies log-probabilities by them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpr_jax.models.logprobs import token_logprobs
from dpr_jax.rewards import shaping
from dpr_jax.rewards.returns import advantages as advantages_of
from dpr_jax.rewards.returns import returns as returns_of
from dpr_jax.rewards.transforms import RewardContext, Transform

LOSS_AGGREGATIONS = ("tokens", "sequences", "constant")


@struct.dataclass
class ReinforceBatch:
  """Rollouts with their advantages. N response columns end the S columns of a row."""

  tokens: Any  # int32 [B, S], prompt right-aligned in the first S - N columns.
  segment_ids: Any  # int32 [B, S], 1 on prompt and response, 0 elsewhere.
  mask: Any  # float32 [B, N], 1 on the response tokens that are trained (EOS included).
  advantages: Any  # float32 [B, N], 0 outside of the mask.
  behaviour_logp: Any  # float32 [B, N], log-probs of the policy that sampled.


def trained_mask(rollout, truncated: str) -> jax.Array:
  """float32 [B, N], 1 on the tokens that are trained: those of all responses, or of ended ones.

  Args:
    truncated: what to do with a rollout that ended without EOS: "keep", or "mask" it.
  """
  if truncated not in ("keep", "mask"):
    raise ValueError(f"truncated={truncated!r} is not 'keep' or 'mask'")
  if truncated == "keep":
    return rollout.mask
  return rollout.mask * rollout.hit_eos[:, None].astype(rollout.mask.dtype)


def check_aggregation(loss_aggregation: str) -> None:
  if loss_aggregation not in LOSS_AGGREGATIONS:
    raise ValueError(f"loss_aggregation={loss_aggregation!r} is not one of {LOSS_AGGREGATIONS}")


def loss_weight(mask: jax.Array, loss_aggregation: str) -> jax.Array:
  """What a sum of losses over the mask [B, N] is divided by; see LOSS_AGGREGATIONS."""
  rows = jnp.sum(jnp.any(mask > 0, axis=1).astype(jnp.float32))
  return {
      "tokens": jnp.sum(mask), "sequences": rows, "constant": rows * mask.shape[1]
  }[loss_aggregation]


def sampling_metrics(logp: jax.Array, behaviour_logp: jax.Array, mask: jax.Array) -> dict[str, Any]:
  """What the sampler said of its tokens, against a forward pass: numerical noise, or a bug.

  Means over tokens, nats, of the difference and of its size; all arguments float32 [B, N].
  """
  tokens = jnp.sum(mask)
  gap = jnp.where(mask > 0, jax.lax.stop_gradient(logp) - behaviour_logp, 0.0)
  return {
      "tokens": tokens,
      "on_policy_drift": (jnp.sum(gap), tokens),
      "decode_gap": (jnp.sum(jnp.abs(gap)), tokens),
  }


def reinforce_batch(
    rollout,
    *,
    beta: float | jax.Array,
    beta_ref: float = 0.0,
    gamma: float = 1.0,
    returns: str = "reward_to_go",
    variance_baseline: str = "none",
    group_size: int = 1,
    truncated: str = "keep",
    transform: Transform | None = None,
    external: jax.Array | None = None,
    external_weight: float = 0.0,
    external_transform: Transform | None = None,
) -> tuple[ReinforceBatch, dict[str, jax.Array]]:
  """Rollouts -> batch with advantages, and scalar metrics. Jittable.

  Args:
    rollout: a `rollout.Rollout`.
    beta: weight of the KL to SFT in the reward, in reward nats per nat; 1 / beta is how far
      the optimum extrapolates away from ref. A number, or a scalar array where it is steered.
    beta_ref: weight of a KL to ref beside it (dual KL), in the same unit; the optimum is then
      proportional to pi_sft^((1 + beta) / b) pi_ref^((beta_ref - 1) / b), b = beta + beta_ref.
    gamma: discount; the paper's objective is undiscounted.
    returns, variance_baseline, group_size: see `rewards.returns`.
    truncated: see `trained_mask`.
    transform: see `rewards.transforms`; before the rewards are mixed and the KL is added.
    external, external_weight: float32 [B] scores of whole responses, and their share w in
      (1 - w) r + w external (see `shaping.hybrid`). A rollout whose score is not finite is masked.
    external_transform: of the scores, as if each were the reward of a response of one token.
  """
  mask = trained_mask(rollout, truncated)
  if external is not None:
    mask = mask * jnp.isfinite(external)[:, None].astype(mask.dtype)
  rewards = jnp.where(mask > 0, rollout.rewards, 0.0).astype(jnp.float32)
  if transform is not None:
    rewards = transform(rewards, RewardContext.of(rollout, mask))
  if external is not None:
    if external_transform is not None:
      trained_Bx1 = jnp.any(mask > 0, axis=1, keepdims=True).astype(mask.dtype)
      external = external_transform(external[:, None], RewardContext(trained_Bx1))[:, 0]
    rewards = shaping.hybrid(rewards, external, mask, external_weight)
  shaped = shaping.kl_penalized(
      rewards, rollout.policy_logp, rollout.sft_logp, mask, beta, rollout.ref_logp, beta_ref
  )
  g = returns_of(shaped, mask, returns, gamma)
  advantages = advantages_of(g, mask, variance_baseline, group_size)
  tokens = jnp.maximum(jnp.sum(mask), 1.0)
  mean = jnp.sum(advantages * mask) / tokens
  metrics = {
      "shaped_reward": jnp.sum(shaped) / jnp.maximum(jnp.sum(jnp.any(mask > 0, axis=1)), 1.0),
      "trained_share": jnp.sum(mask) / jnp.maximum(jnp.sum(rollout.mask), 1.0),
      "advantage_mean": mean,
      "advantage_std": jnp.sqrt(jnp.sum(jnp.square(advantages - mean) * mask) / tokens),
  }
  batch = ReinforceBatch(
      tokens=rollout.tokens,
      segment_ids=rollout.segment_ids,
      mask=mask,
      advantages=jax.lax.stop_gradient(advantages),
      behaviour_logp=rollout.policy_logp,
  )
  return batch, metrics


def make_reinforce_loss(model, *, loss_aggregation: str = "tokens"):
  """Returns loss_fn(variables, batch, rng) -> (loss_sum, weight, metrics).

  Args:
    loss_aggregation: what the sum is divided by: "tokens" (of the batch), "sequences", or
      "constant" (rows x response columns: no length preference through the weight).
  """
  check_aggregation(loss_aggregation)

  def loss_fn(variables, batch: ReinforceBatch, rng):
    rngs = None if rng is None else {"dropout": rng}
    length = batch.mask.shape[1]
    out = token_logprobs(
        model,
        variables,
        batch.tokens,
        batch.segment_ids,
        start=batch.tokens.shape[1] - length,
        rngs=rngs,
    )
    # where, not a product: values outside of the mask must not turn into a NaN.
    on = batch.mask > 0
    weighted = jnp.where(on, jax.lax.stop_gradient(batch.advantages) * out.logp, 0.0)
    weight = loss_weight(batch.mask, loss_aggregation)
    return -jnp.sum(weighted), weight, sampling_metrics(out.logp, batch.behaviour_logp, batch.mask)

  return loss_fn
