"""The package's own losses and rewards on a tabular policy, under exact expectation.

`TabularModel` looks like a `Transformer` to `token_logprobs`, to the losses and to the
sampler, but its logits are a table. A batch that enumerates every response and weighs it
with its probability replaces sampling, so what the code converges to has no noise and can
be held against the closed form (`optimum.py`).

A prompt is one token, of id A + p, in column 0. Dims as in `mdp.py`, and B rows, C columns.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpr_jax.keys import make_key
from dpr_jax.losses.full_vocabulary import (
    FullVocabularyBatch,
    attach,
    full_vocabulary_batch,
    make_full_vocabulary_loss,
)
from dpr_jax.losses.reinforce import ReinforceBatch, make_reinforce_loss, reinforce_batch
from dpr_jax.models import cache as cache_lib
from dpr_jax.models.config import ModelConfig
from dpr_jax.references.base import Reference
from dpr_jax.rewards import RewardFn, apply_reward
from dpr_jax.rewards.baseline_relative import BASELINE_RELATIVE
from dpr_jax.rollout.scoring import score_response
from dpr_jax.rollout.step import Rollout
from dpr_jax.theory.mdp import TokenMDP
from dpr_jax.training.steps import TrainState, make_train_step


@dataclasses.dataclass(frozen=True)
class TabularModel:
  """A policy given by a table of logits, with the interface of `models.Transformer`.

  Variables are {"params": {"table": float32 [S, A]}}; see `variables`. The hidden states are the
  logits themselves, and `unembed` is the identity.
  """

  mdp: TokenMDP

  @property
  def cfg(self) -> ModelConfig:
    """A cache of two equal numbers per token (heads are even)."""
    return ModelConfig(
        vocab_size=self.mdp.vocab_size, hidden_size=self.mdp.vocab_size, mlp_size=1, num_layers=1,
        num_heads=1, num_kv_heads=1, head_dim=2, max_length=1 + self.mdp.max_length,
    )

  def variables(self, logits_SxA: np.ndarray) -> dict[str, Any]:
    """{"params": ...} of a table of logits."""
    return {"params": {"table": jnp.asarray(logits_SxA, jnp.float32)}}

  @property
  def _after(self) -> jax.Array:
    """int32 [S + 1, A + prompts]: the state after a token; S is that before and after a row."""
    mdp, end = self.mdp, self.mdp.num_states
    # Row `end` stays there, and a column past the vocabulary opens prompt p in state p.
    after = np.full((end + 1, mdp.vocab_size + mdp.num_prompts), end, np.int32)
    after[:end, : mdp.vocab_size] = mdp.next_SxA
    after[:, mdp.vocab_size :] = np.arange(mdp.num_prompts)
    return jnp.asarray(after)

  def states(self, tokens_BxC: jax.Array, segment_ids_BxC: jax.Array, start_B=None) -> jax.Array:
    """int32 [B, C], the state after each column; S before the prompt and after the end."""
    after = self._after

    def step(state_B, column):
      token_B, segment_B = column
      state_B = jnp.where(segment_B > 0, after[state_B, token_B], state_B)
      return state_B, state_B

    if start_B is None:
      start_B = jnp.full(tokens_BxC.shape[:1], self.mdp.num_states, jnp.int32)
    return jax.lax.scan(step, start_B, (tokens_BxC.T, segment_ids_BxC.T))[1].T

  def apply(
      self, variables, tokens, positions=None, segment_ids=None, cache=None, *, method=None,
      rngs=None, slots=0,
  ):
    """(logits [B, C, A], cache); with method="unembed", what it is given.

    A cache keeps, as the key of each token, the state after it.
    """
    if method == "unembed":
      return tokens
    if method == "prefill":  # Its second argument is the segments.
      segment_ids = positions
    elif segment_ids is None:
      segment_ids = jnp.ones_like(tokens)
    as_keys = lambda states: jnp.repeat(states[:, None, :, None].astype(jnp.float32), 2, axis=-1)
    if cache is None:
      states_BxC = self.states(tokens, segment_ids)
      if method == "prefill":
        keys = as_keys(states_BxC)[None]  # [1, B, 1, C, 2]
        cache = cache_lib.from_prefill(self.cfg, (((keys, keys),),), segment_ids, slots)
    else:
      (keys, _), slots_of = cache.kv[0][0], cache.slots["global"]
      last = slots_of.ranks == cache.lengths[:, None] - 1
      state_B = jnp.sum(jnp.where(last, keys[:, 0, :, 0], 0.0), axis=1).astype(jnp.int32)
      state_B = jnp.where(cache.lengths > 0, state_B, self.mdp.num_states)
      states_BxC = self.states(tokens, segment_ids, state_B)
      cache, target, _ = cache_lib.advance(cache, segment_ids, lambda kind: 0)
      new = as_keys(states_BxC)
      kv, _ = cache_lib.store(cache.kv[0][0], (new, new), 0, target["global"])
      cache = cache.replace(kv=((kv,),))
    table = jnp.pad(variables["params"]["table"], ((0, 1), (0, 0)))  # uniform after the end.
    return table[states_BxC], cache


def enumerate_rollout(
    model: TabularModel, policy, sft, ref, reward: RewardFn = BASELINE_RELATIVE
) -> Rollout:
  """Every response to every prompt as a `Rollout`, scored by the package's code. Jittable.

  policy, sft, ref: variables of `model`.
  """
  y = model.mdp.responses
  tokens = np.concatenate([model.mdp.vocab_size + y.prompts_Y[:, None], y.tokens_YxT], axis=1)
  segments = np.concatenate([np.ones((len(tokens), 1)), y.mask_YxT], axis=1)
  tokens, segments = jnp.asarray(tokens, jnp.int32), jnp.asarray(segments, jnp.int32)
  mask = jnp.asarray(y.mask_YxT, jnp.float32)
  scores, policy_out, _, states = score_response(
      model, policy=policy, sft=sft, ref=Reference.of(ref), tokens_BxS=tokens,
      segment_ids_BxS=segments, start=1, entropies=True, keep_states=True,
  )
  return Rollout(
      tokens=tokens,
      segment_ids=segments,
      prompt_lengths=jnp.ones(len(tokens), jnp.int32),
      lengths=jnp.asarray(y.lengths_Y, jnp.int32),
      hit_eos=jnp.asarray(y.hit_eos_Y),
      mask=mask,
      rewards=apply_reward(reward, scores.replace(mask=mask)),
      policy_logp=scores.policy_logp * mask,
      sft_logp=scores.sft_logp * mask,
      ref_logp=scores.ref_logp * mask,
      entropy=policy_out.entropy * mask,
      decode_steps=jnp.zeros((), jnp.int32),
      states=states,
  )


def expected_batch(rollout: Rollout, num_prompts: int, **kwargs) -> ReinforceBatch:
  """`reinforce_batch` of an enumerated rollout whose loss is the expected one.

  Each row's advantages are multiplied by its probability under the policy that `rollout` was
  made with, so a sum over rows is an expectation over uniform prompts and sampled responses.
  Baselines and normalisation over rows would mix responses unweighted: leave them out.

  Args:
    kwargs: of `losses.reinforce_batch`.
  """
  batch, _ = reinforce_batch(rollout, **kwargs)
  return batch.replace(advantages=batch.advantages * _probability(rollout, num_prompts))


def _probability(rollout: Rollout, num_prompts: int) -> jax.Array:
  """[Y, 1], of each row of an enumerated rollout."""
  return jnp.exp(jnp.sum(rollout.policy_logp, axis=1, keepdims=True)) / num_prompts


def expected_full_batch(
    rollout: Rollout, num_prompts: int, sft, ref, **kwargs
) -> FullVocabularyBatch:
  """`full_vocabulary_batch` of an enumerated rollout whose loss is the expected one over states.

  Args:
    sft, ref: variables that the rollout was scored with.
    kwargs: of `losses.full_vocabulary_batch`.
  """
  batch, _ = full_vocabulary_batch(rollout, **kwargs)
  batch = batch.replace(mask=batch.mask * _probability(rollout, num_prompts))
  return attach(batch, rollout, sft, ref)


def ascend(
    mdp: TokenMDP,
    sft_SxA: np.ndarray,
    ref_SxA: np.ndarray,
    *,
    steps: int = 400,
    learning_rate: float = 0.2,
    reward: RewardFn = BASELINE_RELATIVE,
    start_SxA: np.ndarray | None = None,
    every: int = 50,
    divergence: str | None = None,
    **kwargs,
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
  """Dense-Path REINFORCE with the package's loss and train step, without sampling noise.

  Args:
    steps, learning_rate: of Adam with a cosine decay to 0, logits per step.
    start_SxA: the first policy, by default sft.
    every: steps between the policies that are kept.
    divergence: that of the loss over the full vocabulary; None takes the sampled one.
    kwargs: of `losses.reinforce_batch`: beta, beta_ref, returns, gamma, ...; with a divergence beta
      and beta_ref alone.

  Returns:
    the logits [S, A] at the end, and [(step, logits)] along the way.
  """
  model = TabularModel(mdp)
  sft, ref = model.variables(sft_SxA), model.variables(ref_SxA)
  # A short memory of squared gradients: in rarely visited states they shrink by orders of
  # magnitude on the way, and the usual 0.999 would hold back the last digits for long.
  optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps), b2=0.95)
  state = TrainState.create(
      model.variables(sft_SxA if start_SxA is None else start_SxA), optimizer, make_key(0)
  )
  if divergence is None:
    loss = make_reinforce_loss(model, loss_aggregation="sequences")
    expect = lambda rollout: expected_batch(rollout, mdp.num_prompts, **kwargs)
  else:
    beta, beta_ref = kwargs["beta"], kwargs.get("beta_ref", 0.0)
    loss = make_full_vocabulary_loss(
        model, reward=reward, divergence=divergence, beta_ref=beta_ref,
        has_target=beta + beta_ref > 0, loss_aggregation="sequences",
    )
    expect = lambda rollout: expected_full_batch(rollout, mdp.num_prompts, sft, ref, beta=beta)
  train_step = make_train_step(loss, optimizer)
  make_batch = jax.jit(lambda policy: expect(enumerate_rollout(model, policy, sft, ref, reward)))
  table = lambda: np.asarray(state.trainable["params"]["table"], np.float64)
  kept = [(0, table())]
  for step in range(1, steps + 1):
    state, _ = train_step(state, make_batch(state.variables))
    if step % every == 0 or step == steps:
      kept.append((step, table()))
  return kept[-1][1], kept
