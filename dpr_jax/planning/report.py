"""Compiles programs and puts what the compiler reports next to what the chip could do.

Every figure is of one device and of one execution of a program. The roofline bounds are not
measurements: the time that the arithmetic, the bytes moved through HBM or the interconnect alone
would take at the peak rates of the chip. A program cannot be faster than the longest of them.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dpr_jax import sharding
from dpr_jax.config import RunConfig
from dpr_jax.methods.programs import Program
from dpr_jax.models import ModelConfig
from dpr_jax.models.attention import resolve_backend
from dpr_jax.planning import hlo
from dpr_jax.planning import work as work_lib
from dpr_jax.planning.compiler_log import captured
from dpr_jax.planning.programs import make_programs
from dpr_jax.planning.topologies import Topology
from dpr_jax.planning.work import Shape

# What a plan has for each program, in this order; None where the compiler did not get so far.
KEYS = (
    "fits", "argument_bytes", "temp_bytes", "output_bytes", "alias_bytes", "peak_bytes",
    "resident_bytes", "exhausted_bytes", "compiler_message", "flops", "hbm_bytes_moved",
    "collective_bytes", "collective_count", "minimum_bytes", "involuntary_rematerializations",
    "bound_seconds", "compile_seconds",
)


def not_compiled() -> dict[str, Any]:
  """The entry of a program of which nothing is known."""
  return dict.fromkeys(KEYS)


def compile_program(program: Program, topology: Topology) -> dict[str, Any]:
  """Memory and collectives of one program; `fits` False where the compiler runs out of HBM."""
  start = time.monotonic()
  lowered = program.lower()
  entry = {**not_compiled(), "resident_bytes": int(program.resident_bytes)}
  compiled = None
  try:
    with captured() as log:
      compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    needed = re.search(r"([\d.]+)([GM])\)? exceeds|Used ([\d.]+)([GM]) of", str(e))
    number, unit = ([x for x in needed.groups() if x] if needed else ("0", "G"))
    entry.update(
        fits=False,
        compiler_message=" ".join(str(e).split())[:200],
        exhausted_bytes=int(float(number) * (2**30 if unit == "G" else 2**20)),
    )
  entry["involuntary_rematerializations"] = log.rematerializations
  entry["compile_seconds"] = round(time.monotonic() - start, 1)
  if compiled is None:
    return entry
  memory = compiled.memory_analysis()
  found = hlo.collectives(compiled.as_text(), work_lib.loop_trips(program.work))
  peak = memory.peak_memory_in_bytes or (
      memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
      - memory.alias_size_in_bytes
  )
  return entry | {
      "fits": peak + program.resident_bytes <= topology.chip.hbm_bytes,
      "argument_bytes": memory.argument_size_in_bytes,
      "temp_bytes": memory.temp_size_in_bytes,
      "output_bytes": memory.output_size_in_bytes,
      "alias_bytes": memory.alias_size_in_bytes,
      "peak_bytes": peak,
      "collective_bytes": {k: int(v) for k, v in sorted(found.bytes.items())},
      "collective_count": dict(sorted(found.count.items())),
  }


def add_bounds(
    entry: dict[str, Any], program: Program, cfg: ModelConfig, topology: Topology, shape: Shape
) -> None:
  """Adds the work of a compiled program, and how long each kind of it takes at least."""
  work, chip = program.work, topology.chip
  done = work_lib.total_flops(work, cfg) / topology.size
  state_bytes = entry["argument_bytes"] + entry["output_bytes"]
  moved = work_lib.hbm_bytes(work, cfg, shape, state_bytes)
  least = work_lib.minimum_received(work, cfg, shape)
  entry.update(
      flops=done,
      hbm_bytes_moved=int(moved),
      minimum_bytes=least and {name: int(n) for name, n in least.items()},
      bound_seconds={
          "compute": done / chip.flops,
          "hbm": moved / chip.hbm_bandwidth,
          "ici": sum(entry["collective_bytes"].values()) / chip.ici_bandwidth,
      },
  )


def plan_mesh(
    config: RunConfig, cfg: ModelConfig, topology: Topology, devices: list[Any], shape: Shape,
    on_program: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
  """{"mesh", "fits", "attention", "batch", "programs", "tokens_per_second_bound"} of one mesh.

  Stops at the first program that does not fit, as the mesh is lost then. "attention" is what
  computes it over rows of SFT, "batch" the work of each program.

  Raises:
    UserError: the mesh divides neither the devices nor a batch, or the platform has no such
      attention; names the field.
  """
  mesh = sharding.make_mesh(*shape, devices=devices)
  programs = make_programs(config, cfg, mesh)
  entries = {p.name: not_compiled() for p in programs}
  with jax.set_mesh(mesh):
    attention = resolve_backend(cfg, config.data.row_length)
  for program in programs:
    on_program(program.name)
    with jax.set_mesh(mesh):
      entry = entries[program.name] = compile_program(program, topology)
    if entry["peak_bytes"] is not None:
      add_bounds(entry, program, cfg, topology, shape)
    if not entry["fits"]:
      break
  return {
      "mesh": dict(zip(sharding.MESH_AXES, shape)),
      "fits": all(entry["fits"] is True for entry in entries.values()),
      "attention": attention,
      "batch": {p.name: dataclasses.asdict(p.work) for p in programs},
      "programs": entries,
      "tokens_per_second_bound": speeds(programs, entries),
  }


def bound(entry: dict[str, Any]) -> float:
  """Seconds below which a program cannot be, 0 if it was not compiled."""
  return max(entry["bound_seconds"].values()) if entry["bound_seconds"] else 0.0


def peak_bytes(entry: dict[str, Any]) -> int:
  """Peak memory of a program, together with what is resident beside it."""
  return (entry["peak_bytes"] or entry["exhausted_bytes"] or 0) + (entry["resident_bytes"] or 0)


def out_of_memory(entry: dict[str, Any]) -> bool:
  """Whether the compiler ran out of memory."""
  return entry["fits"] is False and entry["peak_bytes"] is None


def speeds(
    programs: Sequence[Program], entries: dict[str, dict[str, Any]]
) -> dict[str, float | None]:
  """Stage -> tokens per second of all devices together, at most.

  None where a program of the stage was not compiled, or does not fit.
  """
  out = {}
  for stage in dict.fromkeys(p.stage for p in programs):
    own = [p for p in programs if p.stage == stage]
    seconds = sum(bound(entries[p.name]) for p in own)
    fits = all(entries[p.name]["fits"] for p in own)
    out[stage] = sum(p.tokens for p in own) / seconds if fits else None
  return out
