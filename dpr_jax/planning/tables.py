"""Plans as text: one in full for the terminal, many as the Markdown tables of docs/scaling.md.

    python -m dpr_jax.planning.tables FOLDER docs/scaling.md

writes the tables of all plans in FOLDER between their marks in the file.
"""

import json
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from dpr_jax.errors import UserError

# The marks around each table of the document.
SECTIONS = ("plans", "meshes", "lora", "minimum")

_GIB = 2**30
_PROGRAMS = ("sft_step", "rollout_step", "reinforce_step")

Plan = dict[str, Any]


def marks(section: str) -> tuple[str, str]:
  return f"<!-- {section}: begin -->", f"<!-- {section}: end -->"


def _mesh(mesh: dict[str, int]) -> str:
  return ",".join(str(n) for n in mesh.values())


def _peak(entry: dict[str, Any]) -> int:
  """Peak of a program and what is resident beside it, bytes."""
  return (entry["peak_bytes"] or entry["exhausted_bytes"] or 0) + (entry["resident_bytes"] or 0)


def _over(entry: dict[str, Any]) -> bool:
  """Whether the compiler ran out of memory."""
  return entry["fits"] is False and entry["peak_bytes"] is None


def _name(plan: Plan) -> str:
  lora = f", LoRA {plan['lora_rank']}" if plan["lora_rank"] else ""
  return pathlib.PurePath(plan["config"]).stem + lora


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Markdown."""
  lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
  return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def warnings(plan: Plan) -> list[str]:
  """What the partitioner complains of, a line a program."""
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


def plan_text(plan: Plan) -> str:
  """The table that the door prints."""
  lora = f", LoRA rank {plan['lora_rank']}" if plan["lora_rank"] else ""
  rows, length, _ = plan["batch"]["sft"]
  lines = [
      f"{plan['config']}{lora} on {plan['topology']}: {plan['devices']} devices of "
      f"{plan['hbm_bytes'] / _GIB:.2f} GiB, {plan['parameters'] / 1e9:.2f} B parameters",
      f"batch: SFT {rows} x {length} (accumulation {plan['batch']['sft'][2]}), DPR "
      f"{plan['batch']['dpr'][0]} x ({plan['batch']['dpr'][1]} + {plan['batch']['dpr'][2]}) "
      f"(accumulation {plan['batch']['dpr'][3]})",
      "",
      f"{'mesh (data,fsdp,tensor)':<26}{'accumulation':>14}{'estimated GiB':>14}"
      f"{'estimated s':>13}  compiled",
  ]
  for c in plan["candidates"]:
    said = {None: "not compiled", True: "fits", False: "does not fit"}[c["fits"]]
    if c["peak_bytes"] is not None:
      said += f", {c['peak_bytes'] / _GIB:.1f} GiB"
    if c["floor_seconds"] is not None:
      said += f", at least {c['floor_seconds']:.2f} s"
    parts = ",".join(map(str, c["accumulation"]))
    lines.append(f"{_mesh(c['mesh']):<26}{parts:>14}{c['estimated_peak_bytes'] / _GIB:>14.1f}"
                 f"{c['estimated_seconds']:>13.2f}  {said}")
  head = ("program", "fits", "args", "temp", "peak", "+ resident", "PFLOP", "HBM GB", "ICI GB",
          "floor: compute", "HBM", "ICI")
  lines += ["", f"mesh {_mesh(plan['mesh'])}; GiB and figures of one device, seconds at least:",
            f"{head[0]:<16}{head[1]:>5}" + "".join(f"{h:>15}" for h in head[2:])]
  for name, p in plan["programs"].items():
    if p["peak_bytes"] is None:
      said = f"no  out of memory: {p['compiler_says']}" if _over(p) else "  not compiled"
      lines.append(f"{name:<16}{'':>3}{said}")
      continue
    memory = [p["argument_bytes"], p["temp_bytes"], p["peak_bytes"], _peak(p)]
    cells = [f"{x / _GIB:.2f}" for x in memory] + [
        f"{p['flops'] / 1e15:.3f}", f"{p['hbm_bytes_moved'] / 1e9:.1f}",
        f"{sum(p['collective_bytes'].values()) / 1e9:.1f}",
        *(f"{s:.3f}" for s in p["floor_seconds"].values()),
    ]
    fits = "yes" if p["fits"] else "no"
    lines.append(f"{name:<16}{fits:>5}" + "".join(f"{c:>15}" for c in cells))
    lines.append(" " * 16 + "collectives: " + (", ".join(
        f"{k} {p['collective_count'][k]} times {v / 1e9:.2f} GB"
        for k, v in p["collective_bytes"].items()) or "none"))
  lines += ["", *warnings(plan)]
  if plan["fits"]:
    lines.append(
        f"suggested: --config.mesh.data={plan['mesh']['data']} --config.mesh.fsdp="
        f"{plan['mesh']['fsdp']} --config.mesh.tensor={plan['mesh']['tensor']} "
        f"--config.sft.accumulation={plan['batch']['sft'][2]} "
        f"--config.dpr.accumulation={plan['batch']['dpr'][3]}; at most "
        f"{plan['tokens_per_second_bound']:,.0f} SFT tokens/s and "
        f"{plan['dpr_tokens_per_second_bound']:,.0f} response tokens/s (bounds, not measurements)")
  else:
    lines.append("nothing compiled fits; raise config.sft.accumulation and "
                 "config.dpr.accumulation, use LoRA (--config.model.lora.rank=16), or take more "
                 "devices")
  return "\n".join(lines)


def markdown(plans: Sequence[Plan]) -> str:
  """One row a plan: peaks with what is resident, floors, bounds; and what is to be warned of."""
  head = ["config", "topology", "mesh d,f,t", "attention", "SFT rows", "DPR rows", "fits",
          "SFT GiB", "rollout GiB", "update GiB", "SFT s", "rollout s", "update s", "SFT tokens/s",
          "response tokens/s"]
  rows, said = [], []
  for plan in plans:
    sft, dpr = plan["batch"]["sft"], plan["batch"]["dpr"]
    programs = [plan["programs"][n] for n in _PROGRAMS]
    bounds = [plan["tokens_per_second_bound"], plan["dpr_tokens_per_second_bound"]]
    rows.append([
        _name(plan), plan["topology"], _mesh(plan["mesh"]), plan["attention"],
        f"{sft[0]} / {sft[2]}", f"{dpr[0]} / {dpr[3]}", "yes" if plan["fits"] else "no",
        *(_memory(p) for p in programs), *(_longest_floor(p) for p in programs),
        *(f"{b:,.0f}" if b else "" for b in bounds),
    ])
    said += [f"- {_name(plan)} on {plan['topology']}: {line}" for line in warnings(plan)]
  return "\n".join([_table(head, rows), *([""] if said else []), *said])


def _memory(entry: dict[str, Any]) -> str:
  """GiB; empty where the program was not compiled."""
  if entry["fits"] is None:
    return ""
  return ("over, " if _over(entry) else "") + f"{_peak(entry) / _GIB:.1f}"


def _longest_floor(entry: dict[str, Any]) -> str:
  floors = entry["floor_seconds"]
  if not floors:
    return ""
  which = max(floors, key=floors.get)
  return f"{floors[which]:.2f} {which}"


def meshes_markdown(plans: Sequence[Plan]) -> str:
  """Of exhaustive searches a row a number of micro-batches: which meshes fit; the best in bold."""
  head = ["config", "topology", "accumulation", "fit: mesh (GiB, s)", "do not fit", "not compiled"]
  rows = []
  for plan in (p for p in plans if p["exhaustive"]):
    of_round = {}
    for c in plan["candidates"]:
      of_round.setdefault(tuple(c["accumulation"]), []).append(c)
    for parts, found in of_round.items():
      cells = {True: [], False: [], None: []}
      for c in sorted(found, key=lambda c: c["floor_seconds"] or 0.0):
        mesh = _mesh(c["mesh"])
        if c["fits"]:
          mesh = f"**{mesh}**" if plan["fits"] and c["mesh"] == plan["mesh"] else mesh
          mesh += f" ({c['peak_bytes'] / _GIB:.1f}, {c['floor_seconds']:.2f})"
        cells[c["fits"]].append(mesh)
      rows.append([_name(plan), plan["topology"], ", ".join(map(str, parts)),
                   *("; ".join(x) for x in cells.values())])
  return _table(head, rows)


def collectives_markdown(plans: Sequence[Plan]) -> str:
  """One row a program: what a device receives, by kind."""
  kinds = _kinds(e for p in plans for e in p["programs"].values())
  head = ["config", "topology", "mesh d,f,t", "program", *(f"{k} GB" for k in kinds)]
  return _table(head, [
      [_name(plan), plan["topology"], _mesh(plan["mesh"]), program, *_received(entry, kinds)]
      for plan in plans
      for program, entry in plan["programs"].items()
      if entry["collective_bytes"] is not None
  ])


def _kinds(entries: Iterable[dict[str, Any]]) -> list[str]:
  """Of collectives that any program has."""
  return sorted({kind for e in entries for kind in e["collective_bytes"] or ()})


def _received(entry: dict[str, Any], kinds: Sequence[str]) -> list[str]:
  return [f"{entry['collective_bytes'].get(k, 0) / 1e9:.2f}" for k in kinds]


def lora_markdown(plans: Sequence[Plan]) -> str:
  """One row a searched plan with LoRA that has its counterpart in full: the same batches."""
  key = lambda p: (p["config"], p["topology"], p["batch"]["sft"][:2], p["batch"]["dpr"][:3])
  searched = [p for p in plans if p["searched"]]
  head = ["config", "topology", "accumulation full / LoRA", "mesh full / LoRA",
          *(f"{n} GiB full / LoRA" for n in ("SFT", "rollout", "update"))]
  rows = []
  for full, lora in ((f, p) for p in searched for f in searched
                     if p["lora_rank"] and not f["lora_rank"] and key(f) == key(p)):
    parts = [f"{p['batch']['sft'][2]}, {p['batch']['dpr'][3]}" for p in (full, lora)]
    pairs = [parts, [_mesh(full["mesh"]), _mesh(lora["mesh"])]]
    pairs += [[_memory(p["programs"][n]) for p in (full, lora)] for n in _PROGRAMS]
    rows.append([_name(lora), full["topology"], *(" / ".join(pair) for pair in pairs)])
  return _table(head, rows)


def minimum_markdown(plans: Sequence[Plan]) -> str:
  """One row an SFT step on a mesh of fsdp alone: what it must receive, and what it does."""
  found = [p for p in plans if p["sft_minimum_bytes"] is not None
           and p["programs"]["sft_step"]["collective_bytes"] is not None]
  kinds = _kinds(p["programs"]["sft_step"] for p in found)
  head = ["config", "topology", "mesh d,f,t", "SFT rows", "gathered forward", "gathered backward",
          "gradients reduced", "minimum GB", "compiled GB", *(f"{k} GB" for k in kinds)]
  rows = []
  for plan in found:
    entry, parts = plan["programs"]["sft_step"], plan["sft_minimum_bytes"]
    least = [parts[k] for k in ("gathered_forward", "gathered_backward", "gradients_reduced")]
    totals = [sum(least), sum(entry["collective_bytes"].values())]
    rows.append([
        _name(plan), plan["topology"], _mesh(plan["mesh"]),
        f"{plan['batch']['sft'][0]} / {plan['batch']['sft'][2]}",
        *(f"{n / 1e9:.2f}" for n in least + totals), *_received(entry, kinds),
    ])
  return _table(head, rows)


def update(folder: str, document: str) -> None:
  """Replaces what stands between the marks of `document` by the tables of the plans in `folder`.

  Raises:
    UserError: a pair of marks is missing.
  """
  plans = [json.loads(p.read_text("utf-8")) for p in sorted(pathlib.Path(folder).glob("*.json"))]
  path = pathlib.Path(document)
  text = path.read_text("utf-8")
  bodies = {
      "plans": f"{markdown(plans)}\n\nBytes that one device receives in one execution:\n\n"
               f"{collectives_markdown(plans)}",
      "meshes": meshes_markdown(plans),
      "lora": lora_markdown(plans),
      "minimum": minimum_markdown(plans),
  }
  for section in SECTIONS:
    begin, end = marks(section)
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
      raise UserError(f"{document}: the lines {begin} and {end} are not there; the table goes "
                      "between them")
    body = bodies[section] if plans else "No plans here yet: `benchmarks/plan_all.sh` makes them."
    text = f"{before}{begin}\n{body}\n{end}{after}"
  path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
  update(*sys.argv[1:3])
