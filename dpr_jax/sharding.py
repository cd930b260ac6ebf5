"""The device mesh, the rules that map logical axes to mesh axes, and checks of batch sizes.

The mesh has three axes of type `AxisType.Auto`: the model only names logical axes, and GSPMD
propagates the shardings.

  data    replicates parameters and splits the batch
  fsdp    splits parameters and the batch; parameters are gathered for use (the embedding and the
          output head only if that moves fewer bytes than resharding the activations)
  tensor  splits heads, MLP columns and the vocabulary

A logical axis that a mesh axis does not divide (8 KV heads on tensor=16, a
vocabulary of 261) is replicated rather than refused, so that one config runs on
any mesh; `check_rows` refuses what cannot be replicated: the rows of a batch.
"""

import json
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dpr_jax import peers
from dpr_jax.errors import Stopped, UserError

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
    # Activations; heads, MLP columns and vocabulary use the names above.
    "batch": ("data", "fsdp"),
    "sequence": None,
    # Activations where fsdp splits the vocabulary or the columns: see `models/embedding.py`.
    "replica_batch": "data",
    "fine_vocab": ("tensor", "fsdp"),
}


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Returns a mesh over `devices` (default: all); an axis of -1 takes all remaining devices.

  Raises:
    UserError: the sizes of the axes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = {"data": data, "fsdp": fsdp, "tensor": tensor}
  free = [name for name, size in shape.items() if size == -1]
  fixed = int(np.prod([size for size in shape.values() if size != -1]))
  if len(free) > 1 or min(shape.values()) < -1 or 0 in shape.values() or len(devices) % fixed:
    raise UserError(
        f"mesh {shape} does not fit {len(devices)} devices; the axes must multiply to the number "
        "of devices, and one of them may be -1 (all remaining devices)"
    )
  if free:
    shape[free[0]] = len(devices) // fixed
  if int(np.prod(list(shape.values()))) != len(devices):
    raise UserError(
        f"mesh {shape} has {int(np.prod(list(shape.values())))} devices, but there are "
        f"{len(devices)} devices; set one axis to -1 to use all"
    )
  # Two axes may share a physical axis of a TPU, for example fsdp 8 x tensor 2 on 4x4 chips, which
  # jax.make_mesh supports on v5e only.
  grid = mesh_utils.create_device_mesh(
      tuple(shape.values()), devices, allow_split_physical_axes=True
  )
  return jax.sharding.Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def split_mesh(mesh: jax.sharding.Mesh, parts: int) -> list[jax.sharding.Mesh]:
  """Meshes of equal shape that share no device and together have all; [] where data is no multiple.

  A part holds a model as the whole does: only its axis `data` is shorter.
  """
  if mesh.shape["data"] % parts:
    return []
  return [jax.sharding.Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)
          for grid in np.split(mesh.devices, parts, axis=mesh.axis_names.index("data"))]


def resolve(names: Sequence[str | None], shape: Sequence[int], mesh) -> PartitionSpec:
  """Returns the PartitionSpec of logical axis `names` on `mesh` (concrete or abstract)."""
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
  """Constrains the sharding of `x` to its logical axes; the identity without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, resolve(names, x.shape, mesh))


def mesh_shape() -> tuple[int, int, int]:
  """Returns (data, fsdp, tensor) of the current mesh; ones without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return (1, 1, 1) if mesh.empty else tuple(mesh.shape.get(name, 1) for name in MESH_AXES)


def batch_ways() -> int:
  """Returns the number of parts into which the current mesh splits a batch; 1 without one."""
  data, fsdp, _ = mesh_shape()
  return data * fsdp


def vocab_ways(vocab_size: int) -> int:
  """Returns the number of parts into which tensor splits a vocabulary; 1 without a mesh."""
  tensor = mesh_shape()[2]
  return tensor if vocab_size % tensor == 0 else 1


def without_fsdp(names: Sequence[str | None]) -> tuple[str | None, ...]:
  """Returns the axes of a parameter gathered for use: over fsdp, but still split over tensor."""
  return tuple(None if RULES[name] == "fsdp" else name for name in names)


def gather_weight(w: jax.Array, dtype: Any, names: Sequence[str | None]) -> jax.Array:
  """Casts a parameter to `dtype` and gathers it over fsdp for a matmul; without a mesh only casts.

  The cotangent is constrained to the shards. Without this the partitioner sums whole gradients
  over all devices and then slices them: an all-reduce where a reduce-scatter suffices. A weight
  that is already gathered, as in decoding, is not gathered again.

  Args:
    w: an array of any rank, with the logical axes `names`.
  """
  return reshard(w, dtype, names, without_fsdp(names), (names,))


def reshard(
    x: jax.Array,
    dtype: Any,
    names: Sequence[str | None],
    to: Sequence[str | None],
    back: Sequence[Sequence[str | None]],
) -> jax.Array:
  """Casts `x` to `dtype` and reshards it from `names` to `to`.

  The cast comes first, so that the bytes moved are those of `dtype`. Only data that is split over
  fsdp is resharded; on a mesh with fsdp=1 the cast is the only operation.

  Args:
    x: an array of any rank.
    names, to: one logical axis for each dim.
    back: shardings of the cotangent in the backward pass, applied one after the other.
  """
  if mesh_shape()[1] == 1:
    return x.astype(dtype)
  own_dtype = x.dtype

  @jax.custom_vjp
  def resharded(x):
    if own_dtype != dtype:
      x = constrain(x.astype(dtype), *names)
    return constrain(x, *to)

  def backward(_, cotangent):
    for axes in back:
      cotangent = constrain(cotangent, *axes)
    return (cotangent.astype(own_dtype),)

  resharded.defvjp(lambda x: (resharded(x), None), backward)
  return resharded(x)


def shardings_of(boxed: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns the NamedShardings of a tree of (abstract) arrays boxed with logical axes.

  Leaves without a box (step counters, PRNG keys, optimizer scalars) are replicated.
  """

  def leaf(x):
    if isinstance(x, nn.LogicallyPartitioned):
      return NamedSharding(mesh, resolve(x.names, x.value.shape, mesh))
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree.map(leaf, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of a batch: rows split over data and fsdp, other dims replicated."""
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
  """Places a host batch onto the mesh as global arrays.

  Every process passes the same whole batch and keeps the rows of its own devices, whatever the
  order of devices in the mesh.
  """
  sharding = batch_sharding(mesh)

  def leaf(x):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree.map(leaf, batch)


def to_host(tree: Any) -> Any:
  """Copies (possibly sharded) arrays to numpy in full, the same in every process."""

  def leaf(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
      x = jax.jit(lambda a: a, out_shardings=replicated(x.sharding.mesh))(x)
      return np.asarray(x.addressable_data(0))
    return np.asarray(x)

  return jax.tree.map(leaf, tree)


def broadcast(value: Any) -> Any:
  """A JSON value of process 0, in every process; all of them must call it."""
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  with peers.waiting():
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    lead = jax.process_index() == 0
    data = multihost_utils.broadcast_one_to_all(data if lead else np.zeros(size, np.uint8))
  return json.loads(np.asarray(data).tobytes())


def barrier(name: str) -> None:
  """Waits for all processes, for example until process 0 has written files that others read.

  Raises:
    Stopped: one of several processes got a signal before.
  """
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    with peers.waiting():
      multihost_utils.sync_global_devices(name)
    if signum := peers.reached():
      raise Stopped(signum)
