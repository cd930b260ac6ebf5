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
from dpr_jax.models.attention import resolve_backend
from dpr_jax.planning import flops, hlo, traffic
from dpr_jax.planning.compiler_log import captured
from dpr_jax.planning.programs import NAMES, Program, make_programs, scored_models
from dpr_jax.planning.search import Shape
from dpr_jax.planning.topologies import Topology

# What a plan says of each program, in this order; None where the compiler did not get so far.
KEYS = (
    "fits", "argument_bytes", "temp_bytes", "output_bytes", "alias_bytes", "peak_bytes",
    "resident_bytes", "exhausted_bytes", "compiler_says", "flops", "hbm_bytes_moved",
    "collective_bytes", "collective_count", "involuntary_rematerializations", "floor_seconds",
    "compile_seconds",
)


def not_compiled() -> dict[str, Any]:
  """The entry of a program of which nothing is known."""
  return dict.fromkeys(KEYS)


def compile_program(program: Program, topology: Topology, loop_trips: int) -> dict[str, Any]:
  """Memory and collectives of one program; `fits` False where the compiler runs out of HBM."""
  start = time.monotonic()
  lowered = program.lower()
  try:
    with captured() as log:
      compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    needed = re.search(r"([\d.]+)([GM])\)? exceeds|Used ([\d.]+)([GM]) of", str(e))
    number, unit = ([x for x in needed.groups() if x] if needed else ("0", "G"))
    return {
        **not_compiled(),
        "fits": False,
        "compiler_says": " ".join(str(e).split())[:200],
        "exhausted_bytes": int(float(number) * (2**30 if unit == "G" else 2**20)),
        "resident_bytes": int(program.resident_bytes),
        "involuntary_rematerializations": log.rematerializations,
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
      **not_compiled(),
      "fits": peak + program.resident_bytes <= topology.chip.hbm_bytes,
      "argument_bytes": memory.argument_size_in_bytes,
      "temp_bytes": memory.temp_size_in_bytes,
      "output_bytes": memory.output_size_in_bytes,
      "alias_bytes": memory.alias_size_in_bytes,
      "peak_bytes": peak,
      "resident_bytes": int(program.resident_bytes),
      "collective_bytes": {k: int(v) for k, v in sorted(found.bytes.items())},
      "collective_count": dict(sorted(found.count.items())),
      "involuntary_rematerializations": log.rematerializations,
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
    dpr, scored = config.dpr, scored_models(config)
    rows, slots = dpr.batch_size, min(dpr.slots or dpr.batch_size, dpr.batch_size)
    steps = flops.decode_steps(rows, new, slots)
    done = flops.rollout(cfg, rows, prompt, new, dpr.samples_per_prompt, slots, scored)
    moved = traffic.rollout(cfg, tensor, slots / (data * fsdp), prompt, new, steps, scored)
    return done / devices, moved
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
  """{"mesh", "fits", "attention", "programs"} of one mesh shape.

  Stops at the first program that does not fit, as the mesh is lost then. "attention" is what
  computes it over rows of SFT.

  Raises:
    UserError: the mesh divides neither the devices nor a batch, or the platform has no such
      attention; names the field.
  """
  mesh = sharding.make_mesh(*shape, devices=devices)
  programs = make_programs(config, cfg, mesh)
  out = {name: not_compiled() for name in NAMES}
  with jax.set_mesh(mesh):
    attention = resolve_backend(cfg, config.data.row_length)
  dpr = config.dpr
  trips = flops.decode_steps(dpr.batch_size, dpr.max_new_tokens, dpr.slots)
  for name in NAMES:
    on_program(name)
    with jax.set_mesh(mesh):
      entry = out[name] = compile_program(programs[name], topology, trips)
    if entry["peak_bytes"] is None:
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
      "fits": all(p["fits"] is True for p in out.values()),
      "attention": attention,
      "programs": out,
  }


def floor(entry: dict[str, Any]) -> float:
  """Seconds below which a program cannot be, 0 if it was not compiled."""
  return max(entry["floor_seconds"].values()) if entry["floor_seconds"] else 0.0


def bounds(config: RunConfig, planned: dict[str, Any]) -> dict[str, float | None]:
  """Tokens a second of all devices together, at most: of SFT, and of DPR's responses.

  None where a program they need was not compiled, or does not fit.
  """
  programs = planned["programs"]
  out = {"tokens_per_second_bound": None, "dpr_tokens_per_second_bound": None}
  if programs["sft_step"]["fits"]:
    tokens = config.sft.batch_size * config.data.row_length
    out["tokens_per_second_bound"] = tokens / floor(programs["sft_step"])
  if planned["fits"]:
    tokens = config.dpr.batch_size * config.dpr.max_new_tokens
    seconds = floor(programs["rollout_step"]) + floor(programs["reinforce_step"])
    out["dpr_tokens_per_second_bound"] = tokens / seconds
  return out
