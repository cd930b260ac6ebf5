"""Random keys: where every key of a run comes from.

JAX_DEFAULT_PRNG_IMPL=rbg, which is usual on TPU, changes what `jax.random.key` makes, and
`jax.vmap` over rbg keys uses the first of them only: all rows of a batch would share their noise.
Keys therefore name their implementation, and a seed means the same on every machine.
"""

import zlib

import jax
import numpy as np

IMPLEMENTATION = "threefry2x32"
MAX_SEED = 2**63 - 1


def make_key(seed: int) -> jax.Array:
  """The key of a seed in [0, MAX_SEED]; keys of different seeds differ in all 64 bits."""
  if not 0 <= seed <= MAX_SEED:
    raise ValueError(f"seed={seed} must be at least 0 and at most {MAX_SEED}")
  words = np.asarray([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
  return jax.random.wrap_key_data(words, impl=IMPLEMENTATION)


def root_key(seed: int, name: str) -> jax.Array:
  """The root key of what is called `name`; keys of different names are unrelated."""
  return jax.random.fold_in(make_key(seed), zlib.crc32(name.encode()))


def vectorizable(rng: jax.Array) -> jax.Array:
  """The key, or one made of it, such that `jax.vmap` gives all keys split from it own noise."""
  if str(jax.random.key_impl(rng)) == IMPLEMENTATION:
    return rng
  return jax.random.wrap_key_data(jax.random.bits(rng, (2,), np.uint32), impl=IMPLEMENTATION)


def row_keys(rng: jax.Array, rows: int) -> jax.Array:
  """A key for each row of a batch, [rows].

  Args:
    rng: one key, of any implementation, of which a row gets fold_in(rng, row); or [rows] keys of
      this module, which are returned.
  """
  if rng.ndim and jax.dtypes.issubdtype(rng.dtype, jax.dtypes.prng_key):
    if rng.shape != (rows,):
      raise ValueError(f"rng has the shape {rng.shape}; a key, or one for each of {rows} rows")
    return rng
  rng = vectorizable(rng)
  return jax.vmap(lambda row: jax.random.fold_in(rng, row))(np.arange(rows, dtype=np.int32))
