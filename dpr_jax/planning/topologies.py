"""Chips and topologies that a program can be compiled for without having them.

A topology is written KIND:SHAPE, as in v5e:4x4 (16 chips), v5p:2x2x2 (8) or h100:8.
"""

import dataclasses
import math
import os
import re
from typing import Any

from dpr_jax.errors import UserError
from dpr_jax.planning.compiler_log import captured


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one device has. Peak figures of the manufacturer; nothing here was measured."""

  platform: str  # tpu | gpu.
  hbm_bytes: int  # that a program may use: of a TPU what its compiler allows.
  flops: float  # bfloat16, FLOP/s.
  hbm_bandwidth: float  # bytes/s.
  ici_bandwidth: float  # bytes/s that a device can receive over all its links to the others.
  dims: int  # of the shape of a topology.


_GIB = 2**30

# TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "key chip specifications". The interconnect
# there counts both directions (v5e 400, v5p 1200, v6e 800 GB/s a chip); receiving is half of it.
# v4: six links of 50 GB/s in each direction (Jouppi et al. 2023, arXiv 2304.01433).
# A chip at the border of a slice that does not wrap round has fewer links; the bound ignores it.
# hbm_bytes is what the compiler reports as available; of 16, 32 and 95 GiB it reserves some.
# GPU: NVIDIA's data sheet of the H100 SXM5, dense bfloat16; NVLink 900 GB/s in both directions.
CHIPS: dict[str, Chip] = {
    "v4": Chip("tpu", int(31.25 * _GIB), 275e12, 1.2e12, 300e9, 3),
    "v5e": Chip("tpu", int(15.75 * _GIB), 197e12, 819e9, 200e9, 2),
    "v5p": Chip("tpu", int(95.0 * _GIB), 459e12, 2765e9, 600e9, 3),
    "v6e": Chip("tpu", int(31.25 * _GIB), 918e12, 1600e9, 400e9, 2),
    "h100": Chip("gpu", 80 * 10**9, 989e12, 3350e9, 450e9, 1),
}

# What XLA must know of a GPU to compile for it without one.
_H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32
shared_memory_per_block: 49152 shared_memory_per_core: 233472 threads_per_core_limit: 2048
core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
registers_per_block_limit: 65536 } platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 2 } device_description_str: "NVIDIA H100 80GB HBM3"
"""

MISSING_LIBTPU = (
    "planning for a TPU needs its compiler, libtpu, which runs on a CPU: pip install "
    "'dpr_jax[tpu-plan]' (from a checkout: pip install -e '.[tpu-plan]')"
)


@dataclasses.dataclass(frozen=True)
class Topology:
  """A number of chips and how they are connected."""

  name: str  # v5e:4x4
  kind: str  # v5e
  shape: tuple[int, ...]  # (4, 4)

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  @property
  def size(self) -> int:
    return math.prod(self.shape)


def parse_topology(name: str) -> Topology:
  """v5e:4x4 -> Topology.

  Raises:
    UserError: an unknown chip or a malformed shape; names those that are known.
  """
  known = "known: " + ", ".join(f"{k}:{'x'.join(['N'] * c.dims)}" for k, c in CHIPS.items())
  kind, _, shape = name.partition(":")
  if kind not in CHIPS:
    raise UserError(f"--topology={name}: {kind!r} is not a known chip; {known}")
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 != CHIPS[kind].dims:
    example = {1: "8", 2: "4x4", 3: "2x2x2"}[CHIPS[kind].dims]
    raise UserError(f"--topology={name}: the shape of a {kind} has {CHIPS[kind].dims} dims, as in "
                    f"{kind}:{example}")
  return Topology(name, kind, tuple(int(n) for n in shape.split("x")))


def prepare_environment() -> None:
  """Before JAX starts: the host computes on its CPU, and libtpu looks for no TPU around it."""
  for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("JAX_PLATFORMS", "cpu"),
                      ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"),
                      ("TPU_ACCELERATOR_TYPE", "v5litepod-1")):
    os.environ.setdefault(name, value)
  # Compilers log to stderr, where `compiler_log` reads it; libtpu would write to files alone.
  for name, value in (("TPU_STDERR_LOG_LEVEL", "0"), ("TPU_MIN_LOG_LEVEL", "0"),
                      ("TF_CPP_MIN_LOG_LEVEL", "1")):
    os.environ[name] = value


def describe(topology: Topology) -> list[Any]:
  """Compile-only devices of a topology.

  Raises:
    UserError: libtpu is not installed, or its compiler does not know the shape.
  """
  import importlib.util

  from jax.experimental import topologies

  if topology.chip.platform == "gpu":
    what = dict(topology_name="", platform="cuda", target_config=_H100)
    what["topology"] = f"1x1x{topology.size}"
    refused = ("compiling for a GPU needs jax's CUDA plugin: pip install 'dpr_jax[cuda12]' (from a "
               "checkout: pip install -e '.[cuda12]'): {}")
  elif importlib.util.find_spec("libtpu") is None:
    raise UserError(MISSING_LIBTPU)
  else:
    what = dict(topology_name=topology.name, platform="tpu")
    if topology.size == 1:
      what["chips_per_host_bounds"] = [1, 1, 1]
    refused = ("the TPU compiler refuses it ({}); shapes that exist are 4x4, 8x8 or 16x16 of v5e "
               "and v6e, 2x2x1, 2x2x2 or 4x4x4 of v4 and v5p")
  try:
    with captured():
      return list(topologies.get_topology_desc(**what).devices)
  except Exception as e:
    first = (str(e).strip() or type(e).__name__).splitlines()[0][:160]
    raise UserError(f"--topology={topology.name}: {refused.format(first)}") from None
