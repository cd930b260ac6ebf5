"""A plan: which meshes fit, the best of them, and its programs in figures. A dict for JSON."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from dpr_jax.config import RunConfig
from dpr_jax.errors import UserError
from dpr_jax.planning import report, search
from dpr_jax.planning.programs import planned_model, planned_works
from dpr_jax.planning.topologies import Topology, describe
from dpr_jax.planning.work import Shape
from dpr_jax.run import check_mesh
from dpr_jax.sharding import MESH_AXES


def accumulations(config: RunConfig) -> dict[str, int]:
  """Field -> micro-batches per step: of SFT, of the shared budget, of methods with their own."""
  sections = {"sft": config.sft, "budget": config.budget}
  sections |= {f"methods.{name}": m for name, m in _accumulating_methods(config).items()}
  return {f"config.{path}.accumulation": s.accumulation for path, s in sections.items()}


def _accumulating_methods(config: RunConfig) -> dict[str, Any]:
  """The compared methods whose accumulation is not that of the shared budget."""
  return {name: m for name, m in config.compared().items() if m.trained and m.accumulation}


def _accumulating(config: RunConfig) -> Iterator[RunConfig]:
  """The config, and the same steps in 2, 4, ... times as many micro-batches."""
  for factor in (1, 2, 4, 8, 16):
    more = lambda x, n=factor: dataclasses.replace(x, accumulation=x.accumulation * n)
    try:
      own = {name: more(method) for name, method in _accumulating_methods(config).items()}
      how = dataclasses.replace(
          config, sft=more(config.sft), budget=more(config.budget), methods=config.methods | own
      )
      for method in how.compared().values():
        method.check(how)
    except ValueError:  # So many micro-batches would differ in size.
      return
    yield how


@dataclasses.dataclass
class _Round:
  """The meshes of one number of micro-batches."""

  config: RunConfig
  guesses: list[search.Estimate]  # the best first.
  compiled: dict[Shape, dict[str, Any]] = dataclasses.field(default_factory=dict)

  def compile(self, guesses, cfg, topology, devices, exhaustive, log) -> bool:
    """Compiles `guesses`, all or until one fits; whether one does."""
    for guess in guesses:
      mesh = ",".join(map(str, guess.shape))
      on_program = lambda name, mesh=mesh: log(f"{topology.name} mesh {mesh}: compiling {name}")
      planned = report.plan_mesh(self.config, cfg, topology, devices, guess.shape, on_program)
      self.compiled[guess.shape] = planned
      if planned["fits"] and not exhaustive:
        break
    return any(planned["fits"] for planned in self.compiled.values())


def make_plan(
    config: RunConfig,
    topology: Topology,
    *,
    shape: Shape | None = None,
    most: int = 3,
    exhaustive: bool = False,
    log: Callable[[str], None] = lambda text: None,
    config_name: str = "",
) -> dict[str, Any]:
  """Compiles the programs of `config` on `topology`.

  Args:
    shape: (data, fsdp, tensor); None searches, and splits the steps into more micro-batches than
      the config does if nothing fits otherwise ("accumulation" has how many).
    most: meshes that a search compiles at most; it stops at the first that fits.
    exhaustive: compile all meshes instead that are not far beyond memory by estimate, and choose
      that with the lowest bounds. Otherwise the estimate alone decides which is the fastest.
    log: called with a line of progress before each compilation.

  Raises:
    UserError: no compiler for the topology, no mesh that divides the batches, or a config without
      a shape; names the field or flag.
  """
  cfg = planned_model(config)
  rounds: list[_Round] = []
  devices = None
  for how in [config] if shape else _accumulating(config):
    if shape:
      check_mesh(how, jax.sharding.AbstractMesh(shape, MESH_AXES))
      guesses = [search.estimate(planned_works(how, cfg), cfg, topology, shape)]
    else:
      guesses = search.ranked(how, cfg, topology)
    if not guesses:
      break
    rounds.append(_Round(how, guesses))
    devices = devices or describe(topology)
    # Nothing is compiled that is far beyond memory, if more micro-batches may help.
    hopeful = [e for e in guesses if e.peak_bytes <= 1.1 * topology.chip.hbm_bytes]
    hopeful = hopeful if exhaustive else hopeful[:most]
    if rounds[-1].compile(guesses if shape else hopeful, cfg, topology, devices, exhaustive, log):
      break
  if not rounds:
    raise UserError(f"no mesh over the {topology.size} devices of {topology.name} divides the rows "
                    f"of every batch (config.sft.batch_size={config.sft.batch_size}, "
                    f"config.budget.batch_size={config.budget.batch_size}, "
                    f"config.eval.batch_size={config.eval.batch_size}; a micro-batch needs a "
                    "multiple of data * fsdp rows) with tensor a divisor of the heads; take more "
                    "rows")
  if not any(r.compiled for r in rounds):  # What the smallest of the last lacks is worth knowing.
    rounds[-1].compile(rounds[-1].guesses[:1], cfg, topology, devices, exhaustive, log)
  # The fastest mesh that fits, else the one that got farthest, of the latest round that has one.
  latest = [(r, planned) for r in reversed(rounds) for planned in r.compiled.values()]
  chosen, best = max(latest, key=lambda pair: _worth(pair[1]))
  return {
      "topology": topology.name,
      "devices": topology.size,
      "hbm_bytes": topology.chip.hbm_bytes,
      **best,
      "config": config_name,
      "accumulation": accumulations(chosen.config),
      "lora_rank": cfg.lora.rank,
      "parameters": cfg.num_params,
      "searched": shape is None,
      "exhaustive": shape is None and exhaustive,
      "chip": dataclasses.asdict(topology.chip),
      "candidates": [
          {
              "mesh": dict(zip(MESH_AXES, guess.shape)),
              "accumulation": list(accumulations(r.config).values()),
              "estimated_peak_bytes": int(guess.peak_bytes),
              "estimated_seconds": guess.seconds,
              **_outcome(r.compiled.get(guess.shape)),
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
  of those that fit the sum of the longest bounds, then of all: often all compute the same."""
  if not planned["fits"]:
    return False, _got_to(planned), 0.0, 0.0
  programs = planned["programs"].values()
  all_bounds = sum(sum(p["bound_seconds"].values()) for p in programs)
  return True, _got_to(planned), -sum(map(report.bound, programs)), -all_bounds


def _outcome(planned: dict[str, Any] | None) -> dict[str, Any]:
  """The outcome of a candidate: {"fits", "peak_bytes", "bound_seconds"}.

  The largest peak with what is resident beside it, None where the compiler ran out of memory, and
  the sum of the longest bounds, None unless all fit. All None if it was not compiled.
  """
  if planned is None:
    return {"fits": None, "peak_bytes": None, "bound_seconds": None}
  programs = planned["programs"].values()
  complete = _got_to(planned) == len(programs)
  return {
      "fits": planned["fits"],
      "peak_bytes": max(map(report.peak_bytes, programs)) if complete else None,
      "bound_seconds": sum(map(report.bound, programs)) if planned["fits"] else None,
  }
