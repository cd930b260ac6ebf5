"""The rollout step: ONE jitted program that samples and scores.

It decodes with the policy, then scores the finished tokens under policy, sft and ref by
teacher forcing, and returns token rewards. Scoring while decoding would carry three KV
caches through a bandwidth-bound loop; teacher forcing is one parallel pass each.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import struct

from dpr_jax.data.batches import PromptBatch
from dpr_jax.models.logprobs import TokenLogProbs, token_logprobs
from dpr_jax.rewards import token_rewards
from dpr_jax.rollout.sampler import ON_POLICY, Sampling, generate


@struct.dataclass
class Rollout:
  """Sampled responses with their log-probs and rewards, aligned with the response tokens.

  S = P + N columns; response token t of every row stands in column P + t of `tokens`.
  """

  tokens: jax.Array  # int32 [B, S], prompt right-aligned in the first P columns.
  segment_ids: jax.Array  # int32 [B, S], 1 on prompt and response, 0 on padding.
  prompt_lengths: jax.Array  # int32 [B], 0 marks a filler row.
  lengths: jax.Array  # int32 [B], response tokens, EOS included.
  hit_eos: jax.Array  # bool [B]; False: truncated at N tokens.
  mask: jax.Array  # float32 [B, N], 1 on response tokens; made from lengths, not from ids.
  rewards: jax.Array  # float32 [B, N], nats.
  policy_logp: jax.Array  # float32 [B, N], re-scored by teacher forcing.
  sft_logp: jax.Array  # float32 [B, N].
  ref_logp: jax.Array  # float32 [B, N].
  decode_logp: jax.Array  # float32 [B, N], as decoded; its gap to policy_logp is numerical.
  entropy: jax.Array  # float32 [B, N], of the policy, nats.

  @property
  def response_tokens(self) -> jax.Array:
    """int32 [B, N]."""
    return self.tokens[:, -self.mask.shape[1] :]


RewardFn = Callable[[TokenLogProbs, TokenLogProbs, jax.Array], jax.Array]

REWARDS: dict[str, RewardFn] = {
    "baseline_relative": lambda sft, ref, mask: token_rewards.baseline_relative(
        sft.logp, ref.logp, mask
    ),
    "log_likelihood": lambda sft, ref, mask: token_rewards.log_likelihood(sft.logp, mask),
    "endogenous": lambda sft, ref, mask: token_rewards.endogenous(sft.logp, sft.logsumexp, mask),
}


def make_rollout_step(
    model: Any,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    sampling: Sampling = ON_POLICY,
    reward: str | RewardFn = "baseline_relative",
    chunk_size: int = 128,
):
  """Returns jitted rollout_step(policy, sft, ref, prompts, rng) -> Rollout.

  policy, sft and ref are variables ({"params": ...} and maybe "lora") of `model`; none is
  donated. Run it under the mesh the variables live on.

  Args:
    max_new_tokens: response columns N.
    stop_ids: token ids that end a response.
    sampling: the behaviour; anything but the default biases the policy gradient.
    reward: a name in REWARDS, or a function (sft, ref, mask) -> [B, N].
    chunk_size: columns whose logits live at a time while scoring.
  """
  reward_fn = REWARDS[reward] if isinstance(reward, str) else reward
  if not stop_ids:
    raise ValueError("stop_ids is empty: a response could never end")

  @jax.jit
  def rollout_step(policy, sft, ref, prompts: PromptBatch, rng) -> Rollout:
    sample = generate(
        model,
        (policy,),
        prompts,
        rng,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        sampling=sampling,
    )

    def score(variables, with_entropy=False):
      return token_logprobs(
          model,
          variables,
          sample.tokens,
          sample.segment_ids,
          start=prompts.tokens.shape[1],
          chunk_size=chunk_size,
          with_entropy=with_entropy,
      )

    policy_out, sft_out, ref_out = score(policy, with_entropy=True), score(sft), score(ref)
    mask = sample.mask
    return Rollout(
        tokens=sample.tokens,
        segment_ids=sample.segment_ids,
        prompt_lengths=prompts.lengths,
        lengths=sample.lengths,
        hit_eos=sample.hit_eos,
        mask=mask,
        rewards=reward_fn(sft_out, ref_out, mask),
        policy_logp=policy_out.logp * mask,
        sft_logp=sft_out.logp * mask,
        ref_logp=ref_out.logp * mask,
        decode_logp=sample.logp,
        entropy=policy_out.entropy * mask,
    )

  return rollout_step
