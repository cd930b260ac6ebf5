"""A plan: which meshes fit, the best of them, and its programs in figures. A dict for JSON."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from dpr_jax.config import RunConfig
from dpr_jax.errors import UserError
from dpr_jax.models import ModelConfig
from dpr_jax.planning import report, search, traffic
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


@dataclasses.dataclass
class _Round:
  """The meshes of one number of micro-batches."""

  config: RunConfig
  guesses: list[search.Estimate]  # the best first.
  compiled: dict[search.Shape, dict[str, Any]] = dataclasses.field(default_factory=dict)

  def compile(self, guesses, cfg, topology, devices, exhaustive, say) -> bool:
    """Compiles `guesses`, all or until one fits; whether one does."""
    for guess in guesses:
      mesh = ",".join(map(str, guess.shape))
      on_program = lambda name, mesh=mesh: say(f"{topology.name} mesh {mesh}: compiling {name}")
      planned = report.plan_mesh(self.config, cfg, topology, devices, guess.shape, on_program)
      self.compiled[guess.shape] = planned
      if planned["fits"] and not exhaustive:
        break
    return any(planned["fits"] for planned in self.compiled.values())


def make_plan(
    config: RunConfig,
    topology: Topology,
    *,
    shape: search.Shape | None = None,
    most: int = 3,
    exhaustive: bool = False,
    say: Callable[[str], None] = lambda text: None,
    config_name: str = "",
) -> dict[str, Any]:
  """Compiles the programs of `config` on `topology`.

  Args:
    shape: (data, fsdp, tensor); None searches, and splits the steps into more micro-batches than
      the config says if nothing fits otherwise ("batch" says how many).
    most: meshes that a search compiles at most; it stops at the first that fits.
    exhaustive: compile all meshes instead that are not far beyond memory by estimate, and choose
      that with the lowest floors. Otherwise the estimate alone says which is the fastest.
    say: called with a line of progress before each compilation.

  Raises:
    UserError: no compiler for the topology, no mesh that divides the batches, or a config without
      a shape; names the field or flag.
  """
  cfg = planned_model(config)
  rounds: list[_Round] = []
  devices = None
  for how in [config] if shape else _accumulating(config):
    if shape:
      check_rows(how, jax.sharding.AbstractMesh(shape, MESH_AXES))
      guesses = [search.estimate(how, cfg, topology, shape)]
    else:
      guesses = search.ranked(how, cfg, topology)
    if not guesses:
      break
    rounds.append(_Round(how, guesses))
    devices = devices or describe(topology)
    # Nothing is compiled that is far beyond memory, if more micro-batches may help.
    hopeful = [e for e in guesses if e.peak_bytes <= 1.1 * topology.chip.hbm_bytes]
    hopeful = hopeful if exhaustive else hopeful[:most]
    if rounds[-1].compile(guesses if shape else hopeful, cfg, topology, devices, exhaustive, say):
      break
  if not rounds:
    raise UserError(
        f"no mesh over the {topology.size} devices of {topology.name} divides "
        f"config.sft.batch_size={config.sft.batch_size} and config.dpr.batch_size="
        f"{config.dpr.batch_size} (a micro-batch needs a multiple of data * fsdp rows) "
        "with tensor a divisor of the heads; take more rows"
    )
  if not any(r.compiled for r in rounds):  # What the smallest of the last lacks is worth knowing.
    rounds[-1].compile(rounds[-1].guesses[:1], cfg, topology, devices, exhaustive, say)
  # The fastest mesh that fits, else the one that got farthest, of the latest round that has one.
  latest = [(r, planned) for r in reversed(rounds) for planned in r.compiled.values()]
  chosen, best = max(latest, key=lambda pair: _worth(pair[1]))
  config = chosen.config
  return {
      "topology": topology.name,
      "devices": topology.size,
      "hbm_bytes": topology.chip.hbm_bytes,
      "mesh": best["mesh"],
      "fits": best["fits"],
      "programs": best["programs"],
      **report.bounds(config, best),
      "config": config_name,
      "batch": {
          "sft": [config.sft.batch_size, config.data.row_length, config.sft.accumulation],
          "dpr": [config.dpr.batch_size, config.data.prompt_length, config.dpr.max_new_tokens,
                  config.dpr.accumulation],
      },
      "lora_rank": cfg.lora.rank,
      "attention": best["attention"],
      "parameters": cfg.num_params,
      "searched": shape is None,
      "exhaustive": shape is None and exhaustive,
      "sft_minimum_bytes": _minimum(config, cfg, best["mesh"]),
      "chip": dataclasses.asdict(topology.chip),
      "candidates": [
          {
              "mesh": dict(zip(MESH_AXES, guess.shape)),
              "accumulation": [r.config.sft.accumulation, r.config.dpr.accumulation],
              "estimated_peak_bytes": int(guess.peak_bytes),
              "estimated_seconds": guess.seconds,
              **_compiled_to(r.compiled.get(guess.shape)),
          }
          for r in rounds
          for guess in r.guesses
          if r is chosen or guess.shape in r.compiled
      ],
  }


def _got_to(planned: dict[str, Any]) -> int:
  """Programs of a mesh that the compiler finished."""
  return sum(p["peak_bytes"] is not None for p in planned["programs"].values())


def _worth(planned: dict[str, Any]) -> tuple[float, ...]:
  """By which compiled meshes are compared: whether they fit, how many programs were compiled, and
  of those that fit the sum of the longest floors, then of all: often all compute the same."""
  if not planned["fits"]:
    return False, _got_to(planned), 0.0, 0.0
  programs = planned["programs"].values()
  all_floors = sum(sum(p["floor_seconds"].values()) for p in programs)
  return True, _got_to(planned), -sum(map(report.floor, programs)), -all_floors


def _compiled_to(planned: dict[str, Any] | None) -> dict[str, Any]:
  """What a candidate says of its programs: {"fits", "peak_bytes", "floor_seconds"}.

  The largest peak with what is resident beside it, None where the compiler ran out of memory, and
  the sum of the longest floors, None unless all fit. All None if it was not compiled.
  """
  if planned is None:
    return {"fits": None, "peak_bytes": None, "floor_seconds": None}
  programs = planned["programs"].values()
  peaks = [p["peak_bytes"] + p["resident_bytes"] for p in programs if p["peak_bytes"] is not None]
  return {
      "fits": planned["fits"],
      "peak_bytes": max(peaks) if _got_to(planned) == len(programs) else None,
      "floor_seconds": sum(map(report.floor, programs)) if planned["fits"] else None,
  }


def _minimum(
    config: RunConfig, cfg: ModelConfig, mesh: dict[str, int]
) -> dict[str, int] | None:
  """`traffic.minimum_received` of the SFT step, where the formula holds."""
  if cfg.lora.rank or mesh["data"] > 1 or mesh["tensor"] > 1:
    return None
  parts = config.sft.accumulation
  tokens = config.sft.batch_size * config.data.row_length // (parts * mesh["fsdp"])
  received = traffic.minimum_received(cfg, mesh["fsdp"], parts, tokens)
  return {name: int(n) for name, n in received.items()}
