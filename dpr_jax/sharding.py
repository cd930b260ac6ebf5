"""Mesh, logical axis rules and checks: where every array of a run lives.

One mesh with three axes, in `AxisType.Auto`, so that GSPMD propagates shardings
and the model only names logical axes:

  data    replicas: parameters are copied, the batch is split
  fsdp    the batch is split and parameters are split; gathered when used (the table of
          embeddings and the output head only if they are less than what meets them)
  tensor  heads, MLP columns and the vocabulary are split

A logical axis that a mesh axis does not divide (8 KV heads on tensor=16, a
vocabulary of 261) is replicated rather than refused, so that one config runs on
any mesh; `check_rows` refuses what cannot be replicated: the rows of a batch.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dpr_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str | None, Any] = {
    None: None,
    # Parameters.
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "layers": None,
    # Activations. Heads, MLP columns and vocabulary reuse the names above.
    "batch": ("data", "fsdp"),
    "sequence": None,
    # The same where fsdp splits something else, see `models/table.py`.
    "replica_batch": "data",
    "fine_vocab": ("tensor", "fsdp"),
}


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Returns a mesh over `devices` (default: all); one axis may be -1, "the rest".

  Raises:
    UserError: the product of the axes is not the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = {"data": data, "fsdp": fsdp, "tensor": tensor}
  free = [name for name, size in shape.items() if size == -1]
  fixed = int(np.prod([size for size in shape.values() if size != -1]))
  if len(free) > 1 or min(shape.values()) < -1 or 0 in shape.values() or len(devices) % fixed:
    raise UserError(
        f"config.mesh: {shape} does not fit {len(devices)} devices; the axes must multiply to the "
        "number of devices, and one of them may be -1 (the rest)"
    )
  if free:
    shape[free[0]] = len(devices) // fixed
  if int(np.prod(list(shape.values()))) != len(devices):
    raise UserError(
        f"config.mesh: {shape} multiplies to {int(np.prod(list(shape.values())))} but there are "
        f"{len(devices)} devices; set one axis to -1 to take the rest"
    )
  # Axes may share a physical axis of a TPU: fsdp 8 x tensor 2 on 4x4 chips, which jax.make_mesh
  # refuses on all TPUs but v5e.
  grid = mesh_utils.create_device_mesh(
      tuple(shape.values()), devices, allow_split_physical_axes=True
  )
  return jax.sharding.Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def resolve(names: Sequence[str | None], shape: Sequence[int], mesh) -> PartitionSpec:
  """Logical axis names of an array -> PartitionSpec on `mesh` (concrete or abstract)."""
  spec = []
  for name, size in zip(names, shape, strict=True):
    axes = RULES[name]
    axes = (axes,) if isinstance(axes, str) else (axes or ())
    axes = tuple(a for a in axes if a in mesh.shape)
    ways = int(np.prod([mesh.shape[a] for a in axes]))
    if not axes or size % ways:
      spec.append(None)
    else:
      spec.append(axes if len(axes) > 1 else axes[0])
  return PartitionSpec(*spec)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Constrains an activation to its logical axes; identity when no mesh is set."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, resolve(names, x.shape, mesh))


def mesh_shape() -> tuple[int, int, int]:
  """(data, fsdp, tensor) of the mesh that is set; ones without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return (1, 1, 1) if mesh.empty else tuple(mesh.shape.get(name, 1) for name in MESH_AXES)


def batch_ways() -> int:
  """Into how many parts the mesh that is set splits a batch; 1 without a mesh."""
  data, fsdp, _ = mesh_shape()
  return data * fsdp


def vocab_ways(vocab_size: int) -> int:
  """Into how many parts the mesh that is set splits a vocabulary over tensor."""
  tensor = mesh_shape()[2]
  return tensor if vocab_size % tensor == 0 else 1


def without_fsdp(names: Sequence[str | None]) -> tuple[str | None, ...]:
  """The axes of a parameter where it is used: gathered over fsdp, still split over tensor."""
  return tuple(None if RULES[name] == "fsdp" else name for name in names)


def gather_weight(w: jax.Array, dtype: Any, names: Sequence[str | None]) -> jax.Array:
  """A parameter as a matmul takes it: in `dtype` and gathered over the fsdp axis.

  The cotangent is put straight onto the shard: left to itself the partitioner sums whole gradients
  over all devices (an all-reduce where a reduce-scatter would do) and then slices them. A weight
  that is gathered already, as while decoding, stays as it is. Identity but for the cast without a
  mesh.

  Args:
    w: [...], with the logical axes `names`.
  """
  return move(w, dtype, names, without_fsdp(names), (names,))


def move(
    x: jax.Array,
    dtype: Any,
    names: Sequence[str | None],
    to: Sequence[str | None],
    back: Sequence[Sequence[str | None]],
) -> jax.Array:
  """`x`, which lies as the logical axes `names` say, in `dtype` and as `to` says.

  Cast before it moves, so that `dtype` moves and not float32. Where nothing is split over fsdp,
  over which alone things move, the cast is all.

  Args:
    x: any shape, with as many dims as the names of each of the following.
    names, to: logical axes of each dim.
    back: where the cotangent of the result goes, one after the other.
  """
  if mesh_shape()[1] == 1:
    return x.astype(dtype)
  own_dtype = x.dtype

  @jax.custom_vjp
  def moved(x):
    if own_dtype != dtype:
      x = constrain(x.astype(dtype), *names)
    return constrain(x, *to)

  def backward(_, cotangent):
    for where in back:
      cotangent = constrain(cotangent, *where)
    return (cotangent.astype(own_dtype),)

  moved.defvjp(lambda x: (moved(x), None), backward)
  return moved(x)


def shardings_of(boxed: Any, mesh: jax.sharding.Mesh) -> Any:
  """NamedShardings of a tree of (abstract) arrays boxed with logical axis names.

  Leaves without a box (step counters, rng keys, optimizer scalars) are replicated.
  """

  def leaf(x):
    if isinstance(x, nn.LogicallyPartitioned):
      return NamedSharding(mesh, resolve(x.names, x.value.shape, mesh))
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree.map(leaf, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Rows of a batch over data and fsdp; all other dims replicated."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def check_rows(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, name: str, rows: int) -> None:
  """Raises ValueError, naming `name`, where the mesh does not divide a number of rows."""
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if rows <= 0 or rows % ways:
    raise ValueError(f"{name}={rows} is not divisible by mesh.data * mesh.fsdp = {ways}; use a "
                     f"positive multiple of {ways}")


def place(batch: Any, mesh: jax.sharding.Mesh) -> Any:
  """Puts a host batch onto the mesh as global arrays.

  Every process passes the whole batch, the same one; each keeps the rows of its own devices,
  in whatever order the mesh has them.
  """
  sharding = batch_sharding(mesh)

  def leaf(x):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree.map(leaf, batch)


def to_host(tree: Any) -> Any:
  """Full copies of (possibly sharded) arrays as numpy, the same in every process."""

  def leaf(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
      x = jax.jit(lambda a: a, out_shardings=replicated(x.sharding.mesh))(x)
      return np.asarray(x.addressable_data(0))
    return np.asarray(x)

  return jax.tree.map(leaf, tree)


def barrier(name: str) -> None:
  """Waits for all processes: process 0 has written files that others are about to read."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)
