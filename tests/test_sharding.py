"""Meshes and axis rules on one device; multi_device/ tests the rest."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dpr_jax import sharding
from dpr_jax.errors import UserError


def _mesh(**shape):
  """An abstract mesh, because rules depend on its shape only."""
  return jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))


def test_rules_split_what_divides_and_replicate_the_rest():
  mesh = _mesh(data=2, fsdp=2, tensor=4)
  resolve = lambda names, shape: sharding.resolve(names, shape, mesh)
  assert resolve(("vocab", "embed"), (64, 16)) == P("tensor", "fsdp")
  assert resolve(("vocab", "embed"), (261, 16)) == P(None, "fsdp")
  kernel = resolve(("layers", "embed", "kv_heads", "head_dim"), (3, 16, 2, 8))
  assert kernel == P(None, "fsdp", None, None)  # 2 heads over 4.
  assert resolve(("batch", "sequence"), (8, 5)) == P(("data", "fsdp"), None)
  assert resolve(("batch", None), (6, 5)) == P(None, None)  # 6 rows over 4.
  with pytest.raises(KeyError, match="colour"):
    resolve(("colour",), (3,))


def test_constraints_without_a_mesh_are_the_identity():
  x = np.ones((3, 4), np.float32)
  assert sharding.constrain(x, "batch", "sequence") is x


@pytest.mark.parametrize("shape", [
    dict(data=-1, fsdp=-1), dict(data=0), dict(data=-2, fsdp=-1), dict(data=2, fsdp=1),
    dict(data=-2, fsdp=-4, tensor=1), dict(data=3),
])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(shape):
  with pytest.raises(UserError, match=r"^mesh \{.*1 devices"):
    sharding.make_mesh(**shape, devices=jax.devices()[:1])


def test_one_axis_takes_the_rest():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
  assert all(t == jax.sharding.AxisType.Auto for t in mesh.axis_types)


def test_rows_that_the_mesh_does_not_divide_are_refused_by_name():
  for mesh in (_mesh(data=2, fsdp=4, tensor=1), _mesh(data=8, fsdp=1, tensor=3)):
    sharding.check_rows(mesh, "batch_size", 16)
    for rows in (12, 0, -8):
      with pytest.raises(ValueError, match=rf"^batch_size={rows} is not divisible .* = 8; .* of 8"):
        sharding.check_rows(mesh, "batch_size", rows)


def test_place_and_back(rng):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  batch = {"x": rng.normal(size=(4, 3)).astype(np.float32), "n": np.arange(4, dtype=np.int32)}
  placed = sharding.place(batch, mesh)
  assert all(x.sharding == sharding.batch_sharding(mesh) for x in placed.values())
  back = sharding.to_host(placed)
  assert all(isinstance(x, np.ndarray) for x in back.values())
  jax.tree.map(np.testing.assert_array_equal, back, batch)
