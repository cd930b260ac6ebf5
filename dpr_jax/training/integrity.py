"""Fingerprints of arrays, kept beside a checkpoint: Orbax has no checksum over values.

A flipped bit in a stored array restores without complaint. The fingerprint of a leaf is a
position-weighted sum of its bits modulo 2^32: the order of the summation does not matter,
so it is the same on every mesh and with any number of processes, and is computed where
the shards are.
"""

from typing import Any

import jax
import jax.numpy as jnp

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _bits(x: jax.Array) -> jax.Array:
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  return jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]).astype(jnp.uint32)


@jax.jit
def _hashes(tree: Any) -> Any:
  def leaf(x):
    bits = _bits(x)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for dim, size in enumerate(bits.shape):
      index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
    # Weighted by position, so that two values that change places are seen.
    h = (bits ^ (index * jnp.uint32(2654435761))) * jnp.uint32(2246822519)
    return jnp.sum((h ^ (h >> 15)) * jnp.uint32(3266489917), dtype=jnp.uint32)

  return jax.tree.map(leaf, tree)


def fingerprint(tree: Any) -> dict[str, str]:
  """Path of each leaf -> 'dtype:hash', JSON. Waits for the arrays."""
  hashes = jax.tree_util.tree_leaves_with_path(jax.device_get(_hashes(tree)))
  return {
      jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}:{int(h):08x}"
      for (path, h), leaf in zip(hashes, jax.tree.leaves(tree))
  }


def stored_dtypes(fingerprints: dict[str, str], abstract: Any) -> Any:
  """`abstract` (ShapeDtypeStructs) with the dtypes in which its leaves were stored."""

  def leaf(path, x):
    stored = fingerprints.get(jax.tree_util.keystr(path, simple=True, separator="/"), "")
    dtype = stored.split(":")[0] or x.dtype
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

  return jax.tree_util.tree_map_with_path(leaf, abstract)
