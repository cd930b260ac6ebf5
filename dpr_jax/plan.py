"""Plans a config for hardware you do not have: what fits, and how fast it can be at most.

    python -m dpr_jax.plan --config=configs/llama31_8b.py --topology=v5e:4x4 \\
        [--output=PLAN.json] [--methods=dpr,spin] [--mesh=data,fsdp,tensor] [--compile=3] \\
        [--exhaustive] [--quick] [--config.FIELD=VALUE]

Compiles the programs of SFT and of the methods that train for the topology on this CPU and reports
their memory, FLOPs and collectives. The times are bounds from peak rates, not measurements.
--methods names methods of the config; by default those of config.compare. Without --mesh it
estimates all mesh shapes and compiles the most promising ones, at most --compile, until one fits;
if none does, again with more accumulation. --exhaustive compiles all that may fit, reports whether
each does, and suggests the one with the lowest bounds. --quick compiles with less effort, in about
half of the time.
"""

import json
import math
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from dpr_jax import cli
from dpr_jax.cli.flags import config_path
from dpr_jax.cli.models import new_file
from dpr_jax.errors import UserError


def parse(argv: Sequence[str]):
  """Command line -> (RunConfig, flag values).

  Raises:
    UserError: naming the flag or the field, and what would be right.
  """
  from dpr_jax import config as config_lib

  def define(v: flags.FlagValues) -> None:
    flags.DEFINE_string("topology", None, "KIND:SHAPE, as in v5e:4x4.", flag_values=v)
    flags.DEFINE_string("output", "", "JSON file to write.", flag_values=v)
    flags.DEFINE_list("methods", [], "Methods to plan; by default those of config.compare that "
                      "train.", flag_values=v)
    flags.DEFINE_string("mesh", "", "data,fsdp,tensor; by default a search.", flag_values=v)
    flags.DEFINE_integer("compile", 3, "Meshes compiled at most.", lower_bound=1, flag_values=v)
    flags.DEFINE_bool("exhaustive", False, "Compile every mesh that may fit, whatever --compile.",
                      flag_values=v)
    flags.DEFINE_bool("quick", False, "Compile with less effort.", flag_values=v)

  values = cli.parse_flags(
      argv,
      entry_point="dpr_jax.plan",
      doc=__doc__,
      define=define,
      required={"config": "configs/llama31_8b.py", "topology": "v5e:4x4"},
  )
  if values.mesh and values.exhaustive:
    raise UserError(f"--mesh={values.mesh} names a mesh and --exhaustive searches one: give one of "
                    "them")
  known = values.config.methods
  for name in values.methods:
    if name not in known:
      raise UserError(f"--methods: {name!r} is not one of {', '.join(sorted(known))}")
  if values.methods:
    values.config.compare = tuple(values.methods)
  config = config_lib.resolve(values.config)
  cli.check_methods(argv, config.methods)
  for name in values.methods:
    if not config.methods[name].trained:
      raise UserError(f"--methods: {name!r} trains nothing, so that there is nothing to plan")
  return config, values


@cli.readable
def main(argv: Sequence[str]) -> None:
  from dpr_jax.planning.topologies import parse_topology, prepare_environment

  prepare_environment()  # Before anything imports JAX.
  config, values = parse(argv)
  topology = parse_topology(values.topology)
  output = new_file("--output", values.output) if values.output else None
  import jax

  from dpr_jax.planning import plan, text

  if values.quick:
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
  shape = parse_mesh(values.mesh, topology.size) if values.mesh else None
  planned = plan.make_plan(
      config, topology, shape=shape, most=values.compile, exhaustive=values.exhaustive,
      log=lambda text: print(text, file=sys.stderr, flush=True), config_name=config_path(argv),
  )
  if output:
    pathlib.Path(output).write_text(json.dumps(planned, indent=1) + "\n", encoding="utf-8")
  print(text.plan_text(planned))


def parse_mesh(text: str, devices: int) -> tuple[int, int, int]:
  """--mesh -> (data, fsdp, tensor); one may be -1, the rest.

  Raises:
    UserError: malformed, or it does not multiply to the number of devices.
  """
  try:
    data, fsdp, tensor = shape = [int(x) for x in text.split(",")]
  except ValueError:
    raise UserError(f"--mesh={text} must be three integers data,fsdp,tensor") from None
  if shape.count(-1) == 1 and (fixed := -math.prod(shape)) > 0:
    data, fsdp, tensor = (devices // fixed if n == -1 else n for n in shape)
  if min(data, fsdp, tensor) < 1 or data * fsdp * tensor != devices:
    raise UserError(f"--mesh={text} does not multiply to the {devices} devices of the topology; "
                    "one axis may be -1, the rest")
  return data, fsdp, tensor


if __name__ == "__main__":
  cli.run_entry_point(main, kept="nothing was written")
