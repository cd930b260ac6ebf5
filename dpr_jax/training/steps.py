"""The train step: gradients of sums, one division, one optimizer update, one jit.

    loss_fn(variables, batch, rng) -> (loss_sum, weight, metrics)
    train_step = make_train_step(loss_fn, optimizer)
    state, metrics = train_step(state, batch)
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dpr_jax.data.batches import rows_apart

LossFn = Callable[[Any, Any, Any], tuple[jax.Array, jax.Array, dict[str, Any]]]


@struct.dataclass
class TrainState:
  """Everything an update needs, and everything a resumed run must get back."""

  step: jax.Array  # int32 [], updates done.
  trainable: Any  # variables that are updated: {"params": ...}, or {"lora": ...}.
  opt_state: Any  # of the optimizer, over `trainable`.
  rng: jax.Array  # typed PRNG key of the stage; a step's key is fold_in(rng, step).
  frozen: Any = struct.field(default_factory=dict)  # variables that are not: {} or {"params": ...}.
  ema: Any = struct.field(default_factory=dict)  # moving average of `trainable`; {} keeps none.
  # What an algorithm carries from step to step: an adaptive beta (a float32 scalar), a second
  # network (a tree).
  control: Any = struct.field(default_factory=dict)

  @property
  def variables(self) -> dict[str, Any]:
    """What `model.apply` and a loss take."""
    return {**self.frozen, **self.trainable}

  @classmethod
  def create(
      cls,
      variables: Any,
      optimizer: optax.GradientTransformation,
      rng: jax.Array,
      frozen: Any = None,
      *,
      ema: bool = False,
      control: Mapping[str, float] | None = None,
  ) -> "TrainState":
    """A state at step 0, which takes over `variables`: a train step donates their buffers.

    Optimizer moments are laid out like the variables they belong to.

    Args:
      ema: keep a moving average of `variables`, which starts as a copy of them.
      control: initial values of `TrainState.control`.
    """
    variables = jax.tree.map(jnp.asarray, variables)
    shardings = state_shardings(variables, optimizer, frozen, ema=ema, control=control)
    # Committed to where they are: the arrays of later steps are, and would compile a second time.
    variables = jax.device_put(variables, shardings.trainable)
    return cls(
        step=jax.device_put(jnp.zeros((), jnp.int32), shardings.step),
        trainable=variables,
        opt_state=jax.jit(optimizer.init, out_shardings=shardings.opt_state)(variables),
        rng=jax.device_put(rng, shardings.rng),
        frozen=frozen or {},
        ema=_copy(variables, shardings.ema) if ema else {},
        control={
            k: jax.device_put(jnp.float32(v), shardings.control[k])
            for k, v in (control or {}).items()
        },
    )


def _copy(tree: Any, shardings: Any) -> Any:
  """Buffers of its own: both the tree and the copy will be donated."""
  return jax.jit(lambda x: jax.tree.map(jnp.array, x), out_shardings=shardings)(tree)


def state_shardings(
    variables: Any,
    optimizer,
    frozen: Any = None,
    *,
    ema: bool = False,
    control: Mapping[str, float] | None = None,
) -> TrainState:
  """Shardings of a TrainState from those of its (abstract or concrete) variables."""
  own = jax.tree.map(lambda x: x.sharding, variables)
  first = jax.tree.leaves(own)[0]
  single = (
      jax.sharding.NamedSharding(first.mesh, jax.sharding.PartitionSpec())
      if isinstance(first, jax.sharding.NamedSharding)
      else first
  )
  opt_state = optax.tree.map_params(
      optimizer,
      lambda _, sharding: sharding,
      jax.eval_shape(optimizer.init, variables),
      own,
      transform_non_params=lambda _: single,
  )
  return TrainState(
      step=single,
      trainable=own,
      opt_state=opt_state,
      rng=single,
      frozen=jax.tree.map(lambda x: x.sharding, frozen or {}),
      ema=own if ema else {},
      control={name: single for name in control or {}},
  )


def abstract_state(
    variables: Any,
    optimizer,
    rng: jax.Array,
    *,
    ema: bool = False,
    control: Mapping[str, float] | None = None,
) -> TrainState:
  """The TrainState as ShapeDtypeStructs with shardings, to restore against."""
  shardings = state_shardings(variables, optimizer, ema=ema, control=control)
  shapes = TrainState(
      step=jax.ShapeDtypeStruct((), jnp.int32),
      trainable=variables,
      opt_state=jax.eval_shape(optimizer.init, variables),
      rng=jax.eval_shape(lambda: rng),
      ema=variables if ema else {},
      control={name: jax.ShapeDtypeStruct((), jnp.float32) for name in control or {}},
  )
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )


def _pairs(metrics: dict[str, Any]) -> dict[str, tuple[jax.Array, jax.Array | None]]:
  return {k: v if isinstance(v, tuple) else (v, None) for k, v in metrics.items()}


def reduce_metrics(metrics: dict[str, Any]) -> dict[str, jax.Array]:
  """Sums stay sums; a pair (sum, weight) becomes their ratio (0 where the weight is 0)."""
  return {
      k: total if weight is None else total / jnp.where(weight == 0, 1, weight)
      for k, (total, weight) in _pairs(metrics).items()
  }


def accumulate(loss_fn: LossFn, trainable, frozen, batch, rng, parts: int):
  """Gradient, loss_sum, weight and metrics, summed over `parts` micro-batches of the rows.

  What is `Shared` in the batch is in every micro-batch.
  """

  def sums(trainable, micro, key):
    loss_sum, weight, metrics = loss_fn({**frozen, **trainable}, micro, key)
    return loss_sum.astype(jnp.float32), (jnp.asarray(weight, jnp.float32), metrics)

  grad_fn = jax.value_and_grad(sums, has_aux=True)
  if parts == 1:
    (loss_sum, (weight, metrics)), grads = grad_fn(trainable, batch, rng)
    return grads, loss_sum, weight, metrics

  arrays, join = rows_apart(batch)
  rows = arrays[0].shape[0]
  if rows % parts:
    raise ValueError(f"accumulation={parts} does not divide the batch of {rows} rows")

  # Micro-batch i takes rows i, i + parts, ...: each device keeps the rows it holds, where
  # consecutive rows would move the batch between devices.
  def split(x):
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

  def body(total, xs):
    micro, key = xs
    (loss_sum, (weight, metrics)), grads = grad_fn(trainable, join(micro), key)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    return jax.tree.map(jnp.add, total, (grads, loss_sum, weight, metrics)), None

  xs = ([split(x) for x in arrays], jax.random.split(rng, parts))
  micro, key = jax.tree.map(lambda x: x[0], xs)
  shapes = jax.eval_shape(lambda m, k: grad_fn(trainable, join(m), k), micro, key)
  (loss_sum, (weight, metrics)), grads = shapes
  zeros = lambda tree: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree)
  grads = jax.tree.map(lambda g: jnp.zeros(g.shape, jnp.float32), grads)
  total, _ = jax.lax.scan(body, (grads, zeros(loss_sum), zeros(weight), zeros(metrics)), xs)
  return total


class TrainStep:
  """train_step(state, batch) -> (state, metrics), jitted at its first call; see `make_train_step`.

  It owns the optimizer, so that a state made by `init` always fits.
  """

  def __init__(
      self,
      loss_fn: LossFn,
      optimizer: optax.GradientTransformation,
      accumulation: int,
      ema_decay: float,
      donate: bool,
  ):
    self.optimizer = optimizer
    self._loss_fn, self._accumulation = loss_fn, accumulation
    self._ema_decay, self._donate = ema_decay, donate
    self._jitted = None

  def init(self, variables: Any, rng: jax.Array, frozen: Any = None) -> TrainState:
    """A state at step 0, which takes over `variables`."""
    return TrainState.create(variables, self.optimizer, rng, frozen, ema=self._ema_decay > 0)

  def abstract(self, variables: Any, rng: jax.Array) -> TrainState:
    """The shapes and shardings of such a state, from those of its variables."""
    return abstract_state(variables, self.optimizer, rng, ema=self._ema_decay > 0)

  def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    frozen, rng = state.frozen, state.rng
    inner, fixed = self._split(state)
    state, metrics = self._program(inner)(inner, fixed, batch)
    return state.replace(frozen=frozen, rng=rng), metrics

  def lower(self, state: TrainState, batch: Any) -> jax.stages.Lowered:
    """The program for these shapes, which may be abstract."""
    inner, fixed = self._split(state)
    return self._program(inner).lower(inner, fixed, batch)

  def compilations(self) -> int:
    """How many programs were compiled."""
    return 0 if self._jitted is None else self._jitted._cache_size()

  def _split(self, state: TrainState) -> tuple[TrainState, tuple[Any, Any]]:
    # What a step does not change stays outside of the donated state: frozen variables are shared
    # with other models, and the caller may use its key again.
    return state.replace(frozen={}, rng=None), (state.frozen, state.rng)

  def _program(self, inner: TrainState):
    if self._jitted is None:
      shardings = jax.tree.map(lambda x: x.sharding, inner)
      self._jitted = jax.jit(
          self._update,
          donate_argnums=(0,) if self._donate else (),
          out_shardings=(shardings, None),
      )
    return self._jitted

  def _update(self, state: TrainState, fixed, batch):
    frozen, rng = fixed
    key = jax.random.fold_in(rng, state.step)
    grads, loss_sum, weight, metrics = accumulate(
        self._loss_fn, state.trainable, frozen, batch, key, self._accumulation
    )
    safe = jnp.where(weight == 0, 1.0, weight)
    grads = jax.tree.map(lambda g: g / safe.astype(g.dtype), grads)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss_sum) & jnp.isfinite(grad_norm)

    def apply(trainable, opt_state, ema):
      updates, opt_state = self.optimizer.update(grads, opt_state, trainable)
      trainable = optax.apply_updates(trainable, updates)
      return trainable, opt_state, self._averaged(ema, trainable)

    # Without a token there is nothing to learn: momentum and weight decay do not act either.
    # A branch, not a where over new and old: that would need both at once.
    trainable, opt_state, ema = jax.lax.cond(
        finite & (weight != 0), apply, lambda *old: old, state.trainable, state.opt_state, state.ema
    )
    state = state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state, ema=ema)
    out = {"loss": loss_sum / safe, "grad_norm": grad_norm, "skipped": 1.0 - finite}
    out["empty"] = (weight == 0).astype(jnp.float32)
    return state, {**reduce_metrics(metrics), **out}

  def _averaged(self, ema, trainable):
    decay = self._ema_decay
    if not decay:
      return ema
    average = lambda old, new: (decay * old + (1.0 - decay) * new).astype(old.dtype)
    return jax.tree.map(average, ema, trainable)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    ema_decay: float = 0.0,
    donate: bool = True,
) -> TrainStep:
  """Returns train_step(state, batch) -> (state, metrics), jitted at its first call.

  The returned state keeps the shardings of the state that came in, and takes its buffers
  (`donate`); `state.frozen` and `state.rng` are never donated. The update is sum(gradients) /
  sum(weights) over micro-batches and devices. An update whose loss or gradient is not finite
  leaves variables and moments as they were and reports `skipped` = 1; so does one whose weights are
  0, which reports `empty` = 1.

  Args:
    loss_fn: see the module docstring. `rng` is a fresh key every step and micro-batch.
    optimizer: an optax transformation, clipping included (see `make_optimizer`).
    accumulation: micro-batches that a batch is split into, inside the jit.
    ema_decay: d of ema = d * ema + (1 - d) * variables after each update, for a state that keeps
      one (`train_step.init`, or `TrainState.create(..., ema=True)`); 0 keeps none.

  The metrics are device scalars: `loss`, `grad_norm`, `skipped`, `empty` and those of the loss.
  """
  return TrainStep(loss_fn, optimizer, accumulation, ema_decay, donate)
