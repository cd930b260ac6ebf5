"""A linear model, small enough to check every number of the training machinery by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct


@struct.dataclass
class Rows:
  """Weighted regression rows."""

  x: jax.Array  # float32 [B, 3].
  y: jax.Array  # float32 [B].
  weight: jax.Array  # float32 [B].


def squared_loss(variables, batch, rng):
  """Sum of weighted squared errors; a metric that is a sum, one that is a ratio, one random."""
  params = variables["params"]
  error = batch.x @ params["kernel"] + params["bias"] - batch.y
  weight = jnp.sum(batch.weight)
  return (
      jnp.sum(batch.weight * jnp.square(error)) + jnp.sum(jnp.square(params.get("spare", 0.0))),
      weight,
      {
          "tokens": weight,
          "mean_error": (jnp.sum(batch.weight * error), weight),
          "noise": jax.random.uniform(rng),
      },
  )


@pytest.fixture
def loss_fn():
  return squared_loss


@pytest.fixture
def make_rows():
  def make(rng: np.random.Generator, rows: int = 12) -> Rows:
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return Rows(x=draw(rows, 3), y=draw(rows), weight=rng.integers(0, 4, rows).astype(np.float32))

  return make


@pytest.fixture
def make_state():
  """make_state(optimizer, seed=0, spare=0) -> a TrainState of the linear model at step 0.

  `spare` more parameters, only pulled towards zero, fill files of checkpoints.
  """
  from dpr_jax.training import TrainState

  def make(optimizer=None, seed: int = 0, spare: int = 0) -> TrainState:
    draw = np.random.default_rng(seed)
    params = {
        "kernel": jnp.asarray(draw.normal(size=3), jnp.float32),
        "bias": jnp.asarray(draw.normal(), jnp.float32),
    }
    if spare:
      params["spare"] = jnp.asarray(draw.normal(size=spare), jnp.float32)
    return TrainState.create({"params": params}, optimizer or optax.adam(0.1), jax.random.key(seed))

  return make


@pytest.fixture
def describe():
  """describe(tree): shapes, dtypes and shardings of its arrays."""
  return lambda tree: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


@pytest.fixture
def read_state():
  """read_state(Training, directory) -> the state of the newest checkpoint of a stage."""
  from dpr_jax.training.checkpoints import Checkpoints

  def read(training, directory):
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
      abstract = training.step.abstract(training.abstract, training.rng)
      return checkpoints.restore(abstract, training.frozen)[0]

  return read
