"""The rollout step: ONE jitted program that samples and scores.

It decodes with the policy, then scores the finished tokens under sft and ref by teacher
forcing, and returns token rewards. Scoring while decoding would carry three KV caches
through a bandwidth-bound loop; teacher forcing is one parallel pass each. The policy's own
log-probs and entropy come out of decoding: another pass would only compute them twice.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpr_jax.data.batches import PromptBatch
from dpr_jax.references.base import Reference
from dpr_jax.rewards.base import RewardFn, apply_reward, check_pointwise, needs
from dpr_jax.rewards.baseline_relative import BASELINE_RELATIVE
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
  states: tuple[jax.Array, ...] | None = None  # hidden states [B, N, D]; see `scoring.Scored`.

  @property
  def response_tokens(self) -> jax.Array:
    """int32 [B, N]."""
    return self.tokens[:, -self.mask.shape[1] :]


# What may be asked of rollouts beside the rewards; fields of `Rollout`.
EXTRAS = ("expected_rewards", "sft_entropy", "ref_entropy", "states")


def make_rollout_step(
    model: Any,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    sampling: Sampling = ON_POLICY,
    reward: RewardFn = BASELINE_RELATIVE,
    extras: Collection[str] = (),
    samples_per_prompt: int = 1,
    slots: int = 0,
    refill: float = 0.125,
    rescore: bool = False,
) -> Callable[..., Rollout]:
  """Returns jitted rollout_step(policy, sft, ref, prompts, rng) -> Rollout.

  policy, sft and ref are variables ({"params": ...} and maybe "lora") of `model`; none is
  donated. `ref` may be a `references.Reference` of several models. Run it under the mesh the
  variables live on.

  Args:
    max_new_tokens: response columns N.
    stop_ids: token ids that end a response.
    sampling: the behavior; anything but the default biases the policy gradient.
    reward: a function of the scores that its parameters name; see `rewards.base`.
    extras: of EXTRAS, what else to compute; expected rewards score the policy, too, over the
      whole vocabulary.
    samples_per_prompt: responses per prompt, in adjacent rows; `prompts` has each prompt once.
    slots, refill: see `generate`.
    rescore: policy_logp and entropy by teacher forcing, one more pass, instead of as decoded.

  Raises:
    ValueError: no stop_ids; a reward that asks for what is no score, or one without an exact
      expectation whose expectation is wanted; an unknown extra.
  """
  if not stop_ids:
    raise ValueError("stop_ids is empty: a response could never end")
  if unknown := set(extras) - set(EXTRAS):
    raise ValueError(f"extras: {min(unknown)!r} is not one of {', '.join(EXTRAS)}")
  asked = needs(reward)
  expected = "expected_rewards" in extras
  if expected:
    check_pointwise(reward)
  entropies = bool({"sft_entropy", "ref_entropy"} & {*asked, *extras})

  @jax.jit
  def rollout_step(policy, sft, ref, prompts: PromptBatch, rng) -> Rollout:
    sample = generate(
        model, (policy,), prompts, rng, max_new_tokens=max_new_tokens, stop_ids=stop_ids,
        sampling=sampling, samples_per_prompt=samples_per_prompt, slots=slots, refill=refill,
        with_entropy=not (rescore or expected),
    )
    scores, rescored, expected_BxN, states = score_response(
        model, policy=policy if rescore or expected else None, sft=sft, ref=Reference.of(ref),
        tokens_BxS=sample.tokens, segment_ids_BxS=sample.segment_ids, start=prompts.tokens.shape[1],
        entropies=entropies, expected=reward if expected else None,
        keep_states="states" in extras,
    )
    mask = sample.mask
    policy_logp = sample.logp if rescored is None else rescored.logp * mask
    masked = lambda name, x: x * mask if name in extras else None
    return Rollout(
        tokens=sample.tokens,
        segment_ids=sample.segment_ids,
        prompt_lengths=jnp.repeat(prompts.lengths, samples_per_prompt),
        lengths=sample.lengths,
        hit_eos=sample.hit_eos,
        mask=mask,
        rewards=apply_reward(reward, scores.replace(policy_logp=policy_logp, mask=mask)),
        policy_logp=policy_logp,
        sft_logp=scores.sft_logp * mask,
        ref_logp=scores.ref_logp * mask,
        entropy=sample.entropy if rescored is None else rescored.entropy * mask,
        decode_steps=sample.steps,
        expected_rewards=masked("expected_rewards", expected_BxN),
        sft_entropy=masked("sft_entropy", scores.sft_entropy),
        ref_entropy=masked("ref_entropy", scores.ref_entropy),
        states=states,
    )

  return rollout_step
