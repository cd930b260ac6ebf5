"""Loads sharded parameters from a file, one tensor at a time.

A stacked parameter is first allocated on its devices and then written in place, layer by layer.
Host memory therefore holds only one tensor of the file. There are no collectives: each process
reads the file and keeps its shards.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dpr_jax.errors import UserError
from dpr_jax.models import ModelConfig
from dpr_jax.sharding import shardings_of
from dpr_jax.weights.names import TensorSpec, abstract_params, flatten, unflatten

# Embeddings are read in blocks of rows of this size, as they are most of a small model.
BLOCK_BYTES = 64 << 20


class Source(Protocol):
  """Named tensors in the layout of Hugging Face files."""

  where: str  # name of the file or folder in error messages.
  shapes: Mapping[str, tuple[int, ...]]

  def dtype(self, name: str) -> Any:
    """Returns the dtype of the arrays that `read` returns."""

  def read(self, name: str, start: int, stop: int) -> np.ndarray:
    """Reads rows [start, stop) of a tensor."""


@functools.partial(jax.jit, donate_argnums=0)
def _write(buffer, block, start):
  return jax.lax.dynamic_update_slice_in_dim(buffer, block.astype(buffer.dtype), start, 0)


class Filler:
  """A global array that is written block by block along its first axis."""

  def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: Any):
    self._shape, self._dtype, self._sharding = shape, dtype, sharding
    everywhere = {None: tuple(slice(None) for _ in shape)}
    indices = everywhere if sharding is None else sharding.addressable_devices_indices_map(shape)
    self._parts = []
    for device, index in indices.items():
      bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape))
      with _on(device):
        buffer = jnp.zeros(tuple(b - a for a, b in bounds), dtype, device=device)
      self._parts.append([device, bounds, buffer])

  def write(self, start: int, block: np.ndarray) -> None:
    """Writes rows [start, start + len(block)) of the global array and waits for the copy."""
    for part in self._parts:
      device, ((low, high), *rest), buffer = part
      a, b = max(low, start), min(high, start + len(block))
      if a >= b:
        continue
      own = np.ascontiguousarray(block[(slice(a - start, b - start), *(slice(*x) for x in rest))])
      with _on(device):
        own = own if device is None else jax.device_put(own, device)
        part[2] = _write(buffer, own, np.int32(a - low))
    # The host block may be freed only after the copy; waiting also bounds the memory.
    jax.block_until_ready([part[2] for part in self._parts])

  def finish(self) -> jax.Array:
    parts, self._parts = [part[2] for part in self._parts], []
    if self._sharding is None:
      return parts[0]
    return jax.make_array_from_single_device_arrays(
        self._shape, self._sharding, parts, dtype=self._dtype
    )


def _on(device: jax.Device | None):
  """Returns a context in which single-device programs run, whatever mesh the caller has set."""
  one = np.asarray([jax.local_devices()[0] if device is None else device])
  return jax.set_mesh(jax.sharding.Mesh(one, ("one",)))


def check_names(source: Source, specs: list[TensorSpec], ignored: Callable[[str], bool]) -> None:
  """Raises UserError if a tensor is missing, has a wrong shape or would not be used."""
  for spec in specs:
    if spec.name not in source.shapes:
      raise UserError(f"{source.where}: tensor {spec.name!r} is missing; the model has it with "
                      f"shape {list(spec.shape)}")
    shape = tuple(source.shapes[spec.name])
    if shape != spec.shape:
      raise UserError(f"{source.where}: tensor {spec.name!r} has shape {list(shape)}, but in the "
                      f"model {list(spec.shape)}")
  left = sorted(set(source.shapes) - {spec.name for spec in specs})
  left = [name for name in left if not ignored(name)]
  if left:
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    raise UserError(f"{source.where}: tensor {left[0]!r}{more} has no place in the model of this "
                    "config")


def fill_params(
    cfg: ModelConfig, specs: list[TensorSpec], source: Source, dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Any]:
  """Reads all tensors and returns the plain parameter tree of `Transformer(cfg)`.

  Args:
    specs: the tensors of `source`, checked with `check_names`.
    dtype: of the parameters; None keeps the stored dtype.
    mesh: None means the mesh set by `jax.set_mesh`, else the default device.
  """
  mesh = jax.sharding.get_mesh() if mesh is None else mesh
  boxed = abstract_params(cfg)
  shardings = flatten(shardings_of(boxed, mesh)) if not mesh.empty else {}
  by_path: dict[tuple[str, ...], list[TensorSpec]] = {}
  for spec in specs:
    by_path.setdefault(spec.path, []).append(spec)
  params = {}
  for path, leaf in flatten(boxed).items():
    stored = jnp.result_type(*(source.dtype(spec.name) for spec in by_path[path]))
    filler = Filler(leaf.value.shape, jnp.dtype(dtype or stored), shardings.get(path))
    for spec in by_path[path]:
      if spec.repeat is not None:
        filler.write(spec.repeat, spec.to_param(source.read(spec.name, 0, spec.shape[0]))[None])
        continue
      row_bytes = 4 * int(np.prod(spec.shape[1:]))
      rows = max(1, BLOCK_BYTES // row_bytes)
      for start in range(0, spec.shape[0], rows):
        stop = min(start + rows, spec.shape[0])
        filler.write(start, source.read(spec.name, start, stop))
    params[path] = filler.finish()
  return unflatten(params)
