"""Sampling responses: one prefill, then decoding until every row has ended.

Prompts arrive left-aligned (`PromptBatch`) and are right-aligned here once. Padding has segment
id 0, so attention never sees it. Each prompt is prefilled once, however many responses it gets.

With fewer `slots` than rows, a slot whose response has ended takes the next row; see
`rollout.decoding`. The whole of it is one program with static shapes and no host round trip. The
tokens of a row depend on nothing but its prompt and its random key, so a queue samples the same
responses as a plain batch.

A mixture of models can be decoded as well: logits = sum_i weight_i * logits_i. One member of
weight 1 is ordinary sampling; (sft, 1 + a), (ref, -a) is contrastive decoding of strength a.

Dims: G prompts, B = G * samples_per_prompt rows, P prompt columns, N new tokens at most, D hidden.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpr_jax.data.batches import PromptBatch
from dpr_jax.keys import row_keys
from dpr_jax.models import cache as cache_lib
from dpr_jax.models import unrolled
from dpr_jax.models.variables import gathered
from dpr_jax.rollout.decoding import Decoding
from dpr_jax.rollout.sampling import ON_POLICY, Sampling
from dpr_jax.rollout.stop_strings import StopStrings
from dpr_jax.sharding import batch_ways


@struct.dataclass
class Generation:
  """Sampled responses, each after its right-aligned prompt."""

  tokens: jax.Array  # int32 [B, P + N], 0 on padding.
  segment_ids: jax.Array  # int32 [B, P + N], 1 on prompt and response, 0 on padding.
  lengths: jax.Array  # int32 [B], response tokens, EOS included.
  hit_eos: jax.Array  # bool [B], ended by a stop id or a stop string; False: truncated at N.
  # float32 [B, N] each, nats, of the distribution at temperature 1 over the whole vocabulary, and 0
  # past the end of the response. The entropy is 0 unless it was requested.
  logp: jax.Array
  entropy: jax.Array
  steps: jax.Array  # int32 [], forward passes of the decoding loop.

  @property
  def mask(self) -> jax.Array:
    """float32 [B, N], 1 on response tokens. It follows from the lengths, never from token ids."""
    columns_1xN = jnp.arange(self.logp.shape[1], dtype=jnp.int32)[None, :]
    return (columns_1xN < self.lengths[:, None]).astype(jnp.float32)


def right_align(prompts: PromptBatch) -> tuple[jax.Array, jax.Array]:
  """Returns (tokens, segment_ids) of prompts that end in column P - 1, int32 [G, P] each."""
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
    temperature: jax.Array | None = None,
    weights: Sequence[float] = (1.0,),
    samples_per_prompt: int = 1,
    slots: int = 0,
    refill: float = 0.125,
    with_entropy: bool = False,
    stop_strings: StopStrings | None = None,
) -> Generation:
  """Samples responses to every prompt. Traceable; jit it with the settings static.

  Args:
    members: variables of each model of the mixture; a single one for ordinary sampling.
    prompts: G rows. A row of length 0 is a filler and gets an empty response.
    rng: a key for each row, [B], or one key, of which row b gets fold_in(rng, b). A row samples
      its j-th token with fold_in(key of the row, j).
    max_new_tokens: the length N at which a response is truncated.
    stop_ids: token ids that end a response. The stop token belongs to the response.
    sampling: how tokens are sampled; anything but the default is off-policy.
    temperature: float32 scalar in place of that of `sampling`, unless this is greedy. Pass it to a
      jitted function as an argument, so that it is compiled once for all temperatures.
    weights: of the members' logits.
    samples_per_prompt: responses per prompt, in adjacent rows: row b answers prompt
      b // samples_per_prompt.
    slots: rows decoded at a time; 0 decodes all of them at once.
    refill: fraction of the slots that must be idle before waiting rows take their place. A refill
      costs about as much as one or two decoding steps.
    with_entropy: also return the entropy of every distribution that a token was sampled from.
    stop_strings: strings that end a response, compiled by `build_stop_strings` for this model's
      tokenizer. The token that completes a string belongs to the response. Text of the prompt
      never counts, not even as the beginning of a string. Pass them to a jitted function as an
      argument, so that it is compiled once for all strings.

  Raises:
    ValueError: `stop_strings` are of another vocabulary than the model's.
  """
  if stop_strings is not None and stop_strings.next_state.shape[1] != model.cfg.vocab_size:
    raise ValueError(f"stop_strings are compiled for {stop_strings.next_state.shape[1]} tokens, "
                     f"but the model has {model.cfg.vocab_size}")
  members = tuple(gathered(model.cfg, variables) for variables in members)
  prompt_GxP, segments_GxP = right_align(prompts)
  groups, width = prompt_GxP.shape
  rows = groups * samples_per_prompt
  slots = min(slots or rows, rows)
  queued = slots < rows
  lanes = batch_ways()
  if not queued or slots % lanes or groups % lanes:
    lanes = 1
  room = 0 if queued else max_new_tokens  # A queue copies prompts into caches that have room.
  prefilled = [
      prefill(model, variables, prompt_GxP, segments_GxP, slots, room) for variables in members
  ]
  decoder = unrolled.decoder_of(model)
  if decoder is not model:
    members = tuple(unrolled.split_variables(model.cfg, variables) for variables in members)
    prefilled = [(hidden, unrolled.split_cache(model.cfg, cache)) for hidden, cache in prefilled]
  decoding = Decoding(
      decoder=decoder,
      unembed=lambda variables, hidden: model.apply(variables, hidden, method="unembed"),
      members=members,
      weights=tuple(weights),
      sampling=sampling,
      temperature=temperature,
      stop_ids=tuple(stop_ids),
      stop_strings=stop_strings,
      key_words_BxW=jax.random.key_data(row_keys(rng, rows)),
      rows=rows,
      slots=slots,
      lanes=lanes,
      max_new_tokens=max_new_tokens,
      with_entropy=with_entropy,
  )
  if queued:
    empty = [
        cache_lib.init_cache(decoder.cfg, slots, max_new_tokens, prompt=width) for _ in members
    ]
    done = decoding.run_queue(
        decoding.start(empty), prefilled, prompts.lengths, samples_per_prompt, refill
    )
  else:
    state = decoding.start([cache.repeat(samples_per_prompt) for _, cache in prefilled])
    present_B = jnp.repeat(prompts.lengths > 0, samples_per_prompt)
    last = [jnp.repeat(hidden, samples_per_prompt, axis=0) for hidden, _ in prefilled]
    done = decoding.run(decoding.sample(state, present_B, last))

  on_BxN = done.tokens >= 0
  tokens_BxN = jnp.where(on_BxN, done.tokens, 0)
  stop_1x1xE = jnp.asarray(stop_ids, jnp.int32)[None, None, :]
  behind = lambda prompt_GxP, x: jnp.concatenate(
      [jnp.repeat(prompt_GxP, samples_per_prompt, axis=0), x.astype(jnp.int32)], axis=1
  )
  out = Generation(
      tokens=behind(prompt_GxP, tokens_BxN),
      segment_ids=behind(segments_GxP, on_BxN),
      lengths=jnp.sum(on_BxN, axis=1, dtype=jnp.int32),
      hit_eos=jnp.any((tokens_BxN[:, :, None] == stop_1x1xE) & on_BxN[:, :, None], axis=(1, 2)),
      logp=done.logp,
      entropy=done.entropy,
      steps=done.steps,
  )
  if stop_strings is not None:
    out = out.replace(hit_eos=out.hit_eos | done.matched)
  return out


def prefill(
    model: Any, variables: Any, prompt_GxP: jax.Array, segments_GxP: jax.Array, at_a_time: int,
    room: int,
) -> tuple[jax.Array, Any]:
  """Returns (last hidden state [G, D], cache) of right-aligned prompts.

  Args:
    at_a_time: prompts per forward pass, if it divides their number; otherwise one pass takes all.
      This keeps the memory of a pass at that of a decoding step times the prompt length.
    room: cache positions to leave for new tokens after the prompt.
  """
  groups = prompt_GxP.shape[0]

  def some(tokens, segments):
    hidden, cache = model.apply(variables, tokens, segments, slots=room, method="prefill")
    return hidden[:, -1], cache

  parts = groups // at_a_time if groups % at_a_time == 0 else 1
  if parts == 1:
    return some(prompt_GxP, segments_GxP)
  # Part i takes prompts i, i + parts, and so on, so that every device keeps its own prompts.
  strided = lambda x: jnp.moveaxis(x.reshape(groups // parts, parts, -1), 1, 0)
  hidden, cache = jax.lax.map(lambda xs: some(*xs), (strided(prompt_GxP), strided(segments_GxP)))

  def join(x, axis):  # [parts, ..., G / parts, ...] -> [..., G, ...]
    x = jnp.moveaxis(x, 0, axis + 1)
    return x.reshape(*x.shape[:axis], groups, *x.shape[axis + 2 :])

  return join(hidden, 0), cache.replace(
      kv=jax.tree.map(lambda x: join(x, x.ndim - 5), cache.kv),
      slots=jax.tree.map(lambda x: join(x, 0), cache.slots),
      lengths=join(cache.lengths, 0),
      index=cache.index[0],
  )
