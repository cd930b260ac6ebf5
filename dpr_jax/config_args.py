"""What files of configs/ share: arguments after the colon, and configs made from other ones."""

import importlib.util
import pathlib
from typing import Any

import ml_collections

from dpr_jax.errors import UserError


def parse_arg(name: str, arg: str, **defaults: Any) -> ml_collections.ConfigDict:
  """Reads "corrupt=0.2,sft=early,debug"; a switch may stand alone. As big_vision's parse_arg.

  Args:
    name: of the config file, for errors.
    arg: what stood after the colon.
    defaults: the arguments there are; a value is converted to the type of its default.

  Raises:
    UserError: an argument that is not there, or a value of another type.
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


def other_config(file: str, name: str, arg: str = "") -> ml_collections.ConfigDict:
  """What get_config(arg) of another config file returns.

  Args:
    file: __file__ of the config that asks.
    name: path of the other one, from the folder of `file`.
  """
  path = (pathlib.Path(file).parent / name).resolve()
  spec = importlib.util.spec_from_file_location(f"dpr_jax_config_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arg)
