"""Sampling responses: prefill, then a `lax.while_loop` that stops when every row is done.

Prompts arrive left-aligned (`PromptBatch`). They are right-aligned here, once, so that
every row writes its t-th response token to the same column P + t: the cache needs one
scalar index, and the response is the static slice [:, P:] of all arrays. Padding has
segment id 0 and is never seen.

A "mixture" of models decodes too: logits = sum_i weight_i * logits_i. One member of
weight 1 is plain sampling; (sft, 1 + a), (ref, -a) is contrastive decoding at strength a.

Dims: B rows, P prompt columns, N new tokens at most, S = P + N, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpr_jax.data.batches import PromptBatch
from dpr_jax.models.transformer import init_cache
from dpr_jax.models.variables import gathered
from dpr_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn. The default is the policy itself; anything else is off-policy."""

  temperature: float = 1.0  # 0 is greedy.
  top_k: int = 0  # keep the k likeliest; 0 keeps all.
  top_p: float = 1.0  # then keep the smallest set with this probability.

  def __post_init__(self):
    if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ValueError(f"{self}: temperature >= 0, top_k >= 0 and 0 < top_p <= 1 are needed")


ON_POLICY = Sampling()


@struct.dataclass
class Generation:
  """Sampled responses behind their right-aligned prompts."""

  tokens: jax.Array  # int32 [B, S], 0 where padded.
  segment_ids: jax.Array  # int32 [B, S], 1 on prompt and response.
  lengths: jax.Array  # int32 [B], response tokens, EOS included.
  hit_eos: jax.Array  # bool [B]; False: truncated at N.
  logp: jax.Array  # float32 [B, N], at temperature 1 over the whole vocabulary; 0 past the end.

  @property
  def mask(self) -> jax.Array:
    """float32 [B, N], 1 on response tokens; made from lengths, not from ids."""
    columns_1xN = jnp.arange(self.logp.shape[1], dtype=jnp.int32)[None, :]
    return (columns_1xN < self.lengths[:, None]).astype(jnp.float32)


def filter_logits(logits_BxV: jax.Array, sampling: Sampling) -> jax.Array:
  """Logits after temperature, top-k and top-p; -inf where a token is not allowed."""
  logits_BxV = logits_BxV / sampling.temperature
  if sampling.top_k:
    k = min(sampling.top_k, logits_BxV.shape[-1])
    least = jax.lax.top_k(logits_BxV, k)[0][:, -1:]
    logits_BxV = jnp.where(logits_BxV < least, -jnp.inf, logits_BxV)
  if sampling.top_p < 1:
    sorted_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
    probs_BxV = jax.nn.softmax(sorted_BxV, axis=-1)
    before_BxV = jnp.cumsum(probs_BxV, axis=-1) - probs_BxV  # mass of likelier tokens.
    kept_BxV = jnp.where(before_BxV < sampling.top_p, sorted_BxV, jnp.inf)
    logits_BxV = jnp.where(
        logits_BxV < jnp.min(kept_BxV, axis=-1, keepdims=True), -jnp.inf, logits_BxV
    )
  return logits_BxV


def draw(logits_BxV: jax.Array, rng: jax.Array, sampling: Sampling) -> jax.Array:
  """One token a row, int32 [B]."""
  if sampling.temperature == 0:
    return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
  return jax.random.categorical(rng, filter_logits(logits_BxV, sampling), axis=-1).astype(jnp.int32)


def right_align(prompts: PromptBatch) -> tuple[jax.Array, jax.Array]:
  """Left-aligned prompts -> (tokens, segment_ids), int32 [B, P], ending in column P - 1."""
  width = prompts.tokens.shape[1]
  column_1xP = jnp.arange(width, dtype=jnp.int32)[None, :]
  source_BxP = column_1xP - (width - prompts.lengths[:, None])
  tokens_BxP = jnp.take_along_axis(prompts.tokens, jnp.maximum(source_BxP, 0), axis=1)
  inside = source_BxP >= 0
  return jnp.where(inside, tokens_BxP, 0), inside.astype(jnp.int32)


