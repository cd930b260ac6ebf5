"""Makes configuration.md, beside this file, from the dataclasses that declare the fields.

    python docs/make_configuration.py
"""

import dataclasses
import inspect
import io
import pathlib
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpr_jax.config.fields import Value, kind_of, kinds, package_defaults, title_of
from dpr_jax.config.run_config import RunConfig, default_config
from dpr_jax.config.values import hints, optional

_INTRO = """\
# Configuration

<!-- Made by `python docs/make_configuration.py`; do not edit. -->

A config file returns `default_config()` with some of its fields changed; the command line changes
them further, as in `--config.sft.steps=200`. A field marked † may be changed when a run is resumed:
it affects results by rounding alone, or not at all.

Some fields hold a value of a *kind*, a dataclass with fields of its own. A config file assigns it:
`config.reference = EMA(decay=0.999)`. On the command line, `.kind` puts a value of another kind in
its place, with that kind's defaults: `--config.reference.kind=ema --config.reference.decay=0.999`.
The kinds that the package declares are listed below, after the sections. The kind of your own class
is `MODULE:CLASS`; [extending.md](extending.md) shows how to write one.

## Sections
"""
_HEADER = ["| field | default | meaning | allowed |", "|---|---|---|---|"]


def comments(cls: type) -> dict[str, str]:
  """Field -> the comment that ends the line of its declaration, of the class itself."""
  found, first = {}, ""
  for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(cls)).readline):
    if token.type in (tokenize.NEWLINE, tokenize.NL):
      first = ""
    elif token.type == tokenize.NAME and not first:
      first = token.string
    elif token.type == tokenize.COMMENT and first:
      found[first] = token.string.lstrip("# ").rstrip(".")
  return found


def meaning(cls: type, field: dataclasses.Field) -> str:
  """What a field means: its metadata, else the comment where it is declared; "" without either."""
  if field.metadata.get("meaning"):
    return field.metadata["meaning"]
  owner = next(c for c in cls.__mro__ if field.name in vars(c).get("__annotations__", {}))
  return comments(owner).get(field.name, "")


def _summary(cls: type) -> str:
  """The first paragraph of a docstring; that of the module where the class refers to it."""
  doc = inspect.getdoc(cls) or ""
  if doc.startswith("See the module docstring"):
    doc = inspect.getdoc(sys.modules[cls.__module__]) or ""
  return " ".join(doc.partition("\n\n")[0].split())


def _allowed(kind: Any, field: dataclasses.Field) -> str:
  """Type, bounds and choices, as in "float, > 0, ≤ 1"."""
  get = field.metadata.get
  if package := get("slot"):
    name = package.rpartition(".")[2]
    return f"a kind of [{name}](#{name})"
  choices = get("choices") or ()
  if choices := tuple(choices() if callable(choices) else choices):
    return ", ".join(f"`{c}`" for c in choices)
  if dataclasses.is_dataclass(kind):
    return "a dict of fields"
  element = getattr(kind, "__args__", None)
  name = f"list of {element[0].__name__}" if element else kind.__name__
  bounds = (("≥", get("low")), (">", get("above")), ("≤", get("high")), ("<", get("below")))
  number = lambda bound: str(bound) if isinstance(bound, int) else f"{bound:g}"
  return ", ".join([name, *(f"{sign} {number(b)}" for sign, b in bounds if b is not None)])


def _default(value: Any) -> str:
  if isinstance(value, Value):
    return f"`{kind_of(value)}`"
  return "" if dataclasses.is_dataclass(value) else f"`{value!r}`"


