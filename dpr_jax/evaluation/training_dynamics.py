"""What other ways to find wrong labels make of a language model, a token being a label.

    margins       logit of the token minus the largest other logit; their mean over the checkpoints
                  of a training run is the area under the margin (AUM; Pleiss et al. 2020,
                  arXiv 2001.10528)
    forgetting    how often a token that was the argmax is not at the next checkpoint; one that
                  never was counts as forgotten each time (Toneva et al. 2019, arXiv 1812.05159)
    confidence    whether confident learning counts a token off the diagonal of its confident joint
                  (Northcutt et al. 2021, arXiv 1911.00068): among the classes k with p_k >= t_k,
                  t_k the mean of p_k over the tokens labelled k, the likeliest is another one

The first two are measured on what a model is trained on, the last on what it is not.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpr_jax.models.embedding import logits_axes
from dpr_jax.models.logprobs import chunk_columns, in_chunks, per_token
from dpr_jax.sharding import constrain


def _per_token(model, variables, tokens_BxT, segment_ids_BxT, of_logits):
  """of_logits(logits [B, C, V], targets [B, C]) of each token, [B, T]; in chunks of columns."""
  hidden_BxTxD, _ = model.apply(variables, tokens_BxT, None, segment_ids_BxT)

  def body(hidden_BxCxD, targets_BxC):
    logits_BxCxV = model.apply(variables, hidden_BxCxD, method="unembed")
    axes = logits_axes(*logits_BxCxV.shape)
    return of_logits(constrain(logits_BxCxV, *axes), constrain(targets_BxC, *axes[:2]))

  def score(states, chosen):
    size = chunk_columns(model.cfg, tokens_BxT.shape[0])
    return in_chunks(body, size, hidden_BxTxD[:, states], tokens_BxT[:, chosen])

  return per_token(score, segment_ids_BxT)


def _is_target(logits_BxCxV, targets_BxC):
  vocab_1x1xV = jnp.arange(logits_BxCxV.shape[-1], dtype=targets_BxC.dtype)[None, None, :]
  return vocab_1x1xV == targets_BxC[:, :, None]


def token_margins(model: Any, variables: Any, tokens_BxT, segment_ids_BxT) -> jax.Array:
  """Logit of each token minus the largest of the others, float32 [B, T]; 0 without a past."""

  def margin(logits_BxCxV, targets_BxC):
    hit_BxCxV = _is_target(logits_BxCxV, targets_BxC)
    own_BxC = jnp.sum(jnp.where(hit_BxCxV, logits_BxCxV, 0.0), axis=-1)
    return own_BxC - jnp.max(jnp.where(hit_BxCxV, -jnp.inf, logits_BxCxV), axis=-1)

  return _per_token(model, variables, tokens_BxT, segment_ids_BxT, margin)


def off_diagonal(
    model: Any, variables: Any, tokens_BxT, segment_ids_BxT, thresholds_V: jax.Array
) -> jax.Array:
  """1 where a token is counted off the diagonal of the confident joint, else 0, float32 [B, T].

  Args:
    thresholds_V: see `class_thresholds`.
  """

  def flagged(logits_BxCxV, targets_BxC):
    p_BxCxV = jax.nn.softmax(logits_BxCxV, axis=-1)
    hit_BxCxV = _is_target(logits_BxCxV, targets_BxC)
    # The only token of its label has its own threshold: rounding must not decide.
    confident_BxCxV = p_BxCxV >= (1.0 - 1e-5) * thresholds_V[None, None, :]
    best = lambda of: jnp.max(jnp.where(of & confident_BxCxV, p_BxCxV, 0.0), axis=-1)
    return (best(~hit_BxCxV) > best(hit_BxCxV)).astype(jnp.float32)

  return _per_token(model, variables, tokens_BxT, segment_ids_BxT, flagged)


def class_thresholds(
    tokens: Sequence[np.ndarray], logps: Sequence[np.ndarray], vocab_size: int
) -> np.ndarray:
  """The mean probability of the tokens that are k, for each k; float32 [V], inf where none is.

  Args:
    tokens, logps: of the trained tokens of each response, int [T_i] and nats [T_i].
  """
  labels, p = np.concatenate(tokens), np.exp(np.concatenate(logps).astype(np.float64))
  number = np.bincount(labels, minlength=vocab_size)
  total = np.bincount(labels, weights=p, minlength=vocab_size)
  return np.where(number > 0, total / np.maximum(number, 1), np.inf).astype(np.float32)


def forgotten(margins_CxT: np.ndarray) -> float:
  """How often tokens are forgotten over C checkpoints: the sum over the tokens of a response."""
  right_CxT = margins_CxT > 0
  events_T = np.sum(right_CxT[:-1] & ~right_CxT[1:], axis=0)
  return float(np.where(right_CxT.any(axis=0), events_T, len(margins_CxT)).sum())
