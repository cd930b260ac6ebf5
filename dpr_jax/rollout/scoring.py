"""Teacher-forced scores of sampled responses under sft, ref and, where needed, the policy."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpr_jax.models.logprobs import TokenLogProbs, chunk_columns, chunk_logprobs, in_chunks
from dpr_jax.references.base import Reference, combine_logps
from dpr_jax.rewards.base import RewardFn, Scores, check_pointwise, needs


class Scored(NamedTuple):
  """What `score_response` says of N response columns; None: not asked for."""

  scores: Scores  # without a mask.
  policy: TokenLogProbs | None
  expected: jax.Array | None  # E_{a ~ policy} r(s_t, a), float32 [B, N], nats.
  # Of sft and of each member of ref, in the compute dtype [B, N, D]: the hidden state in which each
  # token is chosen.
  states: tuple[jax.Array, ...] | None


def score_response(
    model: Any, *, policy: Any | None, sft: Any, ref: Reference, tokens_BxS: jax.Array,
    segment_ids_BxS: jax.Array, start: int, entropies: bool = False,
    expected: RewardFn | None = None, keep_states: bool = False,
) -> Scored:
  """Scores columns [start, S) without gradient memory.

  Models are scored one after the other, so that the logits of one chunk of one model live at a
  time; for an expectation those of one chunk of all models do.

  Args:
    policy: variables, to be scored with its entropy; None leaves it out.
    entropies: of sft and ref as well.
    expected: a pointwise reward whose expectation under the policy is wanted.
    keep_states: return the hidden states of sft and ref, from which a train step makes their
      logits over the whole vocabulary without another pass of either.

  Returns:
    float32 [B, N], finite outside of the responses.
  """
  of_ref = {f"ref_{i}": member for i, member in enumerate(ref.members)}
  members = {"sft": sft, **of_ref}
  if policy is not None:
    members["policy"] = policy
  with_entropy = lambda name: name == "policy" or entropies
  targets_BxN = tokens_BxS[:, start:]

  def hidden(variables):
    hidden_BxSxD, _ = model.apply(variables, tokens_BxS, None, segment_ids_BxS)
    return hidden_BxSxD[:, start - 1 : -1]

  def logits(name, hidden_BxCxD):
    return model.apply(members[name], hidden_BxCxD, method="unembed")

  columns = lambda models: chunk_columns(model.cfg, tokens_BxS.shape[0], models)
  expected_BxN, states = None, []
  if expected is None:
    found = {}
    for name, variables in members.items():
      body = lambda y, h, name=name: chunk_logprobs(logits(name, h), y, with_entropy(name))
      state_BxNxD = hidden(variables)
      found[name] = in_chunks(body, columns(1), targets_BxN, state_BxNxD)
      if keep_states:
        states.append(state_BxNxD)
  else:
    check_pointwise(expected)

    def together(y_BxC, *hidden_BxCxD):
      out, log_p = {}, {}
      for name, h in zip(members, hidden_BxCxD, strict=True):
        logits_BxCxV = logits(name, h)
        out[name] = chunk_logprobs(logits_BxCxV, y_BxC, with_entropy(name))
        log_p[name] = logits_BxCxV - out[name][1][:, :, None]
      log_p["ref"] = combine_logps(jnp.stack([log_p[name] for name in of_ref]), ref.combine)
      reward_BxCxV = expected(**{n: log_p[n.removesuffix("_logp")] for n in needs(expected)})
      return out, jnp.sum(jnp.exp(log_p["policy"]) * reward_BxCxV, axis=-1)

    states = [hidden(variables) for variables in members.values()]
    found, expected_BxN = in_chunks(together, columns(len(members)), targets_BxN, *states)

  states = tuple(states[: 1 + len(of_ref)]) if keep_states else None
  found = {name: TokenLogProbs(*x) for name, x in found.items()}
  refs = [found[name] for name in of_ref]
  policy_scores = found.get("policy")
  scores = Scores(
      sft_logp=found["sft"].logp,
      sft_logsumexp=found["sft"].logsumexp,
      sft_entropy=found["sft"].entropy,
      ref_logp=combine_logps(jnp.stack([x.logp for x in refs]), ref.combine),
      ref_entropy=sum(x.entropy for x in refs) / len(refs) if entropies else None,
      policy_logp=None if policy_scores is None else policy_scores.logp,
  )
  return Scored(scores, policy_scores, expected_BxN, states)
