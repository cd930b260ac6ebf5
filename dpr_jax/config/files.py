"""Files of configs/: how they are loaded, their arguments, and configs made from other ones."""

import dataclasses
import importlib.util
import pathlib
import sys
from typing import Any

import ml_collections

from dpr_jax.config.fields import kind_class
from dpr_jax.config.run_config import RunConfig
from dpr_jax.config.values import Config, hints, optional
from dpr_jax.errors import UserError


def load_config(spec: str) -> Config:
  """What get_config of NAME.py returns, of "NAME.py" or "NAME.py:arg".

  Modules beside the file can be imported by it: a user's own methods, rewards and metrics.

  Raises:
    UserError: no such file, an error in it, or something else than a config.
  """
  path, _, arg = spec.partition(":")
  file = pathlib.Path(path).absolute()
  if not file.is_file():
    raise UserError(f"--config={spec}: no such file; expected a file such as configs/smoke.py")
  if str(file.parent) not in sys.path:
    sys.path.append(str(file.parent))
  name = f"config_{file.stem}"
  try:
    loaded = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(loaded)
    sys.modules[name] = module  # So that classes defined in it can be named.
    loaded.loader.exec_module(module)
    config = module.get_config(arg) if arg else module.get_config()
  except UserError:
    raise
  except Exception as e:  # A config file is a program: it can raise anything.
    raise UserError(f"--config={spec}: {type(e).__name__}: {e}") from None
  if not isinstance(config, Config):
    raise UserError(f"--config={spec}: its get_config returns {type(config).__name__}; it must "
                    "return the config that dpr_jax.config.default_config() makes")
  return config


def _step(cls: Any, name: str) -> tuple[str, Any]:
  """(package of the value at a field or "", what stands below), of a section or of named values."""
  if isinstance(cls, str):  # Names of values of a package.
    return cls, None
  metadata = {f.name: f for f in dataclasses.fields(cls)}[name].metadata
  if "slots" in metadata:
    return "", metadata["slots"]
  return metadata.get("slot", ""), optional(hints(cls)[name])[0]


def set_kind(config: Config, path: str, kind: str) -> None:
  """Puts a value of another kind, at its defaults, where a config has one: --config.PATH.kind=KIND.

  Raises:
    UserError: the field takes no value, or there is no such kind.
  """
  *parents, last = path.split(".")
  section, cls = config, RunConfig
  try:
    for name in parents:
      package, below = _step(cls, name)
      section = section[name]
      cls = kind_class(package, section["kind"]) if package else below
    package, _ = _step(cls, last)
  except (KeyError, TypeError):
    package = ""
  if not package:
    raise UserError(f"--config.{path}.kind: config.{path} is not a value of some kind")
  try:
    section[last] = kind_class(package, kind)()
  except ValueError as e:
    raise UserError(f"--config.{path}.{e}") from None


def parse_arg(name: str, arg: str, **defaults: Any) -> ml_collections.ConfigDict:
  """Reads "corrupt=0.2,sft=early,debug"; a switch needs no value. As big_vision's parse_arg.

  Args:
    name: of the config file, for errors.
    arg: what stood after the colon.
    defaults: the arguments there are; a value is converted to the type of its default.

  Raises:
    UserError: an unknown argument, or a value of another type.
  """
  out = ml_collections.ConfigDict(defaults)
  for part in filter(None, arg.split(",")):
    key, given, text = part.partition("=")
    if key not in defaults or (not given and defaults[key] is not False):
      known = ", ".join(k if v is False else f"{k}={v}" for k, v in defaults.items())
      raise UserError(f"{name} takes {known}, separated by commas; not {part!r}")
    if not given:
      out[key] = True
      continue
    kind = type(defaults[key])
    if kind is bool and text not in ("True", "False"):
      raise UserError(f"{name}: {part!r} must be True or False")
    try:
      out[key] = text == "True" if kind is bool else kind(text)
    except ValueError:
      raise UserError(f"{name}: {part!r} must be of type {kind.__name__}") from None
  return out


def evaluate_on_others(config: ml_collections.ConfigDict) -> None:
  """Evaluates on as many held-out prompts beyond those that the config reports.

  For choosing settings, which must not be chosen on the prompts that are reported. Built-in tasks
  and files give the same first held-out prompts, however many follow.
  """
  config.eval.skip_prompts = config.data.holdout
  config.data.holdout *= 2


def other_config(file: str, name: str, arg: str = "") -> Config:
  """What get_config(arg) of another config file returns.

  Args:
    file: __file__ of the config that asks.
    name: path of the other one, from the folder of `file`.
  """
  path = (pathlib.Path(file).parent / name).resolve()
  return load_config(f"{path}:{arg}" if arg else str(path))
