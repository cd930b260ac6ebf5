"""Compiles programs and puts what the compiler says next to what the chip could do.

Every figure is of one device and of one execution of a program. The floors are bounds, not
measurements: the time that the arithmetic, the HBM traffic or the interconnect alone would take
at the peak rates of the chip. The longest of them bounds a program from below.
"""

import re
import time
from typing import Any

import jax

from dpr_jax import sharding
from dpr_jax.config import RunConfig
from dpr_jax.models import ModelConfig
from dpr_jax.planning import flops, hlo, traffic
from dpr_jax.planning.programs import NAMES, Program, make_programs
from dpr_jax.planning.search import Shape
from dpr_jax.planning.topologies import Topology


def compile_program(program: Program, topology: Topology, loop_trips: int) -> dict[str, Any]:
  """Memory and collectives of one program; `fits` False where the compiler runs out of HBM."""
  start = time.monotonic()
  lowered = program.lower()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    needed = re.search(r"([\d.]+)([GM])\)? exceeds|Used ([\d.]+)([GM]) of", str(e))
    number, unit = ([x for x in needed.groups() if x] if needed else ("0", "G"))
    return {
        "fits": False,
        "compiler_says": " ".join(str(e).split())[:200],
        "exhausted_bytes": int(float(number) * (2**30 if unit == "G" else 2**20)),
        "resident_bytes": int(program.resident_bytes),
        "compile_seconds": round(time.monotonic() - start, 1),
    }
  seconds = time.monotonic() - start
  memory = compiled.memory_analysis()
  found = hlo.collectives(compiled.as_text(), loop_trips)
  peak = memory.peak_memory_in_bytes or (
      memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
      - memory.alias_size_in_bytes
  )
  return {
      "fits": peak + program.resident_bytes <= topology.chip.hbm_bytes,
      "argument_bytes": memory.argument_size_in_bytes,
      "temp_bytes": memory.temp_size_in_bytes,
      "output_bytes": memory.output_size_in_bytes,
      "alias_bytes": memory.alias_size_in_bytes,
      "peak_bytes": peak,
      "resident_bytes": int(program.resident_bytes),
      "collective_bytes": {k: int(v) for k, v in sorted(found.bytes.items())},
      "collective_count": dict(sorted(found.count.items())),
      "compile_seconds": round(seconds, 1),
  }


def _work(
    name: str, config: RunConfig, cfg: ModelConfig, shape: Shape, entry: dict[str, Any]
) -> tuple[float, float]:
  """(FLOPs, bytes through HBM) of a device."""
  data, fsdp, tensor = shape
  devices = data * fsdp * tensor
  prompt, new = config.data.prompt_length, config.dpr.max_new_tokens
  if name == "rollout_step":
    rows = config.dpr.batch_size
    return (
        flops.rollout(cfg, rows, prompt, new, config.dpr.samples_per_prompt) / devices,
        traffic.rollout(cfg, tensor, rows / (data * fsdp), prompt, new),
    )
  if name == "sft_step":
    section, length, logits = config.sft, config.data.row_length, config.data.row_length - 1
  else:
    section, length, logits = config.dpr, prompt + new, new
  state = entry["argument_bytes"] + entry["output_bytes"]
  return (
      flops.train(cfg, section.batch_size, length, logits) / devices,
      traffic.train(
          cfg, tensor, section.batch_size / (data * fsdp), length, state, section.accumulation
      ),
  )


def plan_mesh(
    config: RunConfig,
    cfg: ModelConfig,
    topology: Topology,
    devices: list[Any],
    shape: Shape,
    on_program=lambda name: None,
) -> dict[str, Any]:
  """{"mesh", "fits", "programs"} of one mesh shape.

  Stops at the first program that does not fit, as the mesh is lost then.

  Raises:
    UserError: the mesh divides neither the devices nor a batch; names the field.
  """
  mesh = sharding.make_mesh(*shape, devices=devices)
  programs, out = make_programs(config, cfg, mesh), {}
  for name in NAMES:
    on_program(name)
    with jax.set_mesh(mesh):
      entry = compile_program(programs[name], topology, config.dpr.max_new_tokens - 1)
    out[name] = entry
    if "peak_bytes" not in entry:
      break
    chip = topology.chip
    done, moved = _work(name, config, cfg, shape, entry)
    entry["flops"], entry["hbm_bytes_moved"] = done, int(moved)
    entry["floor_seconds"] = {
        "compute": done / chip.flops,
        "hbm": moved / chip.hbm_bandwidth,
        "ici": sum(entry["collective_bytes"].values()) / chip.ici_bandwidth,
    }
    if not entry["fits"]:
      break
  return {
      "mesh": dict(zip(sharding.MESH_AXES, shape)),
      "fits": len(out) == len(NAMES) and all(p["fits"] for p in out.values()),
      "programs": out,
  }


def floor(entry: dict[str, Any]) -> float:
  """Seconds below which a program cannot be, 0 if it was not compiled."""
  return max(entry["floor_seconds"].values()) if "floor_seconds" in entry else 0.0


def bounds(config: RunConfig, planned: dict[str, Any]) -> dict[str, float]:
  """Tokens a second of all devices together, at most: of SFT, and of DPR's responses."""
  programs = planned["programs"]
  out = {}
  if floor(programs.get("sft_step", {})):
    tokens = config.sft.batch_size * config.data.row_length
    out["tokens_per_second_bound"] = tokens / floor(programs["sft_step"])
  if planned["fits"]:
    tokens = config.dpr.batch_size * config.dpr.max_new_tokens
    seconds = floor(programs["rollout_step"]) + floor(programs["reinforce_step"])
    out["dpr_tokens_per_second_bound"] = tokens / seconds
  return out
