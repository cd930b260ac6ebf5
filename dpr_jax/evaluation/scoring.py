"""Teacher-forced scores of given responses: log-probabilities and token rewards."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dpr_jax import sharding
from dpr_jax.data.text_ids import token_texts
from dpr_jax.evaluation.token_scores import TokenScores
from dpr_jax.models.logprobs import token_logprobs
from dpr_jax.references.base import Reference, combine_logps

_token_logprobs = jax.jit(token_logprobs, static_argnums=0, static_argnames="with_greedy")

_LENGTH_STEP = 64  # Rows are padded to a multiple of it, so that few programs are compiled.


def fitting(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], length: int
) -> list[int]:
  """Indices of the responses that fit into `length` tokens with their prompts."""
  pairs = enumerate(zip(prompts, responses, strict=True))
  return [i for i, (p, r) in pairs if len(p) + len(r) <= length]


@dataclasses.dataclass(frozen=True)
class Scorer:
  """Scores responses, batch by batch. Lists are in the order of the responses.

  Prompts and responses are token ids, int32; a response ends with its EOS, unless it was cut off.
  """

  model: Any
  mesh: jax.sharding.Mesh
  batch_size: int  # rows scored at a time; rows of similar length share a batch.
  on_batch: Callable[[int], None] = lambda n: None  # called with the number just scored.

  def logps(
      self, variables: Any, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]
  ) -> list[np.ndarray]:
    """log p of each token of each response after its prompt, nats, float32 [T_i]."""
    return [logp for logp, _ in self.values(variables, prompts, responses)]

  def values(self, variables: Any, prompts, responses) -> list[tuple[np.ndarray, np.ndarray]]:
    """(log p, logsumexp of the logits) of each token, nats, float32 [T_i] each.

    The logsumexp is that of the state in which the token is chosen.
    """
    score = lambda tokens, segments: _token_logprobs(self.model, variables, tokens, segments)
    return [(s.logp, s.logsumexp) for s in self.per_response(score, prompts, responses)]

  def greedy_logps(self, variables: Any, prompts, responses) -> list[tuple[np.ndarray, np.ndarray]]:
    """(log p, whether it is the argmax) of each token, float32 [T_i] each."""
    score = lambda *rows: _token_logprobs(self.model, variables, *rows, with_greedy=True)
    return [(s.logp, s.greedy) for s in self.per_response(score, prompts, responses)]

  def reference_logps(self, ref: Reference, prompts, responses) -> list[np.ndarray]:
    """`logps` under a reference."""
    members = [self.logps(member, prompts, responses) for member in ref.members]
    each_response = zip(*members, strict=True)
    return [np.asarray(combine_logps(np.stack(x), ref.combine)) for x in each_response]

  def score(self, sft: Any, ref: Reference, prompts, responses) -> list[TokenScores]:
    """Token scores of each response under sft and ref."""
    under_sft = self.values(sft, prompts, responses)
    under_ref = self.reference_logps(ref, prompts, responses)
    return [TokenScores(logp, ref, lse) for (logp, lse), ref in zip(under_sft, under_ref)]

  def per_response(
      self, score: Callable[[jax.Array, jax.Array], Any], prompts, responses
  ) -> list[Any]:
    """The output of `score` for each token of each response.

    Args:
      score: (tokens [B, T], segment ids [B, T]) -> a tree of [B, T], aligned with the tokens.

    Returns:
      The tree of each response, numpy [T_i].
    """
    pairs = zip(prompts, responses, strict=True)
    rows = [np.concatenate([p, r]).astype(np.int32) for p, r in pairs]
    out: list[Any] = [None] * len(rows)
    # The longest first: a memory error comes at once.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(rows), self.batch_size):
      chosen = order[start : start + self.batch_size]
      length = -(-len(rows[chosen[0]]) // _LENGTH_STEP) * _LENGTH_STEP
      tokens = np.zeros((self.batch_size, length), np.int32)
      segments = np.zeros((self.batch_size, length), np.int32)
      for b, i in enumerate(chosen):
        tokens[b, : len(rows[i])], segments[b, : len(rows[i])] = rows[i], 1
      scores = sharding.to_host(score(*sharding.place((tokens, segments), self.mesh)))
      for b, i in enumerate(chosen):
        span = slice(len(prompts[i]), len(rows[i]))
        out[i] = jax.tree.map(lambda x, b=b, span=span: x[b, span], scores)
      self.on_batch(len(chosen))
    return out


def score_record(tokenizer: Any, tokens: Sequence[int], scores: TokenScores) -> dict[str, Any]:
  """The fields that `dpr_jax.score` adds to a line; JSON types."""
  rounded = lambda x: [round(float(v), 6) for v in x]
  return {
      "tokens": token_texts(tokens, tokenizer),
      "token_rewards": rounded(scores.token_rewards),
      "logp_sft": rounded(scores.logp_sft),
      "logp_ref": rounded(scores.logp_ref),
      "endogenous": rounded(scores.endogenous),
      "reward": round(float(scores.token_rewards.astype(np.float64).sum()), 6),
  }
