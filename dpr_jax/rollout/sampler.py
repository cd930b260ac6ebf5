"""Sampling responses: one prefill, then decoding until every row is done.

Prompts arrive left-aligned (`PromptBatch`) and are right-aligned here, once. Padding has
segment id 0 and is never seen. Each prompt is prefilled once, however many samples it gets.

Plain batch: every row has a slot of the decoding batch, and the loop ends with the longest
response. With fewer `slots` than rows, a slot whose response has ended is given the next row
(continuous batching): the loop stops as soon as enough slots are idle, copies the prompts of
waiting rows from the prefill into the cache, and goes on. All of it is one program of static
shapes, without a word to the host. A row's tokens depend on its own key only, so both ways
draw the same responses.

A "mixture" of models decodes too: logits = sum_i weight_i * logits_i. One member of
weight 1 is plain sampling; (sft, 1 + a), (ref, -a) is contrastive decoding at strength a.

Dims: G prompts, B = G * samples_per_prompt rows, K slots, P prompt columns, N new tokens at
most, V vocabulary, L lanes: groups of rows and slots that lie on the same devices.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpr_jax.data.batches import PromptBatch
from dpr_jax.models import cache as cache_lib
from dpr_jax.models import unrolled
from dpr_jax.models.variables import gathered
from dpr_jax.rollout.drawing import ON_POLICY, Sampling, draw
from dpr_jax.sharding import batch_ways, constrain


@struct.dataclass
class Generation:
  """Sampled responses behind their right-aligned prompts."""

  tokens: jax.Array  # int32 [B, P + N], 0 where padded.
  segment_ids: jax.Array  # int32 [B, P + N], 1 on prompt and response.
  lengths: jax.Array  # int32 [B], response tokens, EOS included.
  hit_eos: jax.Array  # bool [B]; False: truncated at N.
  logp: jax.Array  # float32 [B, N], at temperature 1 over the whole vocabulary; 0 past the end.
  entropy: jax.Array  # float32 [B, N], of that distribution, nats; 0 unless asked for.
  steps: jax.Array  # int32 [], forward passes of the decoding batch.

  @property
  def mask(self) -> jax.Array:
    """float32 [B, N], 1 on response tokens; made from lengths, not from ids."""
    columns_1xN = jnp.arange(self.logp.shape[1], dtype=jnp.int32)[None, :]
    return (columns_1xN < self.lengths[:, None]).astype(jnp.float32)


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
    samples_per_prompt: int = 1,
    slots: int = 0,
    refill: float = 0.125,
    with_entropy: bool = False,
) -> Generation:
  """Samples responses to every prompt. Traceable; jit it with the keywords static.

  Args:
    members: variables of each model of the mixture (one for plain sampling).
    prompts: G rows; a row of length 0 is a filler and gets an empty response.
    rng: row b draws its j-th token with the key fold_in(fold_in(rng, b), j).
    stop_ids: token ids that end a response; the one sampled belongs to it.
    weights: of the members' logits.
    samples_per_prompt: responses a prompt, in adjacent rows: row b answers prompt
      b // samples_per_prompt.
    slots: rows decoded at a time; 0 decodes all at once.
    refill: share of the slots that must have ended before waiting rows take their place.
      A refill costs about as much as one or two steps.
    with_entropy: also the entropy of every distribution drawn from.
  """
  members = tuple(gathered(model.cfg, variables) for variables in members)
  prompt_GxP, segments_GxP = right_align(prompts)
  groups, width = prompt_GxP.shape
  rows = groups * samples_per_prompt
  slots = min(slots or rows, rows)
  queued = slots < rows
  lanes = batch_ways()
  if not queued or slots % lanes or groups % lanes:
    lanes = 1
  stop_1xE = jnp.asarray(stop_ids, jnp.int32)[None, :]
  key_of = jax.vmap(lambda row, j: jax.random.fold_in(jax.random.fold_in(rng, row), j))

  def choose(hidden, row_K, age_K):
    """(token, logp, entropy) of every slot from the last hidden state of each member."""
    logits_KxV = 0.0
    for variables, weight, hidden_KxD in zip(members, weights, hidden, strict=True):
      logits = model.apply(variables, hidden_KxD, method="unembed")
      logits_KxV = logits_KxV + (logits if weight == 1.0 else weight * logits)
    logits_KxV = constrain(logits_KxV, "batch", "vocab")
    token_K = draw(logits_KxV, key_of(row_K, age_K), sampling)
    hit_KxV = jnp.arange(logits_KxV.shape[-1], dtype=jnp.int32)[None, :] == token_K[:, None]
    lse_K = jax.nn.logsumexp(logits_KxV, axis=-1)
    logp_K = jnp.sum(jnp.where(hit_KxV, logits_KxV, 0.0), axis=-1) - lse_K
    entropy_K = jnp.zeros_like(logp_K)
    if with_entropy:
      log_p_KxV = logits_KxV - lse_K[:, None]
      entropy_K = -jnp.sum(jnp.exp(log_p_KxV) * log_p_KxV, axis=-1)
    return token_K, logp_K, entropy_K

  by_lane = lambda x: x.reshape(lanes, x.shape[0] // lanes, *x.shape[1:])
  # The first row of the lane of each slot.
  base_K = jnp.repeat(jnp.arange(lanes, dtype=jnp.int32) * (rows // lanes), slots // lanes)

  def write(out_BxN, value_K, s, who):
    """One value a slot of `who`, to the column of its age in its row."""
    if not queued:  # All slots are at the same age.
      column_K = jnp.where(who, value_K, -1 if out_BxN.dtype == jnp.int32 else 0.0)
      return jax.lax.dynamic_update_slice_in_dim(out_BxN, column_K[:, None], s["steps"], 1)
    put = lambda out, row, age, value: out.at[row, age].set(
        value, mode="drop", unique_indices=True
    )
    age_K = jnp.where(who, s["age"], max_new_tokens)  # Past the last column: dropped.
    out = jax.vmap(put)(*map(by_lane, (out_BxN, s["row"] - base_K, age_K, value_K)))
    return constrain(out.reshape(out_BxN.shape), "batch", None)

  def record(s, who, token_K, logp_K, entropy_K):
    """The state after drawing a token for the slots of `who`."""
    s = dict(s)
    for name, value in (("tokens", token_K), ("logp", logp_K), ("entropy", entropy_K)):
      s[name] = write(s[name], value, s, who)
    stopped = jnp.any(token_K[:, None] == stop_1xE, axis=1)
    s["token"] = jnp.where(who, token_K, s["token"])
    s["age"] = s["age"] + who
    s["alive"] = jnp.where(who, ~stopped & (s["age"] < max_new_tokens), s["alive"])
    return s

  def step(s):
    """Feeds the last token of every slot that goes on, and draws the next."""
    token_Kx1 = jnp.where(s["alive"], s["token"], 0)[:, None]
    alive_Kx1 = s["alive"].astype(jnp.int32)[:, None]
    hidden, caches = [], []
    for variables, cache in zip(members, s["caches"], strict=True):
      hidden_Kx1xD, cache = decoder.apply(variables, token_Kx1, None, alive_Kx1, cache)
      hidden.append(hidden_Kx1xD[:, 0])
      caches.append(cache)
    s = {**s, "caches": tuple(caches), "steps": s["steps"] + 1}
    return record(s, s["alive"], *choose(hidden, s["row"], s["age"]))

  def prefill(variables):
    """(last hidden state [G, D], cache) of the prompts, `slots` of them at a time."""

    def some(tokens, segments):
      hidden, cache = model.apply(
          variables, tokens, segments, slots=0 if queued else max_new_tokens, method="prefill"
      )
      return hidden[:, -1], cache

    parts = groups // slots if groups % slots == 0 else 1
    if parts == 1:
      return some(prompt_GxP, segments_GxP)
    # Part i takes prompts i, i + parts, ... of every lane: those stay on their devices.
    strided = lambda x: jnp.moveaxis(x.reshape(groups // parts, parts, -1), 1, 0)
    hidden, cache = jax.lax.map(lambda xs: some(*xs), (strided(prompt_GxP), strided(segments_GxP)))

    def join(x, axis):  # [parts, ..., G / parts, ...] -> [..., G, ...]
      x = jnp.moveaxis(x, 0, axis + 1)
      return x.reshape(*x.shape[:axis], groups, *x.shape[axis + 2 :])

    return join(hidden, 0), cache.replace(
        kv=jax.tree.map(lambda x: join(x, 1), cache.kv),
        slots=jax.tree.map(lambda x: join(x, 0), cache.slots),
        lengths=join(cache.lengths, 0),
        index=cache.index[0],
    )

  prefilled = [prefill(variables) for variables in members]
  decoder = unrolled.decoder_of(model)
  if decoder is not model:
    members = tuple(unrolled.split_variables(model.cfg, variables) for variables in members)
    prefilled = [(hidden, unrolled.split_cache(model.cfg, cache)) for hidden, cache in prefilled]
  last = [hidden_GxD for hidden_GxD, _ in prefilled]
  present_B = jnp.repeat(prompts.lengths > 0, samples_per_prompt)
  state = {
      "steps": jnp.zeros((), jnp.int32),
      "row": jnp.arange(slots, dtype=jnp.int32),
      "age": jnp.zeros((slots,), jnp.int32),  # tokens drawn.
      "token": jnp.zeros((slots,), jnp.int32),  # the last one drawn.
      "alive": jnp.zeros((slots,), bool),  # another one follows it.
      "tokens": jnp.full((rows, max_new_tokens), -1, jnp.int32),
      "logp": jnp.zeros((rows, max_new_tokens), jnp.float32),
      "entropy": jnp.zeros((rows, max_new_tokens), jnp.float32),
  }
  if not queued:
    state["caches"] = tuple(cache.repeat(samples_per_prompt) for _, cache in prefilled)
    hidden = [jnp.repeat(x, samples_per_prompt, axis=0) for x in last]
    state = record(state, present_B, *choose(hidden, state["row"], state["age"]))
    state = jax.lax.while_loop(lambda s: jnp.any(s["alive"]), step, state)
  else:
    state["caches"] = tuple(
        cache_lib.init_cache(decoder.cfg, slots, max_new_tokens, prompt=width) for _ in members
    )
    state["next"] = jnp.zeros((lanes,), jnp.int32)  # the first waiting row of each lane.
    enough = max(1, round(refill * slots))

    def admit(s):
      """Gives idle slots the next waiting rows of their lane, and draws their first token."""
      idle_LxK = by_lane(~s["alive"])
      waiting_LxK = s["next"][:, None] + jnp.cumsum(idle_LxK, axis=1, dtype=jnp.int32) - 1
      new_LxK = idle_LxK & (waiting_LxK < rows // lanes)
      group_LxK = jnp.where(new_LxK, waiting_LxK // samples_per_prompt, 0)

      def take(x, axis):
        x = x.reshape(*x.shape[:axis], lanes, x.shape[axis] // lanes, *x.shape[axis + 1 :])
        pick = lambda x, i: jnp.take(x, i, axis=axis, mode="clip")
        out = jax.vmap(pick, in_axes=(axis, 0), out_axes=axis)(x, group_LxK)
        return out.reshape(*x.shape[:axis], slots, *x.shape[axis + 2 :])

      new_K = new_LxK.reshape(slots)
      s = {
          **s,
          "next": s["next"] + jnp.sum(new_LxK, axis=1, dtype=jnp.int32),
          "row": jnp.where(new_K, base_K + waiting_LxK.reshape(slots), s["row"]),
          "age": jnp.where(new_K, 0, s["age"]),
          "caches": tuple(
              cache_lib.admit(decoder.cfg, cache, source, take, new_K)
              for cache, (_, source) in zip(s["caches"], prefilled, strict=True)
          ),
      }
      who = new_K & (take(prompts.lengths, 0) > 0)
      return record(s, who, *choose([take(x, 0) for x in last], s["row"], s["age"]))

    def goes_on(s):
      left_L = rows // lanes - s["next"]
      can = jnp.sum(jnp.minimum(left_L, jnp.sum(by_lane(~s["alive"]), axis=1, dtype=jnp.int32)))
      ready = can >= jnp.clip(jnp.sum(left_L), 1, enough)
      return jnp.any(s["alive"]) & ~ready

    state = jax.lax.while_loop(
        lambda s: jnp.any(s["alive"]) | jnp.any(s["next"] < rows // lanes),
        lambda s: jax.lax.while_loop(goes_on, step, admit(s)),
        state,
    )

  on_BxN = state["tokens"] >= 0
  tokens_BxN = jnp.where(on_BxN, state["tokens"], 0)
  stop_1x1xE = stop_1xE[None]
  behind = lambda prompt_GxP, x: jnp.concatenate(
      [jnp.repeat(prompt_GxP, samples_per_prompt, axis=0), x.astype(jnp.int32)], axis=1
  )
  return Generation(
      tokens=behind(prompt_GxP, tokens_BxN),
      segment_ids=behind(segments_GxP, on_BxN),
      lengths=jnp.sum(on_BxN, axis=1, dtype=jnp.int32),
      hit_eos=jnp.any((tokens_BxN[:, :, None] == stop_1x1xE) & on_BxN[:, :, None], axis=(1, 2)),
      logp=state["logp"],
      entropy=state["entropy"],
      steps=state["steps"],
  )
