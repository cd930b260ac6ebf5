"""Dataclasses to and from ml_collections and JSON.

`to_config` makes the `Config` that files of configs/ and the command line change, `build` turns it
(or JSON) back into dataclasses and names the field that is wrong, `to_json` writes config.json. A
`Value` becomes a section with the entry "kind".
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from dpr_jax.config.fields import Value, base_classes, kind_class, kind_of
from dpr_jax.errors import UserError

MAX_COUNT = 2**31 - 1  # Of whatever is counted, unless its field says otherwise.


class Config(ml_collections.ConfigDict):
  """A ConfigDict in which a dataclass may be assigned: it becomes the section of its fields."""

  def __setitem__(self, key, value):
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
      if self.is_locked and key not in self:
        super().__setitem__(key, None)  # Raises the error of a locked config.
      self._fields[key] = to_config(value)
    elif key in self and (callable(value) or isinstance(value, Value)):
      self._fields[key] = value  # A function or class by mistake: `build` refuses it by its path.
    else:
      super().__setitem__(key, value)


def hints(cls: type) -> dict[str, Any]:
  """Field name -> type."""
  found = typing.get_type_hints(cls)
  return {f.name: found[f.name] for f in dataclasses.fields(cls)}


def optional(kind: Any) -> tuple[Any, bool]:
  """(the type without None, whether None is allowed)."""
  if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
    rest = [k for k in typing.get_args(kind) if k is not types.NoneType]
    return rest[0], len(rest) < len(typing.get_args(kind))
  return kind, False


def to_config(value: Any) -> Config:
  """The section of a dataclass."""
  out = Config()
  if isinstance(value, Value):
    out["kind"] = kind_of(value)
  types_ = hints(type(value))
  for field in dataclasses.fields(value):
    item = getattr(value, field.name)
    kind, _ = optional(types_[field.name])
    if "slots" in field.metadata:
      section = Config()
      for name, entry in item.items():
        section[name] = entry
      out._fields[field.name] = section
    elif item is None and kind in (int, float, str, bool):
      # None of a known type, so that the command line can set it.
      out[field.name] = config_dict.placeholder(kind)
    else:
      out[field.name] = item
  return out


def to_json(value: Any) -> Any:
  """Plain dicts, lists and scalars of a dataclass, for config.json."""
  if dataclasses.is_dataclass(value):
    fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"kind": kind_of(value), **fields} if isinstance(value, Value) else fields
  if isinstance(value, Mapping):
    return {k: to_json(v) for k, v in value.items()}
  return [to_json(v) for v in value] if isinstance(value, tuple | list) else value


def convert(value: Any, kind: Any, where: str) -> Any:
  """`value` as the type of its field; UserError naming the field where it is another."""
  if typing.get_origin(kind) is tuple:
    if not isinstance(value, list | tuple):
      raise UserError(f"config.{where}={value!r} must be a list")
    if all(isinstance(v, str) for v in value):  # --config.data.tasks=add,sort is one string.
      value = [part for v in value for part in v.split(",") if part]
    element = typing.get_args(kind)[0]
    return tuple(convert(v, element, f"{where}[{i}]") for i, v in enumerate(value))
  if kind is Any:
    return value
  numbers = (int, float) if kind is float else kind
  if not isinstance(value, numbers) or (isinstance(value, bool) and kind is not bool):
    raise UserError(f"config.{where}={value!r} must be of type {kind.__name__}")
  if kind is float and not math.isfinite(value):
    raise UserError(f"config.{where}={value!r} must be a finite number")
  try:
    return kind(value)
  except OverflowError:  # An integer beyond what a float can hold.
    raise UserError(f"config.{where} is out of range; it must be a finite number") from None


def check_bounds(field: dataclasses.Field, value: Any, where: str) -> None:
  """Raises UserError where a value is none that its field allows."""
  choices = field.metadata.get("choices") or ()
  choices = choices() if callable(choices) else choices
  get = field.metadata.get
  low, high, above, below = get("low"), get("high"), get("above"), get("below")
  if high is None and isinstance(value, int):
    high = MAX_COUNT
  for x in value if isinstance(value, tuple) else (value,):
    if type(x) is int and abs(x) > 10**30:
      raise UserError(f"config.{where} is out of range; it has over 30 digits")
    if choices and x not in choices:
      raise UserError(f"config.{where}={x!r} is not one of {', '.join(choices)}")
    if isinstance(x, int | float) and (
        (low is not None and x < low) or (high is not None and x > high)
        or (above is not None and x <= above) or (below is not None and x >= below)
    ):
      bounds = (("at least", low), ("above", above), ("at most", high), ("below", below))
      right = " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
      raise UserError(f"config.{where}={x} is out of range; it must be {right}")


def build(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
  """A section, or its JSON -> the dataclass.

  Args:
    prefix: path of the section, ending with a dot; "" at the top.

  Raises:
    UserError: an unknown field, a wrong type, a value out of its bounds; names the field.
  """
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for name in values:
    if name not in fields and not (name == "kind" and issubclass(cls, Value)):
      raise UserError(f"config.{prefix}{name} is not a field; known: {', '.join(sorted(fields))}")
  types_, out = hints(cls), {}
  for name, field in fields.items():
    if name not in values:
      continue
    value, where = values[name], f"{prefix}{name}"
    kind, may_be_none = optional(types_[name])
    if value is None and (may_be_none or ("slot" in field.metadata and field.default is None)):
      out[name] = None
      continue
    if "slot" in field.metadata:
      out[name] = build_value(field.metadata["slot"], value, where)
    elif "slots" in field.metadata:
      if not isinstance(value, Mapping):
        raise UserError(f"config.{where}={value!r} is a section; assign values to its names")
      package = field.metadata["slots"]
      out[name] = {n: build_value(package, v, f"{where}.{n}") for n, v in value.items()}
    elif dataclasses.is_dataclass(kind):
      if not isinstance(value, Mapping):
        raise UserError(f"config.{where}={value!r} is a section; set its fields")
      out[name] = build(kind, value, f"{where}.")
    else:
      out[name] = convert(value, kind, where)
      check_bounds(field, out[name], where)
  try:
    return cls(**out)
  except ValueError as e:  # What a section checks of itself, such as a ModelConfig.
    raise UserError(f"config.{prefix.rstrip('.')}: {e}") from None


def build_value(package: str, value: Any, where: str) -> Value:
  """A section with a "kind" -> the value."""
  if callable(value) or isinstance(value, Value):
    bases = " or ".join(base.__name__ for base in base_classes(package))
    name = getattr(value, "__qualname__", type(value).__qualname__)
    raise UserError(f"config.{where}={name} must be an instance of a frozen dataclass derived from "
                    f"{bases}")
  if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
    raise UserError(f"config.{where}={value!r} is not a value of {package}; assign one, as in "
                    f"config.{where} = Class(field=...)")
  try:
    cls = kind_class(package, value["kind"])
  except ValueError as e:
    raise UserError(f"config.{where}.{e}") from None
  return build(cls, value, f"{where}.")