def generate(
    model: Any,
    members: Sequence[Any],
    prompts: PromptBatch,
    rng: jax.Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    sampling: Sampling = ON_POLICY,
    weights: Sequence[float] = (1.0,),
) -> Generation:
  """Samples a response to every prompt. Traceable; jit it with the keywords static.

  Args:
    members: variables of each model of the mixture (one for plain sampling).
    prompts: rows of length 0 are fillers and get an empty response.
    stop_ids: token ids that end a response; the one sampled belongs to it.
    weights: of the members' logits.
  """
  batch, width = prompts.tokens.shape
  members = tuple(gathered(model.cfg, variables) for variables in members)
  prompt_BxP, segments_BxP = right_align(prompts)
  stop_1xE = jnp.asarray(stop_ids, jnp.int32)[None, :]

  def forward(tokens, segments, caches):
    logits_BxV, new = 0.0, []
    for variables, weight, cache in zip(members, weights, caches, strict=True):
      hidden, cache = model.apply(variables, tokens, None, segments, cache)
      logits = model.apply(variables, hidden[:, -1], method="unembed")
      logits_BxV = logits_BxV + (logits if weight == 1.0 else weight * logits)
      new.append(cache)
    return constrain(logits_BxV, "batch", "vocab"), tuple(new)

  def choose(logits_BxV, step, done):
    token_B = draw(logits_BxV, jax.random.fold_in(rng, step), sampling)
    token_B = jnp.where(done, 0, token_B)
    hit = jnp.arange(logits_BxV.shape[-1], dtype=jnp.int32)[None, :] == token_B[:, None]
    logp_B = jnp.sum(jnp.where(hit, logits_BxV, 0.0), axis=-1)
    logp_B = logp_B - jax.nn.logsumexp(logits_BxV, axis=-1)
    stopped = jnp.any(token_B[:, None] == stop_1xE, axis=1) & ~done
    return token_B, jnp.where(done, 0.0, logp_B), stopped

  caches = tuple(init_cache(model.cfg, batch, width + max_new_tokens) for _ in members)
  logits_BxV, caches = forward(prompt_BxP, segments_BxP, caches)
  done = prompts.lengths == 0
  token_B, logp_B, stopped = choose(logits_BxV, 0, done)

  put = lambda buffer, column, at: jax.lax.dynamic_update_slice(
      buffer, column[:, None].astype(buffer.dtype), (0, at)
  )
  state = {
      "t": jnp.ones((), jnp.int32),
      "token": token_B,
      "alive": ~done,  # the row has a token in column t - 1.
      "done": done | stopped,
      "hit_eos": stopped,
      "tokens": put(jnp.zeros((batch, max_new_tokens), jnp.int32), token_B, 0),
      "logp": put(jnp.zeros((batch, max_new_tokens), jnp.float32), logp_B, 0),
      "lengths": (~done).astype(jnp.int32),
      "caches": caches,
  }

  def unfinished(s):
    return (s["t"] < max_new_tokens) & ~jnp.all(s["done"])

  def body(s):
    token_Bx1, alive_Bx1 = s["token"][:, None], s["alive"][:, None].astype(jnp.int32)
    logits, caches = forward(token_Bx1, alive_Bx1, s["caches"])
    token, logp, stopped = choose(logits, s["t"], s["done"])
    alive = ~s["done"]
    return {
        "t": s["t"] + 1,
        "token": token,
        "alive": alive,
        "done": s["done"] | stopped,
        "hit_eos": s["hit_eos"] | stopped,
        "tokens": put(s["tokens"], token, s["t"]),
        "logp": put(s["logp"], logp, s["t"]),
        "lengths": s["lengths"] + alive.astype(jnp.int32),
        "caches": caches,
    }

  out = jax.lax.while_loop(unfinished, body, state)
  response_BxN = jnp.arange(max_new_tokens, dtype=jnp.int32)[None, :] < out["lengths"][:, None]
  return Generation(
      tokens=jnp.concatenate([prompt_BxP, out["tokens"]], axis=1),
      segment_ids=jnp.concatenate([segments_BxP, response_BxN.astype(jnp.int32)], axis=1),
      lengths=out["lengths"],
      hit_eos=out["hit_eos"],
      logp=out["logp"],
  )
