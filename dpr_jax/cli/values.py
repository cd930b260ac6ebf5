"""Values that a command line names: --FLAG=KIND, and their fields as --FLAG.FIELD=VALUE."""

import dataclasses
import importlib
import pathlib
import sys
from typing import Any

from absl import flags

from dpr_jax.config.fields import Value, kind_class
from dpr_jax.config.values import build, hints, optional
from dpr_jax.errors import UserError


def value_class(flag: str, package: str, spec: str, base: type[Value]) -> type[Value]:
  """The class that a flag names.

  Args:
    flag: its name, for errors.
    package: whose kinds need no module.
    spec: a kind, "module:Class", or "path/to/file.py:Class"; other modules beside a file can be
      imported by it.
    base: what it must be a subclass of.

  Raises:
    UserError: nothing of that kind.
  """
  where = f"--{flag}={spec}"
  module, _, name = spec.rpartition(":")
  file = None
  if module.endswith(".py"):
    file = pathlib.Path(module).resolve()
    if not file.is_file():
      raise UserError(f"{where}: no such file")
    if str(file.parent) not in sys.path:
      sys.path.append(str(file.parent))
    module = file.stem
  if module:
    try:
      found = importlib.import_module(module)
    except Exception as e:  # A user's module is a program: it can raise anything.
      raise UserError(f"{where}: {type(e).__name__}: {e}") from None
    if file is not None and pathlib.Path(found.__file__ or "").resolve() != file:
      raise UserError(f"{where}: another module is called {module}; rename the file")
    spec = f"{module}:{name}"
  try:
    cls = kind_class(package, spec)
  except ValueError as e:
    raise UserError(f"--{flag}: {e}; or name a class of your own: module:Class, file.py:Class"
                    ) from None
  if not issubclass(cls, base) or not dataclasses.is_dataclass(cls):
    raise UserError(f"{where}: {cls.__name__} must be a frozen dataclass and a subclass of "
                    f"{base.__module__}.{base.__name__}")
  return cls


_DEFINE = {
    int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool,
    str: flags.DEFINE_string,
}


def define_fields(values: flags.FlagValues, flag: str, cls: type[Value]) -> None:
  """--FLAG.FIELD for every field that is a number, a switch, text or a list of texts."""
  types = hints(cls)
  for field in dataclasses.fields(cls):
    kind, _ = optional(types[field.name])
    define = flags.DEFINE_list if kind == tuple[str, ...] else _DEFINE.get(kind)
    if define:
      name = f"{flag}.{field.name}"
      define(name, None, field.metadata.get("meaning", ""), flag_values=values)


def make_value(values: flags.FlagValues, flag: str, cls: type[Value]) -> Any:
  """The value of a class with the fields that flags set.

  Raises:
    UserError: a field out of its bounds, or fields that contradict each other; names the flag.
  """
  names = (field.name for field in dataclasses.fields(cls))
  given = {n: values[f"{flag}.{n}"].value for n in names if f"{flag}.{n}" in values}
  try:
    return build(cls, {n: v for n, v in given.items() if v is not None}, f"{flag}.")
  except UserError as e:
    raise UserError(str(e).replace("config.", "--", 1)) from None
  except TypeError as e:  # A field without a default.
    raise UserError(f"--{flag}: {e}") from None
