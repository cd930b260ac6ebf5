"""Teacher-forced scores of given responses: log-probabilities and token rewards."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dpr_jax import sharding
from dpr_jax.models.logprobs import token_logprobs
from dpr_jax.rewards.references import combine_logps

_score = jax.jit(token_logprobs, static_argnums=0, static_argnames=("chunk_size",))

_LENGTH_STEP = 64  # Rows are padded to a multiple of it, so that few programs are compiled.


@dataclasses.dataclass(frozen=True)
class TokenScores:
  """Scores of one response of T tokens, EOS included. float32 [T] each, nats."""

  logp_sft: np.ndarray
  logp_ref: np.ndarray
  logsumexp_sft: np.ndarray | None = None  # V(s_t) of the state in which token t is chosen.

  @property
  def token_rewards(self) -> np.ndarray:
    """log pi_sft - log pi_ref; they sum to the log-ratio of the response."""
    return self.logp_sft - self.logp_ref


def response_logps(
    model: Any,
    variables: Any,
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    **how: Any,
) -> list[np.ndarray]:
  """log p of each token of each response, nats, float32 [T_i]; `how` as in `response_values`."""
  return [logp for logp, _ in response_values(model, variables, prompts, responses, **how)]


def response_values(
    model: Any,
    variables: Any,
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    *,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    chunk_size: int = 128,
    on_batch: Callable[[int], None] = lambda n: None,
) -> list[tuple[np.ndarray, np.ndarray]]:
  """(log p, logsumexp of the logits) of each token of each response after its prompt.

  Nats, float32 [T_i] each; the logsumexp is that of the state in which the token is chosen.

  Args:
    prompts, responses: token ids, int32; a response ends with its EOS.
    batch_size: rows scored at a time. Rows of similar length share a batch.
    chunk_size: columns whose logits live at a time.
    on_batch: called with the number of responses just scored.
  """

  def score(tokens_BxT, segment_ids_BxT):
    return _score(model, variables, tokens_BxT, segment_ids_BxT, chunk_size=chunk_size)

  scores = per_response(
      score, prompts, responses, mesh=mesh, batch_size=batch_size, on_batch=on_batch
  )
  return [(s.logp, s.logsumexp) for s in scores]


def per_response(
    score: Callable[[jax.Array, jax.Array], Any],
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    *,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda n: None,
) -> list[Any]:
  """What `score` says of each token of each response after its prompt, batch by batch.

  Args:
    score: (tokens [B, T], segment ids [B, T]) -> a tree of [B, T], aligned with the tokens.
    prompts, responses, batch_size, on_batch: as in `response_values`.

  Returns:
    The tree of each response, numpy [T_i].
  """
  rows = [np.concatenate([p, r]).astype(np.int32) for p, r in zip(prompts, responses, strict=True)]
  out: list[Any] = [None] * len(rows)
  order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # A memory error comes first.
  for start in range(0, len(rows), batch_size):
    chosen = order[start : start + batch_size]
    length = -(-len(rows[chosen[0]]) // _LENGTH_STEP) * _LENGTH_STEP
    tokens = np.zeros((batch_size, length), np.int32)
    segments = np.zeros((batch_size, length), np.int32)
    for b, i in enumerate(chosen):
      tokens[b, : len(rows[i])], segments[b, : len(rows[i])] = rows[i], 1
    tokens, segments = sharding.place((tokens, segments), mesh)
    scores = sharding.to_host(score(tokens, segments))
    for b, i in enumerate(chosen):
      span = slice(len(prompts[i]), len(rows[i]))
      out[i] = jax.tree.map(lambda x, b=b, span=span: x[b, span], scores)
    on_batch(len(chosen))
  return out


def reference_response_logps(
    model: Any, ref: Any, *rows: Sequence[np.ndarray], ensemble: str = "", **how: Any
) -> list[np.ndarray]:
  """`response_logps` under a reference: one set of variables, or a tuple of them.

  Args:
    ensemble: how the members of a tuple are combined; see `rewards.references.combine_logps`.
  """
  if not isinstance(ref, tuple):
    return response_logps(model, ref, *rows, **how)
  members = [response_logps(model, member, *rows, **how) for member in ref]
  return [np.asarray(combine_logps(np.stack(each), ensemble)) for each in zip(*members)]


def score_responses(
    model: Any,
    sft: Any,
    ref: Any,
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    *,
    ensemble: str = "",
    **how: Any,
) -> list[TokenScores]:
  """Token scores of each response under sft and ref.

  Args:
    ensemble: as in `reference_response_logps`.
    how: as in `response_values`.
  """
  under_sft = response_values(model, sft, prompts, responses, **how)
  under_ref = reference_response_logps(model, ref, prompts, responses, ensemble=ensemble, **how)
  return [TokenScores(logp, ref, lse) for (logp, lse), ref in zip(under_sft, under_ref)]


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
  """How each token reads on its own; special tokens keep their names."""
  return [
      tokenizer.decode([int(t)], skip_special_tokens=False, clean_up_tokenization_spaces=False)
      for t in tokens
  ]


def score_record(tokenizer: Any, tokens: Sequence[int], scores: TokenScores) -> dict[str, Any]:
  """The fields that `dpr_jax.score` adds to a line; JSON types."""
  rounded = lambda x: [round(float(v), 6) for v in x]
  return {
      "tokens": token_texts(tokenizer, tokens),
      "token_rewards": rounded(scores.token_rewards),
      "logp_sft": rounded(scores.logp_sft),
      "logp_ref": rounded(scores.logp_ref),
      "reward": round(float(scores.token_rewards.astype(np.float64).sum()), 6),
  }
