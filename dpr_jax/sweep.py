"""A sweep: the runs of one config that differ in one field. Names, checks, and what they share.

    DIR/                    of the sweep; with several seeds, DIR/seed_N/ has the two below
      sft/ samples/ ...     what all points share, as in any workdir
      beta=0.5/             a point: a workdir of its own; the stages that it shares are links
    DIR/report/             results.json with all points; report.html with their table and plot

What a field cannot change is done once: a sweep over a field of one method trains SFT, the
reference and all other methods once. Fields of which nothing is known (data.*, sft.*, model.*)
share nothing.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from dpr_jax import config as config_lib
from dpr_jax import paths
from dpr_jax.config import RunConfig
from dpr_jax.config.sections import SweepSection
from dpr_jax.config.values import hints, optional
from dpr_jax.errors import UserError
from dpr_jax.workdir import Workdir

# Sections of which a sweep makes no sense, or which name what a sweep itself uses.
_REFUSED = ("sweep", "mesh", "checkpoint", "log", "seed", "seeds", "compare")


@dataclasses.dataclass(frozen=True)
class Point:
  """One value of the field."""

  value: str  # as written in the config.
  name: str  # of its folder.
  config: RunConfig  # without the sweep; what its folder could be made with alone.


@dataclasses.dataclass(frozen=True)
class Shared:
  """What is done once for all points."""

  sft: bool = False
  reference: bool = False
  methods: tuple[str, ...] = ()  # trained.
  systems: tuple[str, ...] = ()  # evaluated.
  evaluation: bool = True  # what else is measured of sft and ref.


def points(config: RunConfig) -> list[Point]:
  """The points of a sweep, each resolved as a run of its own.

  Raises:
    UserError: the field is unknown or cannot be swept, a value is not of its type or out of its
      range, or is listed twice. Nothing has been written then.
  """
  path, values = config.sweep.field, config.sweep.values
  kind = _kind_of(config, path)
  if not values:
    raise UserError(f"config.sweep.values is empty; give the values of config.{path}")
  out, seen = [], {}
  for value in values:
    parsed = _parse(path, kind, value)
    key = str(parsed)
    if key in seen:
      raise UserError(f"config.sweep.values: {seen[key]!r} and {value!r} are the same value of "
                      f"config.{path}")
    seen[key] = value
    flat = config_lib.to_json(dataclasses.replace(config, sweep=SweepSection()))
    section = flat
    *parents, last = path.split(".")
    for name in parents:
      section = section[name]
    section[last] = parsed
    try:
      point = config_lib.resolve(flat)
    except UserError as e:
      raise UserError(f"config.sweep.values: at {value!r}: {e}") from None
    folder = re.sub(r"[^\w.+-]", "_", value)
    out.append(Point(value, f"{path.rpartition('.')[2]}={folder}", point))
  if len({p.name for p in out}) < len(out):
    raise UserError(f"config.sweep.values={','.join(values)} do not give folders of different "
                    "names; values may differ in letters, digits, '.', '+' and '-'")
  return out


def _kind_of(config: RunConfig, path: str) -> Any:
  """The type of a field, given its dotted path; dict for a slot, which takes the name of a kind."""
  section, names = config, path.split(".")
  kind: Any = RunConfig
  for i, name in enumerate(names):
    if isinstance(section, Mapping):
      known, fields = list(section), {}
    else:
      fields = {f.name: f for f in dataclasses.fields(section)}
      known = [n for n in fields if i or n not in _REFUSED]
    if name not in known:
      near = difflib.get_close_matches(name, known, 1)
      hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
      raise UserError(f"config.sweep.field={path!r}: {name!r} is not a field to sweep over; {hint}")
    if isinstance(section, Mapping):
      kind, section = Mapping, section[name]
    else:
      is_slot = "slot" in fields[name].metadata
      kind = dict if is_slot else optional(hints(type(section))[name])[0]
      section = getattr(section, name)
    last = i == len(names) - 1
    if not last and not dataclasses.is_dataclass(section) and not isinstance(section, Mapping):
      raise UserError(f"config.sweep.field={path!r}: {name!r} is a field, not a section")
  if kind is dict:
    return dict
  if isinstance(section, Mapping) or dataclasses.is_dataclass(section):
    names = list(section) if isinstance(section, Mapping) else [
        f.name for f in dataclasses.fields(section)]
    raise UserError(f"config.sweep.field={path!r} is a section; name one of its fields, such as "
                    f"{path}.{names[0]}")
  if kind not in (bool, int, float, str):
    raise UserError(f"config.sweep.field={path!r} holds {typing.get_origin(kind) or kind}; only a "
                    "number, a switch or a word can be swept over")
  return kind


def _parse(path: str, kind: Any, value: str) -> Any:
  if kind is dict:
    return {"kind": value}
  if kind is bool:
    if value not in ("True", "False"):
      raise UserError(f"config.sweep.values: {value!r} must be True or False, for config.{path}")
    return value == "True"
  try:
    return kind(value)
  except ValueError:
    raise UserError(f"config.sweep.values: {value!r} must be of type {kind.__name__}, for "
                    f"config.{path}") from None


def shared(config: RunConfig) -> Shared:
  """What the points of a sweep have in common."""
  top, _, rest = config.sweep.field.partition(".")
  compared = config.compared()
  every = ("base", "ref", "sft")
  if top == "methods":
    swept = rest.partition(".")[0]
    free = _closed([n for n in compared if n != swept], compared, swept)
    return Shared(True, True, free, (*every, *free))
  if top == "budget":
    free = tuple(n for n, m in compared.items() if not m.trained and not m.refers())
    return Shared(True, True, (), (*every, *free))
  if top == "reference":
    same = {p.config.reference.ema_decay for p in points(config)} == {config.reference.ema_decay}
    free = _closed([n for n, m in compared.items() if not m.reads_reference], compared)
    return Shared(True, False, free, ("base", "sft", *free), False) if same else Shared()
  if top == "eval":
    chosen, judged = config.reference.measured, rest.partition(".")[0] == "benchmark"
    free = [
        n for n, m in compared.items()
        if not (chosen and m.reads_reference) and not (judged and m.reads_benchmark)
    ]
    free = _closed(free, compared)
    return Shared(True, not chosen, free, (), False)
  return Shared()


def _closed(
    free: Sequence[str], compared: Mapping[str, Any], swept: str = ""
) -> tuple[str, ...]:
  """Those of the methods that do not read what differs between points.

  A method that trains reads the result of those that it refers to, another one their settings.
  """
  bound = {swept, *compared} - {*free}
  reads = lambda n: {*compared[n].refers()} & (bound if compared[n].trained else {swept})
  while found := {n for n in compared if n not in bound and reads(n)}:
    bound |= found
  return tuple(n for n in free if n not in bound)


def adopt(what: Shared, source: Workdir, point: Workdir) -> None:
  """Puts what is shared into a point's folder: stages as links, samples as copies.

  Called by one process, after the point's config.json is written; a second call changes nothing.
  """
  stages = [*(["sft"] if what.sft else []), *(["ref"] if what.reference else []), *what.methods]
  for name in stages:
    paths.share(source.stage(name), point.stage(name))
  files = [source.system_file(name) for name in what.systems]
  files += [source.frontier / f"{name}.jsonl" for name in what.systems]
  files += [source.reference_file] if what.reference else []
  if what.systems and what.reference:  # Else each point measures them under its own reference.
    files += [source.measures_file]
  if what.evaluation:
    files += [source.corruption_file]
  for file in files:
    target = point.path / file.relative_to(source.path)
    if file.exists() and not target.exists():
      paths.copy(file, target)
      point.record(target)
