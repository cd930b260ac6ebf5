"""Plans a config for hardware you do not have: what fits, and how fast it can be at most.

    python -m dpr_jax.plan --config=configs/llama31_8b.py --topology=v5e:4x4 \\
        [--output=PLAN.json] [--mesh=data,fsdp,tensor] [--compile=3] [--exhaustive] [--quick] \\
        [--config.FIELD=VALUE]

Compiles sft_step, rollout_step and reinforce_step for the topology on this CPU and reports their
memory, FLOPs and collectives. The times are bounds from peak rates, not measurements. Without
--mesh it estimates all mesh shapes and compiles the most promising ones, at most --compile, until
one fits; if none does, again with more accumulation. --exhaustive compiles all that may fit, says
of each whether it does, and suggests the one with the lowest bounds. --quick compiles with less
effort, in about half of the time.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from dpr_jax import cli
from dpr_jax.errors import UserError


def parse(argv: Sequence[str]):
  """Command line -> (RunConfig, flag values).

  Raises:
    UserError: naming the flag or the field, and what would be right.
  """
  from dpr_jax import config as config_lib
  from dpr_jax.flags import parse_config

  def define(v: flags.FlagValues) -> None:
    flags.DEFINE_string("topology", None, "KIND:SHAPE, as in v5e:4x4.", flag_values=v)
    flags.DEFINE_string("output", "", "JSON file to write.", flag_values=v)
    flags.DEFINE_string("mesh", "", "data,fsdp,tensor; by default a search.", flag_values=v)
    flags.DEFINE_integer("compile", 3, "Meshes compiled at most.", lower_bound=1, flag_values=v)
    flags.DEFINE_bool("exhaustive", False, "Compile every mesh that may fit, whatever --compile.",
                      flag_values=v)
    flags.DEFINE_bool("quick", False, "Compile with less effort.", flag_values=v)

  config, values = parse_config(
      argv,
      door="dpr_jax.plan",
      doc=__doc__,
      define=define,
      required={"config": "configs/llama31_8b.py", "topology": "v5e:4x4"},
  )
  if values.mesh and values.exhaustive:
    raise UserError(f"--mesh={values.mesh} names a mesh and --exhaustive searches one: give one of "
                    "them")
  return config_lib.resolve(config), values


def main(argv: Sequence[str]) -> None:
  from dpr_jax.planning.topologies import parse_topology, prepare_environment

  prepare_environment()  # Before anything imports JAX.
  config, values = parse(argv)
  topology = parse_topology(values.topology)
  output = cli.new_file("--output", values.output) if values.output else None
  import jax

  from dpr_jax.flags import config_path
  from dpr_jax.planning import plan, tables

  if values.quick:
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
  shape = parse_mesh(values.mesh, topology.size) if values.mesh else None
  name = config_path(argv)
  say = lambda text: print(text, file=sys.stderr, flush=True)
  planned = plan.make_plan(
      config, topology, shape=shape, most=values.compile, exhaustive=values.exhaustive, say=say,
      config_name=name,
  )
  if output:
    pathlib.Path(output).write_text(json.dumps(planned, indent=1) + "\n", encoding="utf-8")
  print(tables.plan_text(planned))


def parse_mesh(text: str, devices: int) -> tuple[int, int, int]:
  """--mesh -> (data, fsdp, tensor); one may be -1, the rest.

  Raises:
    UserError: malformed, or it does not multiply to the number of devices.
  """
  try:
    data, fsdp, tensor = (int(x) for x in text.split(","))
  except ValueError:
    raise UserError(f"--mesh={text} must be three integers data,fsdp,tensor") from None
  shape = [data, fsdp, tensor]
  fixed = 1
  for n in shape:
    fixed *= n if n != -1 else 1
  if shape.count(-1) == 1 and fixed > 0 and devices % fixed == 0:
    shape[shape.index(-1)] = devices // fixed
  if min(shape) < 1 or shape[0] * shape[1] * shape[2] != devices:
    raise UserError(f"--mesh={text} does not multiply to the {devices} devices of the topology; "
                    "one axis may be -1, the rest")
  return shape[0], shape[1], shape[2]


if __name__ == "__main__":
  cli.run_door(main)