def _table(cls: type, value: Any, names: Sequence[str]) -> list[str]:
  """The rows of the fields in `names`, with the defaults of `value`."""
  fields, types = {f.name: f for f in dataclasses.fields(cls)}, hints(cls)
  rows = []
  for name in names:
    field = fields[name]
    mark = " †" if field.metadata.get("resumable") else ""
    cells = (f"`{name}`{mark}", _default(getattr(value, name)), meaning(cls, field),
             _allowed(optional(types[name])[0], field))
    rows.append(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |")
  return [*_HEADER, *rows] if rows else []


def _section(
    cls: type, value: Any, path: str, about: str, config: Mapping, seen: dict[type, tuple[str, Any]]
) -> Iterator[str]:
  """A heading, a table, and the sections below.

  Args:
    value: the section at its defaults.
    config: the same in the default config; a field that it lacks is no field of a run.
    seen: where a section of a class was shown, and its defaults.
  """
  yield f"\n### config{path and '.'}{path}\n\n{about}\n"
  if cls in seen:
    where, other = seen[cls]
    yield f"The fields of `config.{where}`, with the defaults {_changed(value, other) or 'there'}."
    return
  seen[cls] = path, value
  types, below = hints(cls), []
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(optional(types[field.name])[0]) and field.name in config:
      below.append(field)
  ours = [
      f.name for f in dataclasses.fields(cls)
      if f not in below and f.name in config and "slots" not in f.metadata
  ]
  yield from _table(cls, value, ours)
  for field in below:
    kind, inner = optional(types[field.name])[0], f"{path}.{field.name}".lstrip(".")
    text = meaning(cls, field)
    text = f"{text[:1].upper()}{text[1:]}. {_summary(kind)}" if text else _summary(kind)
    text += " †" if field.metadata.get("resumable") else ""
    found = getattr(value, field.name)
    yield from _section(
        kind, kind() if found is None else found, inner, text,
        config[field.name] or vars(kind()), seen,
    )


def _changed(value: Any, other: Any) -> str:
  """`steps=4, schedule='linear'`: the fields in which two instances of a class differ."""
  pairs = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
  changed = [f"{k}={v!r}" for k, v in pairs if v != getattr(other, k)]
  return f"`{', '.join(changed)}`" if changed else ""


def _values(package: str, paths: Sequence[str], about: str) -> Iterator[str]:
  """The kinds of a package: summary, fields, and the names that the package declares."""
  places = " and ".join(f"`config.{p}`" for p in paths)
  yield f"\n## {package.rpartition('.')[2]}\n\nKinds of {places}: {about} (`{package}`).\n"
  found, declared = sorted(kinds(package).items()), package_defaults(package)
  own = lambda cls: list(vars(cls).get("__annotations__", ()))
  fields_of = lambda cls: [f.name for f in dataclasses.fields(cls) if f.name in own(cls)]
  shared = dict.fromkeys(
      base for _, cls in found for base in reversed(cls.__mro__)
      if dataclasses.is_dataclass(base) and not vars(base).get("kind") and fields_of(base)
  )

  def named(name: str) -> str:
    changed = _changed(declared[name], type(declared[name])())
    return f"`{name}`{f' with {changed}' if changed else ''}"

  for base in shared:
    yield f"\n### Every `{base.__name__}`\n\n{_summary(base)}\n"
    yield from _table(base, base(), fields_of(base))
  for kind, cls in found:
    bases = " and ".join(f"`{c.__name__}`" for c in cls.__mro__ if c in shared)
    yield f"\n### `{kind}`: {title_of(cls())}\n\n{_summary(cls)}\n"
    yield from _table(cls, cls(), fields_of(cls))
    if bases:
      yield f"\nAlso the fields of every {bases}.\n"
    names = [name for name, value in declared.items() if type(value) is cls]
    if names:
      yield f"\nOf this kind in every config: {'; '.join(map(named, names))}.\n"


def _slots(cls: type, prefix: str) -> Iterator[tuple[str, dataclasses.Field]]:
  """(path, field) of every field that holds values of a kind, also inside of such values."""
  types = hints(cls)
  for field in dataclasses.fields(cls):
    path = f"{prefix}{field.name}"
    if "slots" in field.metadata:
      yield f"{path}.NAME", field
      for kind in kinds(field.metadata["slots"]).values():
        yield from _slots(kind, f"{path}.NAME.")
    elif "slot" in field.metadata:
      yield path, field
    elif dataclasses.is_dataclass(kind := optional(types[field.name])[0]):
      yield from _slots(kind, f"{path}.")


def page() -> str:
  """The text of docs/configuration.md."""
  lines = [_INTRO, *_section(RunConfig, RunConfig(), "", _summary(RunConfig), default_config(), {})]
  found: dict[str, dict[str, str]] = {}
  for path, field in _slots(RunConfig, ""):
    package = field.metadata.get("slots") or field.metadata["slot"]
    found.setdefault(package, {})[path] = field.metadata["meaning"]
  for package, places in found.items():
    lines += _values(package, list(places), next(iter(places.values())))
  return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


if __name__ == "__main__":
  pathlib.Path(__file__).with_name("configuration.md").write_text(page(), encoding="utf-8")
