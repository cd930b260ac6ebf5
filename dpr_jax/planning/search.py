"""Which meshes are worth compiling: a coarse estimate of memory and time of every candidate.

The estimate only orders the candidates and drops hopeless ones; what a plan reports comes from the
compiled programs.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax

from dpr_jax.config import RunConfig
from dpr_jax.errors import UserError
from dpr_jax.models import ModelConfig
from dpr_jax.planning import work as work_lib
from dpr_jax.planning.programs import planned_works
from dpr_jax.planning.topologies import Topology
from dpr_jax.planning.work import Shape, Work
from dpr_jax.run import check_mesh
from dpr_jax.sharding import MESH_AXES


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Of one mesh, before anything is compiled."""

  shape: Shape
  peak_bytes: float  # per device, of the largest program with what is resident beside it.
  seconds: float  # of one execution of every program.


def candidates(config: RunConfig, cfg: ModelConfig, devices: int) -> Iterator[Shape]:
  """Meshes that divide the devices, the heads and the rows of every batch.

  More than one replica (data > 1) is tried only where fsdp is at least 8: below, splitting
  parameters further costs less than copying them.
  """
  for tensor in range(1, devices + 1):
    if devices % tensor or cfg.num_heads % tensor or cfg.mlp_size % tensor:
      continue
    ways = devices // tensor
    for data in range(1, ways + 1):
      if ways % data or (data > 1 and ways // data < 8):
        continue
      shape = data, ways // data, tensor
      try:
        check_mesh(config, jax.sharding.AbstractMesh(shape, MESH_AXES))
      except UserError:
        continue
      yield shape


def estimate(
    works: Sequence[Work], cfg: ModelConfig, topology: Topology, shape: Shape
) -> Estimate:
  """The largest peak and the summed time of some work on `shape`."""
  memory, seconds = zip(*(work_lib.estimate(w, cfg, topology, shape) for w in works))
  return Estimate(shape, max(memory), sum(seconds))


def ranked(config: RunConfig, cfg: ModelConfig, topology: Topology) -> list[Estimate]:
  """All candidates, the fastest of those that seem to fit first, then the smallest of the rest."""
  shapes = list(candidates(config, cfg, topology.size))
  works = planned_works(config, cfg) if shapes else []
  room = topology.chip.hbm_bytes
  key = lambda e: (e.peak_bytes > room, e.seconds if e.peak_bytes <= room else e.peak_bytes)
  return sorted((estimate(works, cfg, topology, shape) for shape in shapes), key=key)
