"""How far a system is from the known expert that made the demonstrations.

Where demonstrations were sampled from a model at hand, no judge is needed: on a system's own
samples the full-vocabulary KL(system || expert) of every state, on held-out demonstrations
KL(expert || system). Summed over the states of a response both are unbiased estimates of the KL
of sequences up to the budget of tokens (its chain rule), as a rule with less variance than the
log-ratio of the sampled tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dpr_jax.evaluation.scoring import Scorer
from dpr_jax.evaluation.systems import System
from dpr_jax.models.logprobs import chunk_columns, chunk_logprobs, in_chunks, per_token


@struct.dataclass
class ExpertScores:
  """Of the state in which each token is chosen, float32 [..., T], nats; EOS has its state too."""

  reverse_kl: Any  # KL(pi_system(.|s_t) || pi_expert(.|s_t)), over the whole vocabulary.
  forward_kl: Any  # KL(pi_expert(.|s_t) || pi_system(.|s_t)).
  expert_logp: Any  # log pi_expert(y_t | s_t) of the token.


@functools.partial(
    jax.jit,
    static_argnums=(0, 1),
    static_argnames=("weights", "temperature"),
)
def score_states(
    model: Any, expert: Any, members: tuple[Any, ...], expert_variables: Any, tokens_BxT: jax.Array,
    segment_ids_BxT: jax.Array, *, weights: tuple[float, ...] = (1.0,), temperature: float = 1.0,
) -> ExpertScores:
  """Scores of every token of given rows, [B, T]; 0 where a token has no past.

  Args:
    model: of all members.
    expert: a model with the same vocabulary, of any shape.
    members: variables of a system, whose logits are sum_i weights[i] * logits_i / temperature.
    segment_ids_BxT: int32, 0 is padding.
    temperature: above 0.
  """
  hidden = lambda model, variables: model.apply(variables, tokens_BxT, None, segment_ids_BxT)[0]
  hidden_BxTxD = [hidden(model, variables) for variables in members]
  hidden_BxTxD.append(hidden(expert, expert_variables))

  def body(tokens_BxC, *hidden_BxCxD):
    *own, last = hidden_BxCxD
    logits_BxCxV = sum(
        weight * model.apply(variables, h, method="unembed")
        for weight, variables, h in zip(weights, members, own, strict=True)
    )
    expert_BxCxV = expert.apply(expert_variables, last, method="unembed")
    log_p_BxCxV = jax.nn.log_softmax(logits_BxCxV / temperature)
    logp_BxC, lse_BxC, _ = chunk_logprobs(expert_BxCxV, tokens_BxC, False)
    log_q_BxCxV = expert_BxCxV - lse_BxC[:, :, None]
    ratio_BxCxV = log_p_BxCxV - log_q_BxCxV
    return ExpertScores(
        reverse_kl=jnp.sum(jnp.exp(log_p_BxCxV) * ratio_BxCxV, axis=-1),
        forward_kl=-jnp.sum(jnp.exp(log_q_BxCxV) * ratio_BxCxV, axis=-1),
        expert_logp=logp_BxC,
    )

  columns = chunk_columns(model.cfg, tokens_BxT.shape[0], len(members) + 1)

  def score(states, chosen):
    return in_chunks(
        body, columns, tokens_BxT[:, chosen], *(h[:, states] for h in hidden_BxTxD)
    )

  return per_token(score, segment_ids_BxT)


def score_against_expert(
    scorer: Scorer, system: System, members: Sequence[Any], expert: Any,
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray],
) -> list[ExpertScores]:
  """`score_states` of each response after its prompt, numpy float32 [T_i].

  Args:
    scorer: of the system's model.
    members: variables of the system.
    expert: a `LoadedModel`.
    prompts, responses: token ids, int32; a response that was cut off has no EOS.
  """

  def score(tokens_BxT, segment_ids_BxT):
    return score_states(
        scorer.model,
        expert.model,
        tuple(members),
        expert.variables,
        tokens_BxT,
        segment_ids_BxT,
        weights=tuple(system.weights),
        temperature=system.temperature,
    )

  return scorer.per_response(score, prompts, responses)


def equal_length_logp(
    logp: Sequence[Sequence[float]], other: Sequence[Sequence[float]]
) -> np.ndarray:
  """Mean log pi_expert of the first m_i tokens of response i, nats per token, float64 [prompts].

  Args:
    logp: log pi_expert of the tokens of a system's response to each prompt.
    other: those of the system that it is compared with; m_i is the length of the shorter
      response, so that length alone cannot win. No response is empty.
  """
  pairs = zip(logp, other, strict=True)
  return np.asarray([np.mean(a[: min(len(a), len(b))]) for a, b in pairs], np.float64)
