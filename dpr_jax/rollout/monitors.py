"""Metrics to monitor while a policy is trained on a reward that it might game."""

import jax
import jax.numpy as jnp

from dpr_jax.rollout.step import Rollout


def distinct_bigrams(tokens_BxN: jax.Array, mask_BxN: jax.Array) -> jax.Array:
  """Returns the fraction of the batch's response bigrams that are distinct. Jittable.

  Args:
    tokens_BxN: int32 response tokens.
    mask_BxN: 1 on response tokens, 0 past the end.

  Returns:
    float32 [], in (0, 1]; 0 if there is no bigram at all.
  """
  first, second = tokens_BxN[:, :-1].astype(jnp.uint32), tokens_BxN[:, 1:].astype(jnp.uint32)
  valid = (mask_BxN[:, 1:] > 0).reshape(-1)
  # The pair is hashed to 32 bits, because V * V does not fit the default integer width of jax.
  key = ((first * jnp.uint32(2654435761)) ^ (second * jnp.uint32(2246822519))) >> 1
  key = jnp.where(valid, key.reshape(-1), jnp.uint32(0xFFFFFFFF))  # Padding sorts last.
  key = jnp.sort(key)
  new = jnp.concatenate([jnp.ones((1,), bool), key[1:] != key[:-1]])
  distinct = jnp.sum(new & (key != jnp.uint32(0xFFFFFFFF)))
  return distinct / jnp.maximum(jnp.sum(valid), 1)


def rollout_metrics(rollout: Rollout) -> dict[str, jax.Array]:
  """Returns scalar metrics of a batch of rollouts. Filler rows are left out of every mean.

  The metrics and their units:
    reward: sum of token rewards, nats per response.
    reward_per_token: nats per token.
    reward_eos: mean reward of the tokens that ended a response, nats per token.
    kl: sampled estimate of KL(policy || sft), nats per response.
    response_length: tokens per response.
    eos_rate: fraction of responses that ended before they were truncated.
    entropy: of the policy, nats per token.
    distinct_2: see `distinct_bigrams`.
    sft_logp, ref_logp: nats per token.
    decode_steps: forward passes of the decoding loop.
  """
  mask = rollout.mask
  rows = jnp.maximum(jnp.sum(rollout.lengths > 0), 1).astype(jnp.float32)
  tokens = jnp.maximum(jnp.sum(mask), 1.0)
  last = jnp.arange(mask.shape[1], dtype=jnp.int32)[None, :] == rollout.lengths[:, None] - 1
  at_eos = last & rollout.hit_eos[:, None]
  return {
      "reward": jnp.sum(rollout.rewards) / rows,
      "reward_per_token": jnp.sum(rollout.rewards) / tokens,
      "reward_eos": jnp.sum(jnp.where(at_eos, rollout.rewards, 0.0))
      / jnp.maximum(jnp.sum(at_eos), 1),
      "kl": jnp.sum((rollout.policy_logp - rollout.sft_logp) * mask) / rows,
      "response_length": jnp.sum(rollout.lengths) / rows,
      "eos_rate": jnp.sum(rollout.hit_eos) / rows,
      "entropy": jnp.sum(rollout.entropy) / tokens,
      "distinct_2": distinct_bigrams(rollout.response_tokens, mask),
      "sft_logp": jnp.sum(rollout.sft_logp) / tokens,
      "ref_logp": jnp.sum(rollout.ref_logp) / tokens,
      "decode_steps": rollout.decode_steps,
  }
