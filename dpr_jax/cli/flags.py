"""The flags of all entry points: absl's, with --config=FILE and --config.FIELD=VALUE."""

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from absl import flags

from dpr_jax.errors import UserError


def parse_flags(
    argv: Sequence[str],
    *,
    entry_point: str,
    doc: str,
    define: Callable[[flags.FlagValues], Any],
    required: Mapping[str, str],
) -> flags.FlagValues:
  """Command line -> flag values.

  Args:
    entry_point: the module, as in "dpr_jax.main".
    doc: what --help prints before the flags.
    define: adds the flags of the entry point to the values it is given.
    required: name of a flag that must be set -> an example of its value. Where "config" is among
      them, --config=FILE is loaded and --config.FIELD=VALUE overrides its fields.

  Raises:
    UserError: naming the flag or the field, and what would be right.
  """
  values, arguments = flags.FlagValues(), list(argv)
  define(values)
  flags.DEFINE_bool("help", False, "Shows this text.", short_name="h", flag_values=values)
  wants_help = bool({"--help", "-h", "-help"} & set(arguments))
  if wants_help:
    arguments = ["--help"]
  elif "config" in required:
    arguments = _define_config(values, entry_point, arguments, required["config"])
  try:
    rest = values([entry_point, *arguments])[1:]
  except flags.Error as e:
    _check_fields(values, arguments)
    raise UserError(str(e)) from None
  except (TypeError, ValueError, KeyError, AttributeError) as e:  # An override of a wrong type.
    _check_fields(values, arguments)
    raise UserError(f"--config: {e}") from None
  if values.help:
    print(f"{doc.strip()}\n\n{values.main_module_help() or values.get_help()}")
    raise SystemExit(0)
  if rest:
    raise UserError(f"{rest[0]!r} is not a flag; fields are set as --config.FIELD=VALUE"
                    if "config" in required else f"{rest[0]!r} is not a flag")
  for name in values:
    # A seed has 64 bits; whatever else is counted fits into 31.
    number, bits = values[name].value, 63 if name == "seed" else 31
    if type(number) is int and not -(2**bits) <= number < 2**bits:
      raise UserError(f"--{name}: the number is out of range; it must be below 2^{bits}")
    if type(number) is float and not math.isfinite(number):
      raise UserError(f"--{name}={number} must be a finite number")
  for name, example in required.items():
    if values[name].value is None:
      raise UserError(f"--{name} is missing; for example --{name}={example}")
  return values


def flag_value(argv: Sequence[str], name: str) -> str:
  """The value of a flag on a command line that is not parsed yet, "" if there is none."""
  for i, arg in enumerate(argv):
    if arg in (f"--{name}", f"-{name}") and i + 1 < len(argv):
      return argv[i + 1]
    if re.match(rf"--?{name}=", arg):
      return arg.partition("=")[2]
  return ""


def config_path(argv: Sequence[str]) -> str:
  """The value of --config on a command line, "" if there is none."""
  return flag_value(argv, "config")


def _define_config(
    values: flags.FlagValues, entry_point: str, argv: list[str], example: str
) -> list[str]:
  """Loads --config and defines the flags of its fields; returns the other arguments."""
  from ml_collections import config_flags

  from dpr_jax.config.files import load_config, set_kind

  path = config_path(argv)
  if not path:
    raise UserError(f"--config is missing; for example --config={example}")
  config = load_config(path)
  rest, skip = [], False
  for arg in argv:
    name, _, value = arg.partition("=")
    if skip or name in ("--config", "-config"):
      skip = not skip and "=" not in arg
    elif name.startswith("--config.") and name.endswith(".kind"):
      set_kind(config, name.removeprefix("--config.").removesuffix(".kind"), value)
    else:
      rest.append(_quoted(arg))
  try:
    config_flags.DEFINE_config_dict(
        "config", config, lock_config=True, flag_values=values, sys_argv=[entry_point, *rest]
    )
  except Exception:
    _check_fields({"config": config}, rest)
    raise
  return rest


def check_methods(argv: Sequence[str], used: Collection[str]) -> None:
  """Raises UserError for the first --config.methods.NAME of a method that no run uses."""
  for arg in argv:
    name = arg.removeprefix("--config.methods.").partition(".")[0]
    if arg.startswith("--config.methods.") and name not in used:
      raise UserError(f"{arg.partition('=')[0]}: {name!r} takes no part in the run; add it to "
                      "--config.compare")


def _quoted(arg: str) -> str:
  """--config.methods.dpr.transforms=clip:2,scale:0.5 with its entries in quotes; also data.tasks.

  A flag that is a tuple is read as Python, and clip:2 or upper:0.02 is not.
  """
  name, _, value = arg.partition("=")
  if not name.startswith("--config.") or not name.endswith(
      (".transforms", ".data.tasks")
  ):
    return arg
  if not value or value[0] in "('\"[":
    return arg
  return f"{name}={tuple(value.split(','))!r}"


def _check_fields(values: Any, argv: Sequence[str]) -> None:
  """Raises UserError for the first --config.FIELD that the config lacks, with the nearest name."""
  if "config" not in values:
    return
  config = values["config"]
  config = getattr(config, "value", config)
  for arg in argv:
    if not arg.startswith("--config."):
      continue
    section, path = config, arg.partition("=")[0].removeprefix("--config.")
    for name in path.split("."):
      if not hasattr(section, "keys") or name not in section:
        known = list(section.keys()) if hasattr(section, "keys") else []
        near = difflib.get_close_matches(name, known, 1)
        hint = f"known: {', '.join(sorted(known)) or 'none'}"
        if near:
          hint = f"did you mean {near[0]!r}?"
        raise UserError(f"--config.{path}: {name!r} is not a field; {hint}")
      section = section[name]
