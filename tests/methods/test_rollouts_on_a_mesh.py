"""Prompts and slots of rollouts split over a mesh, or the method says which field does not."""

import jax
import pytest

from dpr_jax.config import default_config, resolve
from dpr_jax.methods.dpr import DPR


@pytest.mark.parametrize("batch, samples, slots, match", [
  (16, 4, 0, r"^batch_size / samples_per_prompt=4 is not divisible .* 8"),
  (64, 1, 12, "^slots=12 is not divisible .* 8"),
])
def test_rollouts_that_do_not_split_are_refused(batch, samples, slots, match):
  mesh = jax.sharding.AbstractMesh((1, 8, 1), ("data", "fsdp", "tensor"))
  config = resolve(default_config())
  method = DPR(batch_size=batch, samples_per_prompt=samples, slots=slots)
  with pytest.raises(ValueError, match=match):
    method.check_mesh(mesh, config)
  # Of the last, more slots than rows: all are decoded at once.
  for fine in (DPR(batch_size=32, samples_per_prompt=4, slots=8), DPR(batch_size=16, slots=30)):
    fine.check_mesh(mesh, config)
