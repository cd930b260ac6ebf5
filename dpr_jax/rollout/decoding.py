"""The decoding loop: every slot feeds its last token and samples the next one.

A plain batch has one slot per row, and the loop ends with the longest response. A queue has fewer
slots than rows: a slot whose response has ended takes the next waiting row (continuous batching).
The loop then pauses as soon as enough slots are idle, copies the prompts of waiting rows from the
prefill into the cache, and resumes. All of this happens on the device.

Dims: G prompts, B rows, K slots, N new tokens at most, V vocabulary, D hidden, L lanes. A lane is a
group of rows and slots that live on the same devices.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpr_jax.keys import IMPLEMENTATION
from dpr_jax.models import cache as cache_lib
from dpr_jax.rollout.sampling import Sampling, sample_token
from dpr_jax.rollout.stop_strings import MATCHED, StopStrings
from dpr_jax.sharding import constrain


@struct.dataclass
class Slots:
  """The loop state."""

  steps: jax.Array  # int32 [], forward passes so far.
  row: jax.Array  # int32 [K], the row that the slot answers.
  age: jax.Array  # int32 [K], tokens sampled for that row.
  token: jax.Array  # int32 [K], the last token sampled.
  key_words: jax.Array  # uint32 [K, W], the random key of that row.
  alive: jax.Array  # bool [K], the response continues after that token.
  tokens: jax.Array  # int32 [B, N], -1 where no token was sampled.
  logp: jax.Array  # float32 [B, N]
  entropy: jax.Array  # float32 [B, N]
  caches: tuple[Any, ...]  # One KV cache per member of the mixture.
  waiting: jax.Array  # int32 [L], the first row of each lane that has not had a slot yet.
  # None without stop strings.
  stop_state: jax.Array | None = None  # int32 [K], how much of a stop string each slot has seen.
  matched: jax.Array | None = None  # bool [B], rows that a stop string has ended.


@dataclasses.dataclass(frozen=True)
class Decoding:
  """What stays constant over the loop. All methods are traced."""

  decoder: Any  # The model that feeds one token per slot.
  unembed: Callable[[Any, jax.Array], jax.Array]  # (variables, hidden [K, D]) -> logits [K, V].
  members: tuple[Any, ...]  # Variables of each model of the mixture.
  weights: tuple[float, ...]  # Of the members' logits.
  sampling: Sampling
  temperature: jax.Array | None  # in place of that of `sampling`, unless this is greedy.
  stop_ids: tuple[int, ...]
  stop_strings: StopStrings | None
  key_words_BxW: jax.Array  # uint32, the random key of each row.
  rows: int
  slots: int
  lanes: int
  max_new_tokens: int
  with_entropy: bool

  @property
  def queued(self) -> bool:
    return self.slots < self.rows

  def start(self, caches: Sequence[Any]) -> Slots:
    """Returns the state before the first token. Without a queue, slot k answers row k."""
    filled = lambda value, dtype: jnp.full((self.rows, self.max_new_tokens), value, dtype)
    stops = self.stop_strings
    return Slots(
        steps=jnp.zeros((), jnp.int32),
        row=jnp.arange(self.slots, dtype=jnp.int32),
        age=jnp.zeros((self.slots,), jnp.int32),
        token=jnp.zeros((self.slots,), jnp.int32),
        key_words=self.key_words_BxW[: self.slots],
        alive=jnp.zeros((self.slots,), bool),
        tokens=filled(-1, jnp.int32),
        logp=filled(0.0, jnp.float32),
        entropy=filled(0.0, jnp.float32),
        caches=tuple(caches),
        waiting=jnp.zeros((self.lanes,), jnp.int32),
        stop_state=None if stops is None else stops.start(self.slots),
        matched=None if stops is None else jnp.zeros((self.rows,), bool),
    )

  def sample(self, s: Slots, who_K: jax.Array, hidden_KxD: Sequence[jax.Array]) -> Slots:
    """Samples the next token of the slots in `who_K`.

    Args:
      who_K: bool, the slots that get a token.
      hidden_KxD: the last hidden state under each member of the mixture.
    """
    token_K, logp_K, entropy_K = self._choose(s, hidden_KxD)
    stopped_K = jnp.any(token_K[:, None] == jnp.asarray(self.stop_ids, jnp.int32)[None, :], axis=1)
    age_K = s.age + who_K
    stop_state_K, matched_B = s.stop_state, s.matched
    if self.stop_strings is not None:
      next_K = self.stop_strings.advance(s.stop_state, token_K)
      stop_state_K = jnp.where(who_K, next_K, s.stop_state)
      matched_K = who_K & (next_K == MATCHED)
      stopped_K = stopped_K | matched_K
      matched_B = self._mark(s.matched, matched_K, s)
    return s.replace(
        tokens=self._write(s.tokens, token_K, -1, s, who_K),
        logp=self._write(s.logp, logp_K, 0.0, s, who_K),
        entropy=self._write(s.entropy, entropy_K, 0.0, s, who_K),
        token=jnp.where(who_K, token_K, s.token),
        age=age_K,
        alive=jnp.where(who_K, ~stopped_K & (age_K < self.max_new_tokens), s.alive),
        stop_state=stop_state_K,
        matched=matched_B,
    )

  def step(self, s: Slots) -> Slots:
    """Feeds the last token of every slot that is alive, and samples its next one."""
    token_Kx1 = jnp.where(s.alive, s.token, 0)[:, None]
    alive_Kx1 = s.alive.astype(jnp.int32)[:, None]
    hidden, caches = [], []
    for variables, cache in zip(self.members, s.caches, strict=True):
      hidden_Kx1xD, cache = self.decoder.apply(variables, token_Kx1, None, alive_Kx1, cache)
      hidden.append(hidden_Kx1xD[:, 0])
      caches.append(cache)
    s = s.replace(caches=tuple(caches), steps=s.steps + 1)
    return self.sample(s, s.alive, hidden)

  def run(self, s: Slots) -> Slots:
    """Decodes a plain batch, which has its first tokens, to the end of its longest response."""
    return jax.lax.while_loop(lambda s: jnp.any(s.alive), self.step, s)

  def run_queue(
      self, s: Slots, prefilled: Sequence[tuple[jax.Array, Any]], lengths_G: jax.Array,
      samples_per_prompt: int, refill: float,
  ) -> Slots:
    """Decodes all rows in fewer slots.

    Args:
      prefilled: (last hidden state [G, D], cache of the prompts) under each member.
      lengths_G: prompt lengths. A row whose prompt is empty gets no response.
      samples_per_prompt: responses per prompt, in adjacent rows.
      refill: fraction of the slots that must be idle before waiting rows take their place.
    """
    rows_a_lane = self.rows // self.lanes
    enough = max(1, round(refill * self.slots))

    def goes_on(s):
      left_L = rows_a_lane - s.waiting
      idle_L = jnp.sum(self._by_lane(~s.alive), axis=1, dtype=jnp.int32)
      ready = jnp.sum(jnp.minimum(left_L, idle_L)) >= jnp.clip(jnp.sum(left_L), 1, enough)
      return jnp.any(s.alive) & ~ready

    def fill_and_go_on(s):
      s = self._admit(s, prefilled, lengths_G, samples_per_prompt)
      return jax.lax.while_loop(goes_on, self.step, s)

    unfinished = lambda s: jnp.any(s.alive) | jnp.any(s.waiting < rows_a_lane)
    return jax.lax.while_loop(unfinished, fill_and_go_on, s)

  def _choose(self, s: Slots, hidden_KxD: Sequence[jax.Array]):
    """Returns (token, logp, entropy) of every slot, [K] each."""
    logits_KxV = 0.0
    for variables, weight, hidden in zip(self.members, self.weights, hidden_KxD, strict=True):
      logits = self.unembed(variables, hidden)
      logits_KxV = logits_KxV + (logits if weight == 1.0 else weight * logits)
    logits_KxV = constrain(logits_KxV, "batch", "vocab")
    rows_K = jax.random.wrap_key_data(s.key_words, impl=IMPLEMENTATION)
    keys_K = jax.vmap(jax.random.fold_in)(rows_K, s.age)
    token_K = sample_token(logits_KxV, keys_K, self.sampling, self.temperature)
    hit_KxV = jnp.arange(logits_KxV.shape[-1], dtype=jnp.int32)[None, :] == token_K[:, None]
    lse_K = jax.nn.logsumexp(logits_KxV, axis=-1)
    logp_K = jnp.sum(jnp.where(hit_KxV, logits_KxV, 0.0), axis=-1) - lse_K
    entropy_K = jnp.zeros_like(logp_K)
    if self.with_entropy:
      log_p_KxV = logits_KxV - lse_K[:, None]
      entropy_K = -jnp.sum(jnp.exp(log_p_KxV) * log_p_KxV, axis=-1)
    return token_K, logp_K, entropy_K

  def _by_lane(self, x: jax.Array) -> jax.Array:
    return x.reshape(self.lanes, x.shape[0] // self.lanes, *x.shape[1:])

  @property
  def _first_row_K(self) -> jax.Array:
    """The first row of each slot's lane."""
    lanes_L = jnp.arange(self.lanes, dtype=jnp.int32)
    return jnp.repeat(lanes_L * (self.rows // self.lanes), self.slots // self.lanes)

  def _write(self, out_BxN, value_K, nothing, s: Slots, who_K):
    """Writes the value of each slot in `who_K` to its row, in the column of its age."""
    if not self.queued:  # All slots have the same age.
      column_K = jnp.where(who_K, value_K, nothing)
      return jax.lax.dynamic_update_slice_in_dim(out_BxN, column_K[:, None], s.steps, 1)
    put = lambda out, row, age, value: out.at[row, age].set(
        value, mode="drop", unique_indices=True
    )
    age_K = jnp.where(who_K, s.age, self.max_new_tokens)  # Past the last column: dropped.
    row_K = s.row - self._first_row_K
    out = jax.vmap(put)(*map(self._by_lane, (out_BxN, row_K, age_K, value_K)))
    return constrain(out.reshape(out_BxN.shape), "batch", None)

  def _mark(self, out_B, who_K, s: Slots):
    """Sets the rows of the slots in `who_K` to True."""
    if not self.queued:  # Slot k answers row k.
      return out_B | who_K
    put = lambda out, row, who: out.at[row].max(who)
    out = jax.vmap(put)(*map(self._by_lane, (out_B, s.row - self._first_row_K, who_K)))
    return constrain(out.reshape(out_B.shape), "batch")

  def _admit(self, s: Slots, prefilled, lengths_G, samples_per_prompt: int) -> Slots:
    """Gives idle slots the next waiting rows of their lane, and samples their first tokens."""
    idle_LxK = self._by_lane(~s.alive)
    row_LxK = s.waiting[:, None] + jnp.cumsum(idle_LxK, axis=1, dtype=jnp.int32) - 1
    new_LxK = idle_LxK & (row_LxK < self.rows // self.lanes)
    group_LxK = jnp.where(new_LxK, row_LxK // samples_per_prompt, 0)

    def take(x, axis, index_LxK=group_LxK):
      lanes, slots = self.lanes, self.slots
      x = x.reshape(*x.shape[:axis], lanes, x.shape[axis] // lanes, *x.shape[axis + 1 :])
      pick = lambda x, i: jnp.take(x, i, axis=axis, mode="clip")
      out = jax.vmap(pick, in_axes=(axis, 0), out_axes=axis)(x, index_LxK)
      return out.reshape(*x.shape[:axis], slots, *x.shape[axis + 2 :])

    new_K = new_LxK.reshape(self.slots)
    stop_state_K = s.stop_state
    if self.stop_strings is not None:
      stop_state_K = jnp.where(new_K, self.stop_strings.start(self.slots), s.stop_state)
    s = s.replace(
        waiting=s.waiting + jnp.sum(new_LxK, axis=1, dtype=jnp.int32),
        row=jnp.where(new_K, self._first_row_K + row_LxK.reshape(self.slots), s.row),
        age=jnp.where(new_K, 0, s.age),
        key_words=jnp.where(new_K[:, None], take(self.key_words_BxW, 0, row_LxK), s.key_words),
        stop_state=stop_state_K,
        caches=tuple(
            cache_lib.admit(self.decoder.cfg, cache, source, take, new_K)
            for cache, (_, source) in zip(s.caches, prefilled, strict=True)
        ),
    )
    who_K = new_K & (take(lengths_G, 0) > 0)
    return self.sample(s, who_K, [take(hidden_GxD, 0) for hidden_GxD, _ in prefilled])
