"""Co-teaching: two networks, each trained on the demonstrations that the other finds easy.

Source: Han et al. 2018, "Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy
Labels" (arXiv 1804.06872). In step T of a batch the share

    R(T) = 1 - noise_rate min(T / T_k, 1)

of the demonstrations with the smallest loss under one network trains the other: a network learns
what is frequent before it has what is rare by heart, and two of them do not share all errors. The
loss of a demonstration is its mean over trained tokens, nats. Unlike the cut of `cleaned_sft`, it
needs the share of wrong demonstrations.

The paper gives both networks one batch and other initial weights. Two copies of pretrained weights
would stay equal, so here they begin alike and read different rows, twice as many as SFT per step.
The first one is the result.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dpr_jax.config.fields import setting
from dpr_jax.data.batches import SFTBatch
from dpr_jax.data.loader import sft_batches
from dpr_jax.losses import make_sft_loss
from dpr_jax.methods.base import make_step, make_training
from dpr_jax.methods.from_start import FromStart
from dpr_jax.methods.programs import device_bytes
from dpr_jax.methods.sft import sft_programs
from dpr_jax.models import token_logprobs
from dpr_jax.training.steps import TrainState, TrainStep


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoTeaching(FromStart):
  """See the module docstring."""

  kind = "co_teaching"
  title = "Co-teaching"

  noise_rate: float = setting(
      0.2, "share of the demonstrations that is left out at last; that of the wrong ones", low=0,
      below=1,
  )
  ramp: float = setting(
      0.2, "fraction of the steps, T_k / steps, over which that share grows from 0", above=0, high=1
  )

  def build(self, run, name):
    budget = self.budget(run.config)
    train_step = make_step(make_sft_loss(run.model), budget)
    step = CoTeachingStep(run.model, train_step, self.noise_rate, self.ramp * budget.steps)
    batches = sft_batches(run.data.rows, 2 * budget.batch_size, run.config.seed)
    start = lambda: run.initial_variables("float32")
    return make_training(run, name, step, train_step.optimizer, batches, start)

  def programs(self, shapes, name):
    budget = self.budget(shapes.config)
    (program,) = sft_programs(shapes, name, budget)
    state = shapes.state(make_step(make_sft_loss(shapes.model), budget))
    other = device_bytes(state.trainable) + device_bytes(state.opt_state)
    return [dataclasses.replace(program, resident_bytes=program.resident_bytes + other)]


@dataclasses.dataclass(frozen=True)
class CoTeachingStep:
  """A step of both networks; the second is in `TrainState.control`."""

  model: Any
  train_step: TrainStep  # of SFT.
  noise_rate: float
  ramp_steps: float

  def init(self, variables, rng, frozen=None) -> TrainState:
    copy = jax.jit(lambda tree: jax.tree.map(jnp.array, tree))  # Its own buffers: both are donated.
    peer = self.train_step.init(copy(variables), rng, frozen)
    return self.train_step.init(variables, rng, frozen).replace(control=_carried(peer))

  def abstract(self, variables, rng) -> TrainState:
    state = self.train_step.abstract(variables, rng)
    return state.replace(control=_carried(state))

  def __call__(self, state: TrainState, batch: SFTBatch):
    own, peer = state.replace(control={}), state.replace(control={}, **state.control)
    done = jnp.minimum((state.step + 1) / self.ramp_steps, 1.0)
    # Every second row each, so that each device keeps about the rows that it holds.
    halves = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
    share = 1.0 - self.noise_rate * done
    easy = [
        half.replace(loss_mask=_easy(self.model, judge.variables, half, share))
        for half, judge in zip(halves, (peer, own), strict=True)
    ]
    own, metrics = self.train_step(own, easy[0])
    peer, of_peer = self.train_step(peer, easy[1])
    metrics |= {
        "tokens": metrics["tokens"] + of_peer["tokens"], "peer_loss": of_peer["loss"],
        "kept_tokens": metrics["tokens"] / jnp.sum(halves[0].loss_mask > 0),
    }
    return own.replace(control=_carried(peer)), metrics

  def compilations(self) -> int:
    """Programs of the update that were compiled."""
    return self.train_step.compilations()


def _carried(peer: TrainState) -> dict[str, Any]:
  return {"step": peer.step, "trainable": peer.trainable, "opt_state": peer.opt_state}


def easy_mask(model: Any, variables: Any, batch: SFTBatch, share: jax.Array) -> jax.Array:
  """The loss mask of the demonstrations with the smallest loss, 0 on the others, float32 [B, T].

  Args:
    share: of the demonstrations of the batch, in (0, 1]; rounded up to whole ones.
  """
  out = token_logprobs(model, variables, batch.tokens, batch.segment_ids)
  rows, length = batch.tokens.shape
  # A number for each demonstration of each row; segment 0 is padding and has no trained token.
  number_BxT = jnp.arange(rows)[:, None] * (length + 1) + batch.segment_ids
  total = lambda x_BxT: jax.ops.segment_sum(
      x_BxT.reshape(-1), number_BxT.reshape(-1), num_segments=rows * (length + 1)
  )
  on_BxT = (batch.loss_mask > 0).astype(jnp.float32)
  tokens_N = total(on_BxT)
  loss_N = total(-out.logp * on_BxT) / jnp.maximum(tokens_N, 1.0)
  loss_N = jnp.where(tokens_N > 0, loss_N, jnp.inf)
  # The float32 share of a whole number of demonstrations may lie just above it.
  number = jnp.ceil(share * jnp.sum(tokens_N > 0) - 1e-3).astype(jnp.int32)
  threshold = jnp.sort(loss_N)[jnp.maximum(number, 1) - 1]
  return jnp.where((loss_N <= threshold)[number_BxT], batch.loss_mask, 0.0)


_easy = jax.jit(easy_mask, static_argnums=0)

DEFAULTS = {"co_teaching": CoTeaching()}
