"""The decoding batch: slots that feed their last token and draw the next, until rows run out.

Plain: every row has a slot, and the loop ends with the longest response. Queued: fewer slots than
rows; a slot whose response has ended is given the next row (continuous batching). The loop then
stops as soon as enough slots are idle, copies the prompts of waiting rows from the prefill into the
cache, and goes on.

Dims: G prompts, B rows, K slots, N new tokens at most, V vocabulary, D hidden, L lanes: groups of
rows and slots that lie on the same devices.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpr_jax.models import cache as cache_lib
from dpr_jax.rollout.drawing import Sampling, draw
from dpr_jax.sharding import constrain


@struct.dataclass
class Slots:
  """The state of the loop."""

  steps: jax.Array  # int32 [], forward passes so far.
  row: jax.Array  # int32 [K], the row that a slot answers.
  age: jax.Array  # int32 [K], tokens drawn for it.
  token: jax.Array  # int32 [K], the last one drawn.
  alive: jax.Array  # bool [K], another one follows it.
  tokens: jax.Array  # int32 [B, N], -1 where none was drawn.
  logp: jax.Array  # float32 [B, N]
  entropy: jax.Array  # float32 [B, N]
  caches: tuple[Any, ...]  # of each member of the mixture.
  waiting: jax.Array  # int32 [L], the first row of each lane that has had no slot.


@dataclasses.dataclass(frozen=True)
class Decoding:
  """What stays the same over the loop. Methods are traced."""

  decoder: Any  # feeds one token a slot.
  unembed: Callable[[Any, jax.Array], jax.Array]  # (variables, hidden [K, D]) -> logits [K, V].
  members: tuple[Any, ...]  # variables of each model of the mixture.
  weights: tuple[float, ...]
  sampling: Sampling
  stop_ids: tuple[int, ...]
  rng: jax.Array
  first_row: jax.Array | int  # index of the first row in its random keys.
  rows: int
  slots: int
  lanes: int
  max_new_tokens: int
  with_entropy: bool

  @property
  def queued(self) -> bool:
    return self.slots < self.rows

  def start(self, caches: Sequence[Any]) -> Slots:
    """No token drawn yet; without a queue, slot k answers row k."""
    drawn = lambda value, dtype: jnp.full((self.rows, self.max_new_tokens), value, dtype)
    return Slots(
        steps=jnp.zeros((), jnp.int32),
        row=jnp.arange(self.slots, dtype=jnp.int32),
        age=jnp.zeros((self.slots,), jnp.int32),
        token=jnp.zeros((self.slots,), jnp.int32),
        alive=jnp.zeros((self.slots,), bool),
        tokens=drawn(-1, jnp.int32),
        logp=drawn(0.0, jnp.float32),
        entropy=drawn(0.0, jnp.float32),
        caches=tuple(caches),
        waiting=jnp.zeros((self.lanes,), jnp.int32),
    )

  def draw(self, s: Slots, who_K: jax.Array, hidden_KxD: Sequence[jax.Array]) -> Slots:
    """Draws the next token of the slots of `who_K` from the last hidden state of each member."""
    token_K, logp_K, entropy_K = self._choose(s, hidden_KxD)
    stopped_K = jnp.any(token_K[:, None] == jnp.asarray(self.stop_ids, jnp.int32)[None, :], axis=1)
    age_K = s.age + who_K
    return s.replace(
        tokens=self._write(s.tokens, token_K, -1, s, who_K),
        logp=self._write(s.logp, logp_K, 0.0, s, who_K),
        entropy=self._write(s.entropy, entropy_K, 0.0, s, who_K),
        token=jnp.where(who_K, token_K, s.token),
        age=age_K,
        alive=jnp.where(who_K, ~stopped_K & (age_K < self.max_new_tokens), s.alive),
    )

  def step(self, s: Slots) -> Slots:
    """Feeds the last token of every slot that goes on, and draws the next."""
    token_Kx1 = jnp.where(s.alive, s.token, 0)[:, None]
    alive_Kx1 = s.alive.astype(jnp.int32)[:, None]
    hidden, caches = [], []
    for variables, cache in zip(self.members, s.caches, strict=True):
      hidden_Kx1xD, cache = self.decoder.apply(variables, token_Kx1, None, alive_Kx1, cache)
      hidden.append(hidden_Kx1xD[:, 0])
      caches.append(cache)
    s = s.replace(caches=tuple(caches), steps=s.steps + 1)
    return self.draw(s, s.alive, hidden)

  def run(self, s: Slots) -> Slots:
    """A plain batch from its first token to the end of its longest response."""
    return jax.lax.while_loop(lambda s: jnp.any(s.alive), self.step, s)

  def run_queue(
      self,
      s: Slots,
      prefilled: Sequence[tuple[jax.Array, Any]],
      lengths_G: jax.Array,
      samples_per_prompt: int,
      refill: float,
  ) -> Slots:
    """All rows through fewer slots.

    Args:
      prefilled: (last hidden state [G, D], cache of the prompts) of each member.
      lengths_G: of the prompts; a row without a prompt gets no response.
      refill: share of the slots that must have ended before waiting rows take their place.
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
    """(token, logp, entropy) of every slot, [K] each."""
    logits_KxV = 0.0
    for variables, weight, hidden in zip(self.members, self.weights, hidden_KxD, strict=True):
      logits = self.unembed(variables, hidden)
      logits_KxV = logits_KxV + (logits if weight == 1.0 else weight * logits)
    logits_KxV = constrain(logits_KxV, "batch", "vocab")
    key_of = lambda row, age: jax.random.fold_in(jax.random.fold_in(self.rng, row), age)
    token_K = draw(logits_KxV, jax.vmap(key_of)(self.first_row + s.row, s.age), self.sampling)
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
    """The first row of the lane of each slot."""
    lanes_L = jnp.arange(self.lanes, dtype=jnp.int32)
    return jnp.repeat(lanes_L * (self.rows // self.lanes), self.slots // self.lanes)

  def _write(self, out_BxN, value_K, nothing, s: Slots, who_K):
    """One value a slot of `who_K`, to the column of its age in its row."""
    if not self.queued:  # All slots are at the same age.
      column_K = jnp.where(who_K, value_K, nothing)
      return jax.lax.dynamic_update_slice_in_dim(out_BxN, column_K[:, None], s.steps, 1)
    put = lambda out, row, age, value: out.at[row, age].set(
        value, mode="drop", unique_indices=True
    )
    age_K = jnp.where(who_K, s.age, self.max_new_tokens)  # Past the last column: dropped.
    row_K = s.row - self._first_row_K
    out = jax.vmap(put)(*map(self._by_lane, (out_BxN, row_K, age_K, value_K)))
    return constrain(out.reshape(out_BxN.shape), "batch", None)

  def _admit(self, s: Slots, prefilled, lengths_G, samples_per_prompt: int) -> Slots:
    """Gives idle slots the next waiting rows of their lane, and draws their first token."""
    idle_LxK = self._by_lane(~s.alive)
    row_LxK = s.waiting[:, None] + jnp.cumsum(idle_LxK, axis=1, dtype=jnp.int32) - 1
    new_LxK = idle_LxK & (row_LxK < self.rows // self.lanes)
    group_LxK = jnp.where(new_LxK, row_LxK // samples_per_prompt, 0)

    def take(x, axis):
      lanes, slots = self.lanes, self.slots
      x = x.reshape(*x.shape[:axis], lanes, x.shape[axis] // lanes, *x.shape[axis + 1 :])
      pick = lambda x, i: jnp.take(x, i, axis=axis, mode="clip")
      out = jax.vmap(pick, in_axes=(axis, 0), out_axes=axis)(x, group_LxK)
      return out.reshape(*x.shape[:axis], slots, *x.shape[axis + 2 :])

    new_K = new_LxK.reshape(self.slots)
    s = s.replace(
        waiting=s.waiting + jnp.sum(new_LxK, axis=1, dtype=jnp.int32),
        row=jnp.where(new_K, self._first_row_K + row_LxK.reshape(self.slots), s.row),
        age=jnp.where(new_K, 0, s.age),
        caches=tuple(
            cache_lib.admit(self.decoder.cfg, cache, source, take, new_K)
            for cache, (_, source) in zip(s.caches, prefilled, strict=True)
        ),
    )
    who_K = new_K & (take(lengths_G, 0) > 0)
    return self.draw(s, who_K, [take(hidden_GxD, 0) for hidden_GxD, _ in prefilled])
