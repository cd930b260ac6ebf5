"""The rollout step: ONE jitted program that samples and scores.

It decodes with the policy, then scores the finished tokens under sft and ref by teacher
forcing, and returns token rewards. Scoring while decoding would carry three KV caches
through a bandwidth-bound loop; teacher forcing is one parallel pass each. The policy's own
log-probs and entropy come out of decoding: another pass would only compute them twice.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpr_jax.data.batches import PromptBatch
from dpr_jax.models.logprobs import TokenLogProbs
from dpr_jax.rewards import token_rewards
from dpr_jax.rollout.sampler import generate
from dpr_jax.rollout.sampling import ON_POLICY, Sampling
from dpr_jax.rollout.scoring import score_response


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
  policy_logp: jax.Array  # float32 [B, N], as decoded, or scored again by teacher forcing.
  sft_logp: jax.Array  # float32 [B, N].
  ref_logp: jax.Array  # float32 [B, N].
  entropy: jax.Array  # float32 [B, N], of the policy, nats.
  decode_steps: jax.Array  # int32 [], forward passes of the decoding batch.
  # Where asked for:
  expected_rewards: jax.Array | None = None  # float32 [B, N], E_{a ~ policy} r(s_t, a), exact.
  sft_entropy: jax.Array | None = None  # float32 [B, N], nats.
  ref_entropy: jax.Array | None = None  # float32 [B, N].

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

# The same rewards as functions of the log-probs of every token of the vocabulary, for their
# expectation. The endogenous one of token a needs the value of the state that a leads to.
FULL_REWARDS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "baseline_relative": lambda log_sft, log_ref: log_sft - log_ref,
    "log_likelihood": lambda log_sft, log_ref: log_sft,
}


def make_rollout_step(
    model: Any,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    sampling: Sampling = ON_POLICY,
    reward: str | RewardFn = "baseline_relative",
    chunk_size: int = 128,
    samples_per_prompt: int = 1,
    slots: int = 0,
    refill: float = 0.125,
    rescore: bool = False,
    expected: bool = False,
    entropies: bool = False,
    combine: str = "logmeanexp",
):
  """Returns jitted rollout_step(policy, sft, ref, prompts, rng) -> Rollout.

  policy, sft and ref are variables ({"params": ...} and maybe "lora") of `model`; none is
  donated. `ref` may be a tuple of variables, an ensemble. Run it under the mesh the variables
  live on.

  Args:
    max_new_tokens: response columns N.
    stop_ids: token ids that end a response.
    sampling: the behaviour; anything but the default biases the policy gradient.
    reward: a name in REWARDS, or a function (sft, ref, mask) -> [B, N].
    chunk_size: columns whose logits live at a time while scoring.
    samples_per_prompt: responses a prompt, in adjacent rows; `prompts` has each prompt once.
    slots, refill: see `generate`.
    rescore: policy_logp and entropy by teacher forcing, one more pass, instead of as decoded.
    expected: also expected_rewards; scores the policy, too, over the whole vocabulary.
    entropies: also sft_entropy and ref_entropy.
    combine: of an ensemble's log-probs; see `rewards.references`.

  Raises:
    ValueError: no stop_ids; or `expected` of a reward that has no exact expectation.
  """
  reward_fn = REWARDS[reward] if isinstance(reward, str) else reward
  if not stop_ids:
    raise ValueError("stop_ids is empty: a response could never end")
  if expected and reward not in FULL_REWARDS:
    raise ValueError(f"reward={reward!r} has no exact expectation; known: "
                     f"{', '.join(FULL_REWARDS)}")

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
        samples_per_prompt=samples_per_prompt,
        slots=slots,
        refill=refill,
        with_entropy=not (rescore or expected),
    )
    scores = score_response(
        model,
        sft=sft,
        refs=ref if isinstance(ref, tuple) else (ref,),
        policy=policy if rescore or expected else None,
        tokens_BxS=sample.tokens,
        segment_ids_BxS=sample.segment_ids,
        start=prompts.tokens.shape[1],
        chunk_size=chunk_size,
        full_reward=FULL_REWARDS[reward] if expected else None,
        entropies=entropies,
        combine=combine,
    )
    mask, by_decoding = sample.mask, scores.policy is None
    return Rollout(
        tokens=sample.tokens,
        segment_ids=sample.segment_ids,
        prompt_lengths=jnp.repeat(prompts.lengths, samples_per_prompt),
        lengths=sample.lengths,
        hit_eos=sample.hit_eos,
        mask=mask,
        rewards=reward_fn(scores.sft, scores.ref, mask),
        policy_logp=sample.logp if by_decoding else scores.policy.logp * mask,
        sft_logp=scores.sft.logp * mask,
        ref_logp=scores.ref.logp * mask,
        entropy=sample.entropy if by_decoding else scores.policy.entropy * mask,
        decode_steps=sample.steps,
        expected_rewards=scores.expected * mask if expected else None,
        sft_entropy=scores.sft.entropy * mask if entropies else None,
        ref_entropy=scores.ref.entropy * mask if entropies else None,
    )

  return rollout_step
