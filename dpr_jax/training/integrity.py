"""Fingerprints of the arrays and files of a checkpoint: Orbax has no checksum over values.

A flipped bit in a stored array restores without complaint. The fingerprint of a leaf is a
position-weighted sum of its bits modulo 2^32: the order of the summation does not matter,
so it is the same on every mesh and with any number of processes, and is computed where
the shards are.

files.json, beside the items of a checkpoint, has the size of every file and the fingerprint of
the small ones. It tells a damaged checkpoint from one that cannot be read for another reason.
"""

import json
from collections.abc import Container, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from dpr_jax import fingerprints

_FILES, _SMALL = "files.json", 1 << 20  # bytes; larger files hold arrays alone.
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


def _files_in(folder: epath.Path) -> Iterator[epath.Path]:
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from _files_in(path)
    else:
      yield path


def record_files(folder: epath.Path) -> None:
  """Writes files.json of a checkpoint: of its items, for Orbax goes on writing beside them."""
  found = {}
  for path in (p for item in folder.iterdir() if item.is_dir() for p in _files_in(item)):
    size = path.stat().length
    small = fingerprints.of_bytes(path.read_bytes()) if size <= _SMALL else ""
    found[str(path.relative_to(folder))] = [size, small]
  (folder / _FILES).write_text(json.dumps(fingerprints.seal({"files": found})))


def changed_file(folder: epath.Path, items: Container[str]) -> str:
  """Names a file of some items that is not the one that was written; "" if there is none.

  Raises:
    OSError: a file is there but cannot be read.
  """
  try:
    record = json.loads((folder / _FILES).read_text())
  except (FileNotFoundError, ValueError):
    return ""
  for name, (size, small) in record["files"].items() if fingerprints.is_whole(record) else ():
    path = folder / name
    if name.split("/")[0] not in items:
      continue
    if not path.exists():
      return f"{name} is missing"
    if path.stat().length != size:
      return f"{name} has {path.stat().length} bytes instead of {size}"
    if small and fingerprints.of_bytes(path.read_bytes()) != small:
      return f"{name} is not what was saved"
  return ""
