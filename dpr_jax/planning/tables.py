"""Plans as text: one in full for the terminal, many as the Markdown tables of docs/scaling.md.

    python -m dpr_jax.planning.tables FOLDER docs/scaling.md

writes the tables of all plans in FOLDER between the two marks in the file.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"

_GIB = 2**30


def _mesh(mesh: dict[str, int]) -> str:
  return ",".join(str(n) for n in mesh.values())


def _peak(entry: dict[str, Any]) -> int:
  """Peak of a program and what is resident beside it, bytes."""
  return entry.get("peak_bytes", entry.get("exhausted_bytes", 0)) + entry["resident_bytes"]


def plan_text(plan: dict[str, Any]) -> str:
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
      f"{'mesh (data,fsdp,tensor)':<26}{'estimated GiB':>14}{'estimated s':>13}  compiled",
  ]
  for c in plan["candidates"]:
    said = {None: "not compiled", True: "fits", False: "does not fit"}[c["fits"]]
    lines.append(f"{_mesh(c['mesh']):<26}{c['estimated_peak_bytes'] / _GIB:>14.1f}"
                 f"{c['estimated_seconds']:>13.2f}  {said}")
  head = ("program", "fits", "args", "temp", "peak", "+ resident", "PFLOP", "HBM GB", "ICI GB",
          "floor: compute", "HBM", "ICI")
  lines += ["", f"mesh {_mesh(plan['mesh'])}; GiB and figures of one device, seconds at least:",
            f"{head[0]:<16}{head[1]:>5}" + "".join(f"{h:>15}" for h in head[2:])]
  for name, p in plan["programs"].items():
    if "peak_bytes" not in p:
      lines.append(f"{name:<16}{'no':>5}  out of memory: {p['compiler_says']}")
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
  lines.append("")
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


def markdown(plans: Sequence[dict[str, Any]]) -> str:
  """One row a plan: peaks with what is resident, floors, bounds."""
  head = ["config", "topology", "mesh d,f,t", "SFT rows", "DPR rows", "fits", "SFT GiB",
          "rollout GiB", "update GiB", "SFT s", "rollout s", "update s", "SFT tokens/s",
          "response tokens/s"]
  lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  for plan in plans:
    name = pathlib.PurePath(plan["config"]).stem
    name += f", LoRA {plan['lora_rank']}" if plan["lora_rank"] else ""
    sft, dpr = plan["batch"]["sft"], plan["batch"]["dpr"]
    programs = [plan["programs"].get(n) for n in ("sft_step", "rollout_step", "reinforce_step")]
    memory, floors = [], []
    for p in programs:
      over = p is not None and "peak_bytes" not in p
      memory.append("" if p is None else f"{'over, ' if over else ''}{_peak(p) / _GIB:.1f}")
      if p is None or "floor_seconds" not in p:
        floors.append("")
        continue
      which = max(p["floor_seconds"], key=p["floor_seconds"].get)
      floors.append(f"{p['floor_seconds'][which]:.2f} {which}")
    bounds = [plan.get("tokens_per_second_bound"), plan.get("dpr_tokens_per_second_bound")]
    cells = [name, plan["topology"], _mesh(plan["mesh"]), f"{sft[0]} / {sft[2]}",
             f"{dpr[0]} / {dpr[3]}", "yes" if plan["fits"] else "no", *memory, *floors,
             *(f"{b:,.0f}" if b else "" for b in bounds)]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def collectives_markdown(plans: Sequence[dict[str, Any]]) -> str:
  """One row a program: what a device receives, by kind."""
  kinds = sorted({k for p in plans for e in p["programs"].values()
                  for k in e.get("collective_bytes", {})})
  head = ["config", "topology", "mesh d,f,t", "program", *(f"{k} GB" for k in kinds)]
  lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  for plan in plans:
    name = pathlib.PurePath(plan["config"]).stem
    name += f", LoRA {plan['lora_rank']}" if plan["lora_rank"] else ""
    for program, e in plan["programs"].items():
      if "collective_bytes" not in e:
        continue
      cells = [f"{e['collective_bytes'].get(k, 0) / 1e9:.2f}" for k in kinds]
      cells = [name, plan["topology"], _mesh(plan["mesh"]), program, *cells]
      lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def update(folder: str, document: str) -> None:
  """Replaces what stands between the marks of `document` by the tables of the plans in `folder`."""
  plans = [json.loads(p.read_text("utf-8")) for p in sorted(pathlib.Path(folder).glob("*.json"))]
  path = pathlib.Path(document)
  before, _, rest = path.read_text("utf-8").partition(BEGIN)
  _, _, after = rest.partition(END)
  body = f"{markdown(plans)}\n\nBytes that one device receives in one execution:\n\n"
  body += collectives_markdown(plans)
  path.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
  update(*sys.argv[1:3])
