"""Log-probabilities of tokens from hidden states: the one place of the shift by one.

The state in which token t is chosen is summarised by the hidden state of column t - 1.
Everything returned here is aligned with the chosen token, column t, so masks never
shift. [B, T, V] in float32 never exists: columns go through the head in chunks, and
the backward pass recomputes a chunk's logits from its hidden states.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpr_jax.models.config import ModelConfig
from dpr_jax.models.embedding import logits_axes
from dpr_jax.sharding import batch_ways, constrain, vocab_ways


@struct.dataclass
class TokenLogProbs:
  """Per token of columns [start, T), float32 [B, T - start]; 0 where a token has no past.

  All at temperature 1 over the whole vocabulary.
  """

  logp: jax.Array  # log p(token_t | tokens before it in its segment), nats.
  logsumexp: jax.Array  # V(s_t): logsumexp of the logits from which token t is chosen.
  entropy: jax.Array | None  # of that distribution, nats, without gradient; None unless asked for.
  greedy: jax.Array | None = None  # 1 where the token is the argmax (the first of equals), else 0.


def chunk_logprobs(logits_BxCxV: jax.Array, targets_BxC: jax.Array, with_entropy: bool,
                   with_greedy: bool = False):
  """(logp, logsumexp, entropy or None) of one chunk, float32 [B, C] each; greedy if asked for."""
  axes = logits_axes(*logits_BxCxV.shape)
  logits_BxCxV, targets_BxC = constrain(logits_BxCxV, *axes), constrain(targets_BxC, *axes[:2])
  vocab_1x1xV = jnp.arange(logits_BxCxV.shape[-1], dtype=targets_BxC.dtype)[None, None, :]
  # A where-sum, not a gather: it stays local on a head that is split over the vocabulary.
  hit_BxCxV = vocab_1x1xV == targets_BxC[:, :, None]
  target_BxC = jnp.sum(jnp.where(hit_BxCxV, logits_BxCxV, 0.0), axis=-1)
  lse_BxC = jax.nn.logsumexp(logits_BxCxV, axis=-1)
  entropy_BxC = None
  if with_entropy:
    # From log p, not as lse - sum(p * logits): that cancels where logits are large.
    log_p_BxCxV = jax.lax.stop_gradient(logits_BxCxV - lse_BxC[:, :, None])
    entropy_BxC = -jnp.sum(jnp.exp(log_p_BxCxV) * log_p_BxCxV, axis=-1)
  if not with_greedy:
    return target_BxC - lse_BxC, lse_BxC, entropy_BxC
  # Any token that an argmax prefers: local, too, unlike the argmax itself.
  target_BxCx1 = target_BxC[:, :, None]
  equal_BxCxV = (logits_BxCxV == target_BxCx1) & (vocab_1x1xV < targets_BxC[:, :, None])
  greedy_BxC = ~jnp.any((logits_BxCxV > target_BxCx1) | equal_BxCxV, axis=-1)
  return target_BxC - lse_BxC, lse_BxC, entropy_BxC, greedy_BxC.astype(jnp.float32)


def chunk_log_softmax(logits_BxCxV: jax.Array) -> jax.Array:
  """log p of every token of the vocabulary, float32 [B, C, V], split as the logits are."""
  logits_BxCxV = constrain(logits_BxCxV, *logits_axes(*logits_BxCxV.shape))
  return logits_BxCxV - jax.nn.logsumexp(logits_BxCxV, axis=-1, keepdims=True)


def hidden_logprobs(
    unembed: Callable[[jax.Array], jax.Array],
    hidden_BxTxD: jax.Array,
    targets_BxT: jax.Array,
    *,
    chunk_size: int,
    with_entropy: bool = False,
    with_greedy: bool = False,
) -> tuple[jax.Array | None, ...]:
  """(logp, logsumexp, entropy) of targets, float32 [B, T]; hidden[:, t] predicts targets[:, t].

  Args:
    unembed: hidden [B, C, D] -> logits float32 [B, C, V].
    chunk_size: columns whose logits live at a time; memory is about 3 * B * chunk * V * 4 bytes.
  """
  body = jax.checkpoint(lambda h, y: chunk_logprobs(unembed(h), y, with_entropy, with_greedy))
  return in_chunks(body, chunk_size, hidden_BxTxD, targets_BxT)


def in_chunks(body: Callable[..., Any], chunk_size: int, *arrays_BxT: jax.Array) -> Any:
  """body(*arrays) over chunks of columns, one after the other.

  Args:
    body: [B, C, ...] each -> a tree of [B, C].
    arrays_BxT: [B, T, ...].

  Returns:
    The tree, [B, T].
  """
  batch, length = arrays_BxT[0].shape[:2]
  if length <= chunk_size:
    return body(*arrays_BxT)
  chunks = -(-length // chunk_size)
  # Even chunks: 130 columns at chunk_size 128 are 2 x 65, not 128 + 2 padded to 256.
  size = -(-length // chunks)
  pad = chunks * size - length

  def split(x):  # [B, T, ...] -> [chunks, B, size, ...]
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, chunks, size, *x.shape[2:]), 1, 0)

  _, out = jax.lax.scan(lambda carry, xs: (carry, body(*xs)), None, tuple(map(split, arrays_BxT)))
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, chunks * size)[:, :length]
  return jax.tree.map(join, out)


def per_token(
    score: Callable[[slice, slice], Any], segment_ids_BxT: jax.Array, start: int = 0
) -> Any:
  """The output of `score` for the state in which each token is chosen, aligned with that token.

  Args:
    score: (columns of the states, columns of the tokens chosen in them) -> a tree of [B, columns].
    segment_ids_BxT: 0 padding, 1, 2, ... packed rows.
    start: first column of a token that is wanted.

  Returns:
    The tree, [B, T - start]; 0 where a token opens its segment or is padding.
  """
  first = max(start, 1)
  out = score(slice(first - 1, -1), slice(first, None))
  has_past = (segment_ids_BxT[:, first:] == segment_ids_BxT[:, first - 1 : -1]) & (
      segment_ids_BxT[:, first:] != 0
  )
  out = jax.tree.map(lambda x: jnp.where(has_past, x, 0.0), out)
  if start == 0:
    out = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (1, 0))), out)
  return out


def chunk_columns(cfg: ModelConfig, rows: int, models: int = 1) -> int:
  """Token columns whose logits fit `cfg.logits_budget` on every device; at least 1.

  A chunk of the backward pass holds about three float32 arrays [rows, columns, V]: logits,
  probabilities and their gradient. On the mesh that is set, rows are split over data and fsdp and
  the vocabulary over tensor, where they divide; or rows over data alone and the vocabulary over
  the other two, which takes as much memory.

  Args:
    rows: of the batch (of the micro-batch under accumulation), over all devices.
    models: how many models' logits live at once.
  """
  ways = batch_ways()
  rows = models * (rows // ways if rows % ways == 0 else rows)
  vocab = cfg.vocab_size // vocab_ways(cfg.vocab_size)
  return max(1, int(cfg.logits_budget * 2**30) // (3 * 4 * rows * vocab))


def token_logprobs(
    model: Any,
    variables: Any,
    tokens_BxT: jax.Array,
    segment_ids_BxT: jax.Array | None = None,
    positions_BxT: jax.Array | None = None,
    *,
    start: int = 0,
    with_entropy: bool = False,
    with_greedy: bool = False,
    rngs: Any = None,
) -> TokenLogProbs:
  """Teacher-forced log-probabilities of the tokens in columns [start, T) of each row.

  Args:
    model: a `Transformer` or anything with its `cfg`, `apply` and `unembed`.
    variables: {"params": ...} (and "lora").
    segment_ids_BxT: 0 padding, 1, 2, ... packed rows; by default all 1.
    start: first column wanted. A rollout passes its prompt length, so that the head never
      sees prompt columns.
    with_entropy: also the entropy of each distribution (one more pass over the logits).
    with_greedy: also whether each token is the argmax.

  Returns:
    `TokenLogProbs` of shape [B, T - start]. A token that opens its segment (column 0, or
    the first of a packed row) has no past: all its values are 0.
  """
  if segment_ids_BxT is None:
    segment_ids_BxT = jnp.ones_like(tokens_BxT)
  hidden_BxTxD, _ = model.apply(variables, tokens_BxT, positions_BxT, segment_ids_BxT, rngs=rngs)
  unembed = lambda h: model.apply(variables, h, method="unembed")

  def score(states, chosen):
    return hidden_logprobs(
        unembed,
        hidden_BxTxD[:, states],
        tokens_BxT[:, chosen],
        chunk_size=chunk_columns(model.cfg, tokens_BxT.shape[0]),
        with_entropy=with_entropy,
        with_greedy=with_greedy,
    )

  return TokenLogProbs(*per_token(score, segment_ids_BxT, start))
