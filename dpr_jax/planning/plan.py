"""A plan: which meshes fit, the best of them, and its programs in figures. A dict for JSON."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from dpr_jax.config import RunConfig
from dpr_jax.errors import UserError
from dpr_jax.planning import report, search
from dpr_jax.planning.programs import check_rows, planned_model
from dpr_jax.planning.topologies import Topology, describe
from dpr_jax.sharding import MESH_AXES


def _accumulating(config: RunConfig) -> Iterator[RunConfig]:
  """The config, and the same steps in 2, 4, ... times as many micro-batches."""
  for factor in (1, 2, 4, 8, 16):
    more = {}
    for name in ("sft", "dpr"):
      section = getattr(config, name)
      if section.batch_size % (section.accumulation * factor):
        return
      more[name] = dataclasses.replace(section, accumulation=section.accumulation * factor)
    yield dataclasses.replace(config, **more)


def make_plan(
    config: RunConfig,
    topology: Topology,
    *,
    shape: search.Shape | None = None,
    most: int = 3,
    say: Callable[[str], None] = lambda text: None,
    config_name: str = "",
) -> dict[str, Any]:
  """Compiles the programs of `config` on `topology`.

  Args:
    shape: (data, fsdp, tensor); None searches, and splits the steps into more micro-batches than
      the config says if nothing fits otherwise ("batch" says how many).
    most: meshes that a search compiles at most; it stops at the first that fits.
    say: called with a line of progress before each compilation.

  Raises:
    UserError: no compiler for the topology, no mesh that divides the batches, or a config without
      a shape; names the field or flag.
  """
  cfg = planned_model(config, topology.chip.platform)
  tried, compiled, devices = [], [], None
  for how in [config] if shape else _accumulating(config):
    config = how
    if shape:
      check_rows(config, jax.sharding.AbstractMesh(shape, MESH_AXES))
      now = [search.estimate(config, cfg, topology, shape)]
    else:
      now = search.ranked(config, cfg, topology)
    if not now:
      break
    tried = now
    # Nothing is compiled that is far beyond memory, if more micro-batches may help.
    hopeful = [e for e in now if e.peak_bytes <= 1.1 * topology.chip.hbm_bytes]
    devices = devices or describe(topology)
    compiled = []
    for guess in (now if shape else hopeful)[:most]:
      mesh = ",".join(map(str, guess.shape))
      on_program = lambda name, mesh=mesh: say(f"{topology.name} mesh {mesh}: compiling {name}")
      compiled.append(report.plan_mesh(config, cfg, topology, devices, guess.shape, on_program))
      if compiled[-1]["fits"]:
        break
    if compiled and compiled[-1]["fits"]:
      break
  if not tried:
    raise UserError(
        f"no mesh over the {topology.size} devices of {topology.name} divides "
        f"config.sft.batch_size={config.sft.batch_size} and config.dpr.batch_size="
        f"{config.dpr.batch_size} (a micro-batch needs a multiple of data * fsdp rows) "
        "with tensor a divisor of the heads; take more rows"
    )
  if not compiled:  # All hopeless: what the smallest of them lacks is worth knowing.
    compiled = [report.plan_mesh(config, cfg, topology, devices, tried[0].shape, say)]
  best = compiled[-1] if compiled[-1]["fits"] else max(compiled, key=lambda c: len(c["programs"]))
  by_mesh = {tuple(c["mesh"].values()): c for c in compiled}
  return {
      "topology": topology.name,
      "devices": topology.size,
      "hbm_bytes": topology.chip.hbm_bytes,
      "mesh": best["mesh"],
      "fits": best["fits"],
      "programs": best["programs"],
      "tokens_per_second_bound": 0.0,
      **report.bounds(config, best),
      "config": config_name,
      "batch": {
          "sft": [config.sft.batch_size, config.data.row_length, config.sft.accumulation],
          "dpr": [config.dpr.batch_size, config.data.prompt_length, config.dpr.max_new_tokens,
                  config.dpr.accumulation],
      },
      "lora_rank": cfg.lora.rank,
      "attention": getattr(cfg, "attention", "xla"),
      "parameters": cfg.num_params,
      "chip": dataclasses.asdict(topology.chip),
      "candidates": [
          {
              "mesh": dict(zip(MESH_AXES, guess.shape)),
              "estimated_peak_bytes": int(guess.peak_bytes),
              "estimated_seconds": guess.seconds,
              "fits": by_mesh[guess.shape]["fits"] if guess.shape in by_mesh else None,
          }
          for guess in tried
      ],
  }
