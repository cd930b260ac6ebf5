"""Fields of a config that say what they mean and what they allow.

    beta: float = setting(1.0, "weight of the KL to SFT, per nat", low=0)

The declaration of a field holds all of this; validation, the command line and
docs/configuration.md read it from there.
"""

import dataclasses
import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar


def setting(
    default: Any,
    meaning: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | Callable[[], Sequence[str]] = (),
    resumable: bool = False,
) -> Any:
  """A dataclass field.

  Args:
    meaning: one line with the unit, for the configuration reference.
    low, high: inclusive bounds; of each element of a tuple.
    above, below: exclusive bounds.
    choices: the values allowed, or a function that returns them.
    resumable: the field changes results by rounding alone, so that a resumed run may change it.
  """
  metadata = {
      "meaning": meaning, "low": low, "high": high, "above": above, "below": below,
      "choices": choices, "resumable": resumable,
  }
  return dataclasses.field(default=default, metadata=metadata)


def declared(module: str, name: str) -> Callable[[], Sequence[str]]:
  """`choices` of a field that are declared elsewhere: NAME of a module, read when needed."""
  return lambda: tuple(getattr(importlib.import_module(module), name))


def section(cls: type, *, resumable: bool = False) -> Any:
  """A field that holds a section, a dataclass, at its defaults."""
  return dataclasses.field(default_factory=cls, metadata={"resumable": resumable})


def slot(package: str, default: str | None, meaning: str = "") -> Any:
  """A field that holds a `Value` of some kind.

  Args:
    package: where the project's own kinds are declared, such as "dpr_jax.references".
    default: a kind, made with its defaults; None leaves the field None by default.
  """
  metadata = {"meaning": meaning, "slot": package}
  if default is None:
    return dataclasses.field(default=None, metadata=metadata)
  return dataclasses.field(
      default_factory=lambda: kind_class(package, default)(), metadata=metadata
  )


def slots(package: str, meaning: str = "") -> Any:
  """A field that maps names to `Value`s; its default holds what the package declares.

  A module of the package declares them as `DEFAULTS`: name -> value.
  """
  return dataclasses.field(
      default_factory=lambda: package_defaults(package),
      metadata={"meaning": meaning, "slots": package},
  )


class Value:
  """Base class of what a config can name and a user can add: a frozen dataclass in one file.

  Its fields are its settings. A class of the project has a `kind`, by which config files and the
  command line name it; that of any other class is "module:Class".
  """

  kind: ClassVar[str] = ""
  title: ClassVar[str] = ""  # in tables and plots.

  def check(self, config: Any) -> None:
    """Raises ValueError where the value does not go together with the rest of a `RunConfig`."""


def kind_of(value: Value | type[Value]) -> str:
  """How a config names the class of a value."""
  cls = value if isinstance(value, type) else type(value)
  return vars(cls).get("kind") or f"{cls.__module__}:{cls.__qualname__}"


def title_of(value: Value) -> str:
  """The title of a value's class; of a class without one, its name in words."""
  cls = type(value)
  own = next((vars(c)["title"] for c in cls.__mro__ if vars(c).get("title")), "")
  return own or re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cls.__name__)


@functools.cache
def _modules(package: str) -> list[Any]:
  """The modules of a package; of a plain module, itself."""
  top = importlib.import_module(package)
  names = [m.name for m in pkgutil.iter_modules(getattr(top, "__path__", ()))]
  return [importlib.import_module(f"{package}.{name}") for name in names] or [top]


def kinds(package: str) -> dict[str, type[Value]]:
  """Kind -> class, of all modules of a package."""
  return {
      cls.kind: cls
      for module in _modules(package)
      for cls in vars(module).values()
      if isinstance(cls, type) and issubclass(cls, Value) and cls.__module__ == module.__name__
      and vars(cls).get("kind")
  }


def base_classes(package: str) -> list[type[Value]]:
  """What the values of a package are, such as `methods.Method`."""
  found = [cls for module in _modules(package) for cls in vars(module).values()]
  return list(dict.fromkeys(c for c in found if isinstance(c, type) and Value in c.__bases__))


def package_defaults(package: str) -> dict[str, Value]:
  """Name -> value, of the `DEFAULTS` of all modules of a package."""
  return {
      name: value
      for module in _modules(package)
      for name, value in getattr(module, "DEFAULTS", {}).items()
  }


def kind_class(package: str, kind: str) -> type[Value]:
  """The class that a config names.

  Raises:
    ValueError: neither a kind of the package nor an importable "module:Class"; lists the kinds.
  """
  module, _, name = kind.partition(":")
  if name:
    try:
      found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
      raise ValueError(f"kind={kind!r} cannot be imported ({e})") from None
    bases = tuple(base_classes(package))
    if isinstance(found, type) and issubclass(found, bases):
      return found
    names = " or ".join(base.__name__ for base in bases)
    raise ValueError(f"kind={kind!r} is not a subclass of {names}")
  known = kinds(package)
  if kind not in known:
    raise ValueError(f"kind={kind!r} is not one of {', '.join(sorted(known))}")
  return known[kind]


def overlay(base: Any, changes: Mapping[str, Any] | Any) -> Any:
  """The dataclass `base` with those fields of `changes` that are not None."""
  if dataclasses.is_dataclass(changes):
    changes = {f.name: getattr(changes, f.name) for f in dataclasses.fields(changes)}
  return dataclasses.replace(base, **{k: v for k, v in changes.items() if v is not None})
