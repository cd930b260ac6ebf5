"""The flags of the doors that take a config: --config=FILE and --config.FIELD=VALUE."""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from dpr_jax.errors import UserError


def parse_config(
    argv: Sequence[str],
    *,
    door: str,
    doc: str,
    define: Callable[[flags.FlagValues], Any],
    required: dict[str, str],
):
  """Command line -> (ConfigDict, flag values).

  Args:
    door: the module, as in "dpr_jax.main".
    doc: what --help prints.
    define: adds the flags of the door to the values it is given.
    required: name of a flag that must be set -> an example of its value.

  Raises:
    UserError: naming the flag or the field, and what would be right.
  """
  argv = [_quote_transforms(arg) for arg in argv]
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file(
      "config", None, "A file of configs/, NAME.py or NAME.py:arg.", lock_config=True,
      flag_values=values, sys_argv=[door, *argv],
  )
  define(values)
  flags.DEFINE_bool("help", False, "Shows this text.", short_name="h", flag_values=values)
  try:
    rest = values([door, *argv])[1:]
    if config.value is not None:
      config.value.to_dict()  # A file that failed to load says so only when it is used.
  except OSError as e:
    path = config_path(argv)
    raise UserError(f"--config={path}: {e.strerror or 'no such file'}; expected a file such as "
                    "configs/smoke.py") from None
  except Exception as e:  # A config file is a program: it can raise anything.
    check_fields(argv)
    # An error inside of the file arrives as a traceback in a string; its end says it.
    raise UserError(re.split(r"\b[\w.]*Error: ", str(e))[-1]) from None
  if values.help:
    print(doc)
    raise SystemExit(0)
  if rest:
    raise UserError(f"{rest[0]!r} is not a flag; fields are set as --config.FIELD=VALUE")
  for name, example in required.items():
    if name == "config" and config.value is None and config_path(argv):
      raise UserError(f"--config={config_path(argv)}: its get_config returns nothing; it must "
                      "return the config")
    if values[name].value is None:
      raise UserError(f"--{name} is missing; for example --{name}={example}")
  return config.value, values


def _quote_transforms(arg: str) -> str:
  """--config.dpr.transforms=clip:2,scale:0.5 with its entries in quotes.

  A flag that is a tuple is read as Python, and clip:2 is not.
  """
  name, _, value = arg.partition("=")
  if name != "--config.dpr.transforms" or not value or value[0] in "('\"[":
    return arg
  return f"{name}={tuple(value.split(','))!r}"


def config_path(argv: Sequence[str]) -> str:
  """The value of --config on a command line, "" if there is none."""
  for i, arg in enumerate(argv):
    if arg == "--config" and i + 1 < len(argv):
      return argv[i + 1]
    if arg.startswith("--config="):
      return arg.partition("=")[2]
  return ""


def check_fields(argv: Sequence[str]) -> None:
  """Raises UserError for the first --config.FIELD that no config has, with the nearest name."""
  from dpr_jax.config import default_config

  for arg in argv:
    if not arg.startswith("--config."):
      continue
    section, path = default_config(), arg.partition("=")[0].removeprefix("--config.")
    for name in path.split("."):
      if not hasattr(section, "keys") or name not in section:
        known = list(section.keys()) if hasattr(section, "keys") else []
        near = difflib.get_close_matches(name, known, 1)
        hint = f"known: {', '.join(sorted(known)) or 'none'}"
        if near:
          hint = f"did you mean {near[0]!r}?"
        raise UserError(f"--config.{path}: {name!r} is not a field; {hint}")
      section = section[name]
