"""What to watch while a policy is trained on a reward that it could game."""

import jax
import jax.numpy as jnp

from dpr_jax.rollout.step import Rollout


def distinct_bigrams(tokens_BxN: jax.Array, mask_BxN: jax.Array) -> jax.Array:
  """Share of distinct bigrams among all bigrams of the batch's responses, in (0, 1]. Jittable."""
  first, second = tokens_BxN[:, :-1].astype(jnp.uint32), tokens_BxN[:, 1:].astype(jnp.uint32)
  valid = (mask_BxN[:, 1:] > 0).reshape(-1)
  # A 32-bit hash of the pair: V * V does not fit an integer of jax's default width.
  key = ((first * jnp.uint32(2654435761)) ^ (second * jnp.uint32(2246822519))) >> 1
  key = jnp.where(valid, key.reshape(-1), jnp.uint32(0xFFFFFFFF))  # invalid ones sort last.
  key = jnp.sort(key)
  new = jnp.concatenate([jnp.ones((1,), bool), key[1:] != key[:-1]])
  distinct = jnp.sum(new & (key != jnp.uint32(0xFFFFFFFF)))
  return distinct / jnp.maximum(jnp.sum(valid), 1)


def rollout_metrics(rollout: Rollout) -> dict[str, jax.Array]:
  """Scalars of a batch of rollouts; a response is a row that is not a filler.

  reward (nats a response), reward_per_token, reward_eos (at EOS tokens), kl (policy to sft,
  nats a response, sampled), response_length (tokens), eos_rate, entropy (nats a token),
  distinct_2, ref_logp and sft_logp (nats a token), decode_steps (forward passes of decoding).
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
