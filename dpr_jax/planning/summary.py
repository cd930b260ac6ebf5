"""Summaries of plans: one JSON line per plan, with the figures that the tables of a page print."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from dpr_jax.errors import UserError

_GIB = 2**30

Plan = dict[str, Any]  # As dpr_jax.plan writes it.
Line = dict[str, Any]  # Its summary, see `summarize`.


def mesh_text(mesh: dict[str, int]) -> str:
  """'1,4,4': data, fsdp, tensor."""
  return ",".join(str(n) for n in mesh.values())


def peak_bytes(entry: dict[str, Any]) -> int:
  """Peak memory of a program, together with what is resident beside it."""
  return (entry["peak_bytes"] or entry["exhausted_bytes"] or 0) + (entry["resident_bytes"] or 0)


def out_of_memory(entry: dict[str, Any]) -> bool:
  """Whether the compiler ran out of memory."""
  return entry["fits"] is False and entry["peak_bytes"] is None


def warnings(plan: Plan) -> list[str]:
  """What the partitioner warns of, a line per program."""
  out = []
  for name, entry in plan["programs"].items():
    times = entry["involuntary_rematerializations"]
    if times:
      out.append(f"warning: {name}: the partitioner copies whole arrays to every device, {times} "
                 "times (Involuntary full rematerialization)")
    elif times is None and entry["peak_bytes"] is not None:
      out.append(f"warning: {name}: the compiler's log was not readable, so that involuntary "
                 "rematerializations are not known")
  return out


def summarize(plan: Plan, name: str) -> Line:
  """The figures of a plan that the tables print, at the printed precision.

  `plan` is its name. `batch` holds rows, tokens per row and accumulation of the updates of each
  stage. `programs` maps the name of each program to None if it was not compiled, else to `gib`
  (peak and resident memory), `over` (whether it ran out of memory), `bound` (the longest roofline
  bound: seconds, and which), `received_gb` (by kind of collective) and `minimum_gb` (what an update
  must receive on a mesh of fsdp alone, in parts, and what it receives; None on others). `meshes`
  are those of an exhaustive search, the fastest first, or None.
  """
  return {
      "plan": name,
      "config": pathlib.PurePath(plan["config"]).stem,
      "lora_rank": plan["lora_rank"],
      "topology": plan["topology"],
      "mesh": mesh_text(plan["mesh"]),
      "attention": plan["attention"],
      "batch": {
          program.partition("/")[0]: [work["rows"], work["tokens"], work["accumulation"]]
          for program, work in plan["batch"].items() if "accumulation" in work
      },
      "fits": plan["fits"],
      "searched": plan["searched"],
      "programs": {n: _program(entry) for n, entry in plan["programs"].items()},
      "tokens_per_second": {
          stage: _rounded(bound, 0) for stage, bound in plan["tokens_per_second_bound"].items()
      },
      "meshes": _candidates(plan) if plan["exhaustive"] else None,
      "warnings": warnings(plan),
  }


def _rounded(x: float | None, digits: int, unit: float = 1.0) -> float | int | None:
  """x in the unit with as many decimals as are printed, an int if that is none."""
  if x is None:
    return None
  return float(f"{x / unit:.{digits}f}") if digits else int(f"{x / unit:.0f}")


def _gigabytes(parts: dict[str, float]) -> dict[str, float]:
  return {name: _rounded(n, 2, 1e9) for name, n in parts.items()}


def _program(entry: dict[str, Any]) -> dict[str, Any] | None:
  if entry["fits"] is None:
    return None
  bounds, received, least = (
      entry[key] for key in ("bound_seconds", "collective_bytes", "minimum_bytes")
  )
  longest = max(bounds, key=bounds.get) if bounds else None
  return {
      "gib": _rounded(peak_bytes(entry), 1, _GIB),
      "over": out_of_memory(entry),
      "bound": [_rounded(bounds[longest], 2), longest] if longest else None,
      "received_gb": None if received is None else _gigabytes(received),
      "minimum_gb": least and _gigabytes(
          least | {"minimum": sum(least.values()), "compiled": sum(received.values())}
      ),
  }


def _candidates(plan: Plan) -> list[dict[str, Any]]:
  return [
      {"accumulation": c["accumulation"], "mesh": mesh_text(c["mesh"]), "fits": c["fits"],
       "gib": _rounded(c["peak_bytes"], 1, _GIB),
       "seconds": _rounded(c["bound_seconds"], 2)}
      for c in sorted(plan["candidates"], key=lambda c: c["bound_seconds"] or 0.0)
  ]


def read(path: pathlib.Path) -> list[Line]:
  """The lines of a summary; none if the file does not exist.

  Raises:
    UserError: a line is not the summary of a plan.
  """
  lines = []
  for number, text in enumerate(path.read_text("utf-8").splitlines() if path.exists() else (), 1):
    try:
      lines.append(json.loads(text))
      lines[-1]["plan"]
    except (ValueError, TypeError, KeyError):
      raise UserError(f"{path}:{number}: not the summary of a plan") from None
  return lines


def add(plans: Sequence[pathlib.Path], summary: pathlib.Path) -> None:
  """Adds full plans to a summary, sorted by name; a line of the same name is replaced.

  Raises:
    UserError: a file is not a full plan.
  """
  lines = {line["plan"]: line for line in read(summary)}
  for path in plans:
    try:
      lines[path.stem] = summarize(json.loads(path.read_text("utf-8")), path.stem)
    except (OSError, ValueError, TypeError, KeyError) as e:
      raise UserError(f"{path}: not a plan that `python -m dpr_jax.plan --output` wrote: {e!r}"
                      ) from None
  text = [json.dumps(lines[name], separators=(",", ":")) + "\n" for name in sorted(lines)]
  summary.write_text("".join(text), encoding="utf-8")
