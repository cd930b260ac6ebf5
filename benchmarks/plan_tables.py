"""Summaries of plans, a JSON line each, and from them the Markdown tables of docs/scaling.md.

    python -m benchmarks.plan_tables summarize PLAN.json ... --output=docs/plans.jsonl
    python -m benchmarks.plan_tables docs/plans.jsonl docs/scaling.md

`summarize` reads full plans, as `python -m dpr_jax.plan --output=PLAN.json` writes them, and adds a
line for each to the summary: the figures that the tables print, under the file's name. A line of
the same name is replaced. The second command writes the tables between their marks in the page.
"""

import argparse
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from dpr_jax.errors import UserError
from dpr_jax.planning.report import out_of_memory, peak_bytes
from dpr_jax.planning.text import Plan, mesh_text, warnings

Line = dict[str, Any]  # The summary of a plan, see `summarize`.

# The marks around each table of the document.
SECTIONS = ("plans", "meshes", "lora", "minimum")

_GIB = 2**30


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


def marks(section: str) -> tuple[str, str]:
  return f"<!-- {section}: begin -->", f"<!-- {section}: end -->"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Markdown."""
  lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
  return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _name(line: Line) -> str:
  return line["config"] + (f", LoRA {line['lora_rank']}" if line["lora_rank"] else "")


def _keys(lines: Iterable[Line], key: str) -> list[str]:
  """The keys of the dicts under `key`, in order of appearance: programs, parts of the batch."""
  return list(dict.fromkeys(k for line in lines for k in line[key]))


def _rows(shape: Sequence[int] | None) -> str:
  """'64 / 4': rows per step / accumulation, the first and the last number of a batch."""
  return f"{shape[0]} / {shape[-1]}" if shape else ""


def _memory(program: dict[str, Any] | None) -> str:
  """GiB; empty where the program was not compiled."""
  return f"{'over, ' if program['over'] else ''}{program['gib']:.1f}" if program else ""


def _bound(program: dict[str, Any] | None) -> str:
  return "{:.2f} {}".format(*program["bound"]) if program and program["bound"] else ""


def markdown(lines: Sequence[Line]) -> str:
  """One row per plan: memory, roofline bounds, throughput; the warnings are below the table."""
  batches, programs = _keys(lines, "batch"), _keys(lines, "programs")
  tokens = _keys(lines, "tokens_per_second")
  head = ["config", "topology", "mesh d,f,t", "attention", *(f"{b} rows" for b in batches),
          "fits", *(f"{p} {unit}" for unit in ("GiB", "s") for p in programs),
          *(f"{t} tokens/s" for t in tokens)]
  rows, notes = [], []
  for line in lines:
    found = [line["programs"].get(p) for p in programs]
    bounds = [line["tokens_per_second"].get(t) for t in tokens]
    rows.append([
        _name(line), line["topology"], line["mesh"], line["attention"],
        *(_rows(line["batch"].get(b)) for b in batches), "yes" if line["fits"] else "no",
        *map(_memory, found), *map(_bound, found), *(f"{b:,}" if b else "" for b in bounds),
    ])
    notes += [f"- {_name(line)} on {line['topology']}: {text}" for text in line["warnings"]]
  return "\n".join([_table(head, rows), *([""] if notes else []), *notes])


def meshes_markdown(lines: Sequence[Line]) -> str:
  """One row per exhaustive search and accumulation: which meshes fit, the best in bold."""
  head = ["config", "topology", "accumulation", "fit: mesh (GiB, s)", "do not fit", "not compiled"]
  rows = []
  for line in (p for p in lines if p["meshes"]):
    of_round = {}
    for c in line["meshes"]:
      of_round.setdefault(tuple(c["accumulation"]), []).append(c)
    for parts in sorted(of_round):
      cells = {True: [], False: [], None: []}
      for c in of_round[parts]:
        mesh = c["mesh"]
        if c["fits"]:
          mesh = f"**{mesh}**" if line["fits"] and mesh == line["mesh"] else mesh
          mesh += f" ({c['gib']:.1f}, {c['seconds']:.2f})"
        cells[c["fits"]].append(mesh)
      rows.append([_name(line), line["topology"], ", ".join(map(str, parts)),
                   *("; ".join(x) for x in cells.values())])
  return _table(head, rows)


def collectives_markdown(lines: Sequence[Line]) -> str:
  """One row per program: what a device receives, by kind of collective."""
  found = [(line, name, program["received_gb"]) for line in lines
           for name, program in line["programs"].items()
           if program and program["received_gb"] is not None]
  kinds = _kinds(received for _, _, received in found)
  head = ["config", "topology", "mesh d,f,t", "program", *(f"{k} GB" for k in kinds)]
  return _table(head, [
      [_name(line), line["topology"], line["mesh"], name, *_received(received, kinds)]
      for line, name, received in found
  ])


def _kinds(received: Iterable[dict[str, float]]) -> list[str]:
  """The kinds of collectives that occur in any program."""
  return sorted({kind for r in received for kind in r})


def _received(received: dict[str, float], kinds: Sequence[str]) -> list[str]:
  return [f"{received.get(k, 0.0):.2f}" for k in kinds]


def lora_markdown(lines: Sequence[Line]) -> str:
  """One row per searched plan with LoRA beside the full one searched for the same batches."""
  key = lambda p: (p["config"], p["topology"], {k: x[:-1] for k, x in p["batch"].items()})
  searched = [p for p in lines if p["searched"]]
  programs = _keys(lines, "programs")
  head = ["config", "topology", "accumulation full / LoRA", "mesh full / LoRA",
          *(f"{p} GiB full / LoRA" for p in programs)]
  rows = []
  for pair in ((f, p) for p in searched for f in searched
               if p["lora_rank"] and not f["lora_rank"] and key(f) == key(p)):
    cells = [[", ".join(str(x[-1]) for x in p["batch"].values()) for p in pair],
             [p["mesh"] for p in pair],
             *([_memory(p["programs"].get(n)) for p in pair] for n in programs)]
    rows.append([_name(pair[1]), pair[1]["topology"], *(" / ".join(c) for c in cells)])
  return _table(head, rows)


def minimum_markdown(lines: Sequence[Line]) -> str:
  """One row per update on a mesh of fsdp alone: what it must receive, and what it receives."""
  found = [(line, name, p["minimum_gb"], p["received_gb"]) for line in lines
           for name, p in line["programs"].items() if p and p["minimum_gb"]]
  kinds = _kinds(received for *_, received in found)
  parts = list(dict.fromkeys(part for _, _, least, _ in found for part in least))
  head = ["config", "topology", "mesh d,f,t", "program", "rows",
          *(p.replace("_", " ") for p in parts), *(f"{k} GB" for k in kinds)]
  return _table(head, [
      [_name(line), line["topology"], line["mesh"], name,
       _rows(line["batch"][name.partition("/")[0]]), *(f"{least[p]:.2f}" for p in parts),
       *_received(received, kinds)]
      for line, name, least, received in found
  ])


def update(summary: pathlib.Path, document: pathlib.Path) -> None:
  """Replaces the text between the marks of `document` with the tables of the plans.

  Raises:
    UserError: a pair of marks is missing.
  """
  lines = read(summary)
  text = document.read_text("utf-8")
  bodies = {
      "plans": f"{markdown(lines)}\n\nBytes that one device receives in one execution:\n\n"
               f"{collectives_markdown(lines)}",
      "meshes": meshes_markdown(lines),
      "lora": lora_markdown(lines),
      "minimum": minimum_markdown(lines),
  }
  for section in SECTIONS:
    begin, end = marks(section)
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
      raise UserError(f"{document}: the lines {begin} and {end} are missing; the table goes "
                      "between them")
    body = bodies[section] if lines else "No plans here yet: `benchmarks/plan_all.sh` makes them."
    text = f"{before}{begin}\n{body}\n{end}{after}"
  document.write_text(text, encoding="utf-8")


def main(argv: Sequence[str]) -> None:
  if argv and argv[0] == "summarize":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_tables summarize")
    parser.add_argument("plans", nargs="+", type=pathlib.Path, metavar="PLAN.json")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="the summary to update")
    args = parser.parse_args(argv[1:])
    return add(args.plans, args.output)
  if len(argv) != 2:
    raise UserError("usage: python -m benchmarks.plan_tables docs/plans.jsonl docs/scaling.md, or "
                    "python -m benchmarks.plan_tables summarize PLAN.json ... --output=SUMMARY")
  summary, document = map(pathlib.Path, argv)
  for path in (summary, document):
    if not path.is_file():
      raise UserError(f"{path}: no such file")
  update(summary, document)


if __name__ == "__main__":
  from dpr_jax import cli

  cli.run_entry_point(main)
