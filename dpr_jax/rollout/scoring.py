"""Teacher-forced scores of sampled responses under sft, ref and, where needed, the policy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpr_jax.models.logprobs import TokenLogProbs, chunk_logprobs, in_chunks
from dpr_jax.rewards.references import combine_logps


@struct.dataclass
class ResponseScores:
  """Of the response columns, float32 [B, N] each; what stands outside of responses is finite."""

  sft: TokenLogProbs
  ref: TokenLogProbs  # of an ensemble: logp combined, logsumexp 0, entropy the members' mean.
  policy: TokenLogProbs | None
  expected: jax.Array  # E_{a ~ policy} r(s_t, a), nats; 0 unless asked for.


def score_response(
    model: Any,
    *,
    sft: Any,
    refs: tuple[Any, ...],
    policy: Any | None,
    tokens_BxS: jax.Array,
    segment_ids_BxS: jax.Array,
    start: int,
    chunk_size: int,
    full_reward: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    entropies: bool = False,
    combine: str = "logmeanexp",
) -> ResponseScores:
  """Scores columns [start, S) without gradient memory.

  Models are scored one after the other, so that the logits of one chunk of one model live at a
  time; with `full_reward` those of one chunk of all models do.

  Args:
    policy: variables, to be scored with its entropy; None leaves it out.
    full_reward: (log_sft, log_ref), [B, C, V] each -> the reward of every token [B, C, V]; asks
      for its expectation under the policy.
    entropies: of sft and ref as well.
    combine: see `rewards.references.combine_logps`.
  """
  members = {"sft": sft, **{f"ref_{i}": ref for i, ref in enumerate(refs)}}
  if policy is not None:
    members["policy"] = policy
  wants_entropy = lambda name: name == "policy" or entropies
  targets_BxN = tokens_BxS[:, start:]

  def hidden(variables):
    hidden_BxSxD, _ = model.apply(variables, tokens_BxS, None, segment_ids_BxS)
    return hidden_BxSxD[:, start - 1 : -1]

  def logits(name, hidden_BxCxD):
    return model.apply(members[name], hidden_BxCxD, method="unembed")

  expected_BxN = jnp.zeros(targets_BxN.shape, jnp.float32)
  if full_reward is None:
    scores = {}
    for name, variables in members.items():
      body = lambda y, h, name=name: chunk_logprobs(logits(name, h), y, wants_entropy(name))
      scores[name] = in_chunks(body, chunk_size, targets_BxN, hidden(variables))
  else:

    def together(y_BxC, *hidden_BxCxD):
      out, log_p = {}, {}
      for name, h in zip(members, hidden_BxCxD, strict=True):
        logits_BxCxV = logits(name, h)
        out[name] = chunk_logprobs(logits_BxCxV, y_BxC, wants_entropy(name))
        log_p[name] = logits_BxCxV - out[name][1][:, :, None]
      log_ref = combine_logps(jnp.stack([log_p[f"ref_{i}"] for i in range(len(refs))]), combine)
      reward_BxCxV = full_reward(log_p["sft"], log_ref)
      return out, jnp.sum(jnp.exp(log_p["policy"]) * reward_BxCxV, axis=-1)

    states = [hidden(variables) for variables in members.values()]
    scores, expected_BxN = in_chunks(together, chunk_size, targets_BxN, *states)

  scores = {name: TokenLogProbs(*x) for name, x in scores.items()}
  ref = scores["ref_0"]
  if len(refs) > 1:
    of_refs = [scores[f"ref_{i}"] for i in range(len(refs))]
    ref = TokenLogProbs(
        logp=combine_logps(jnp.stack([x.logp for x in of_refs]), combine),
        logsumexp=jnp.zeros_like(ref.logsumexp),
        entropy=sum(x.entropy for x in of_refs) / len(refs),
    )
  return ResponseScores(
      sft=scores["sft"], ref=ref, policy=scores.get("policy"), expected=expected_BxN
  )
