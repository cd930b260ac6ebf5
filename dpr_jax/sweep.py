"""A sweep: the runs of one config that differ in one field. Names, checks, and what they share.

    DIR/                    of the sweep; with several seeds, DIR/seed_N/ has the two below
      sft/ samples/ ...     what all points share, as in any workdir
      beta=0.5/             a point: a workdir of its own; the stages that it shares are links
    DIR/report/             results.json with all points; report.html with their table and plot

What a field cannot change is done once: a sweep over dpr.* trains SFT and a reference of its own
once, one over reference.fraction trains SFT once. Fields of which nothing is known (data.*, sft.*,
model.*) share nothing.
"""

import dataclasses
import difflib
import os
import re
import shutil
import typing

from dpr_jax import config as config_lib
from dpr_jax.config import RunConfig, SweepSection
from dpr_jax.errors import UserError
from dpr_jax.evals.corruption import CORRUPTION_FILE
from dpr_jax.evals.results import EXPERT_FILE, NLL_FILE
from dpr_jax.evals.systems import system_file
from dpr_jax.rewards.references import milestone_steps, reference_members
from dpr_jax.workdir import Workdir

# Sections of which a sweep makes no sense, or which name what a sweep itself uses.
_REFUSED = ("sweep", "mesh", "checkpoint", "log", "seed", "seeds")


@dataclasses.dataclass(frozen=True)
class Point:
  """One value of the field."""

  value: str  # as written in the config.
  name: str  # of its folder.
  config: RunConfig  # without the sweep; what its folder could be made with alone.


@dataclasses.dataclass(frozen=True)
class Shared:
  """What is done once for all points."""

  stages: tuple[str, ...] = ()  # trained.
  evaluated: tuple[str, ...] = ()  # systems, and "corruption".


def points(config: RunConfig) -> list[Point]:
  """The points of a sweep, each resolved as a run of its own.

  Raises:
    UserError: the field is unknown or cannot be swept, a value is not of its type or out of its
      range, or stands there twice. Nothing has been written then.
  """
  path, values = config.sweep.field, config.sweep.values
  kind = _kind_of(path)
  if not values:
    raise UserError(f"config.sweep.values is empty; give the values of config.{path}")
  out, seen = [], {}
  for value in values:
    parsed = _parse(path, kind, value)
    if parsed in seen:
      raise UserError(f"config.sweep.values: {seen[parsed]!r} and {value!r} are the same value of "
                      f"config.{path}")
    seen[parsed] = value
    flat = config_lib.to_json(dataclasses.replace(config, sweep=SweepSection()))
    section = flat
    *parents, last = path.split(".")
    for name in parents:
      section = section[name]
    section[last] = parsed
    try:
      point = config_lib.resolve(flat)
      milestone_steps(point.sft.milestones, point.sft.steps)
      reference_members(point)
    except UserError as e:
      raise UserError(f"config.sweep.values: at {value!r}: {e}") from None
    folder = re.sub(r"[^\w.+-]", "_", value)
    out.append(Point(value, f"{path.rpartition('.')[2]}={folder}", point))
  if len({p.name for p in out}) < len(out):
    raise UserError(f"config.sweep.values={','.join(values)} do not give folders of different "
                    "names; values may differ in letters, digits, '.', '+' and '-'")
  return out


def _kind_of(path: str) -> type:
  """The type of a field, given its dotted path."""
  section, names = RunConfig, path.split(".")
  for i, name in enumerate(names):
    fields = {f.name: f.type for f in dataclasses.fields(section)}
    if name not in fields or (i == 0 and name in _REFUSED):
      known = sorted(n for n in fields if i or n not in _REFUSED)
      near = difflib.get_close_matches(name, known, 1)
      hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
      raise UserError(f"config.sweep.field={path!r}: {name!r} is not a field to sweep over; {hint}")
    kind = fields[name]
    if i < len(names) - 1 and not dataclasses.is_dataclass(kind):
      raise UserError(f"config.sweep.field={path!r}: {name!r} is a field, not a section")
    section = kind
  if dataclasses.is_dataclass(kind):
    raise UserError(f"config.sweep.field={path!r} is a section; name one of its fields, such as "
                    f"{path}.{dataclasses.fields(kind)[0].name}")
  if kind not in (bool, int, float, str):
    raise UserError(f"config.sweep.field={path!r} holds {typing.get_origin(kind) or kind}; only a "
                    "number, a switch or a word can be swept over")
  return kind


def _parse(path: str, kind: type, value: str) -> bool | int | float | str:
  if kind is bool:
    if value not in ("True", "False"):
      raise UserError(f"config.sweep.values: {value!r} must be True or False, for config.{path}")
    return value == "True"
  try:
    return kind(value)
  except ValueError:
    raise UserError(
        f"config.sweep.values: {value!r} must be of type {kind.__name__}, for config.{path}"
    ) from None


def shared(config: RunConfig) -> Shared:
  """What the points of a sweep have in common."""
  path = config.sweep.field
  own_ref = ("ref",) if config.reference.kind == "half_data" else ()
  everywhere = ("base", "sft", "low_temperature")
  if path.startswith("dpr."):
    sets_it = path in ("dpr.beta", "dpr.beta_ref", "dpr.target_kl") or config.dpr.target_kl
    same_strength = config.eval.contrastive_alpha or not sets_it
    free = ("contrastive", "weight_extrapolation", "resampled") if same_strength else ()
    return Shared(("sft", *own_ref), (*everywhere, "ref", *free, "corruption"))
  if path == "reference.fraction":
    return Shared(("sft",), everywhere)
  if path.startswith("eval."):
    return Shared(("sft", *own_ref))
  return Shared()


def adopt(what: Shared, source: Workdir, point: Workdir) -> None:
  """Puts what is shared into a point's folder: stages as links, samples as copies.

  To be called by one process, after the point's config.json is there; again, it changes nothing.
  """
  for name in what.stages:
    link = point.stage(name)
    if not link.is_symlink() and source.stage(name).is_dir():
      link.symlink_to(os.path.relpath(source.stage(name), point.path), target_is_directory=True)
  files = [system_file(source.samples, name) for name in what.evaluated]
  files.append(source.samples / CORRUPTION_FILE)  # Also the name of its entry.
  files += [source.samples / NLL_FILE, source.samples / EXPERT_FILE]
  for file in dict.fromkeys(files):
    target = point.samples / file.name
    if file.exists() and not target.exists():
      point.samples.mkdir(parents=True, exist_ok=True)
      temporary = target.with_name(target.name + ".tmp")
      shutil.copyfile(file, temporary)
      os.replace(temporary, target)
