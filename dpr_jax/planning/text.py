"""A plan as text for the terminal."""

from typing import Any

from dpr_jax.planning.report import out_of_memory, peak_bytes

_GIB = 2**30

Plan = dict[str, Any]  # What `plan.make_plan` returns.


def mesh_text(mesh: dict[str, int]) -> str:
  """'1,4,4': data, fsdp, tensor."""
  return ",".join(str(n) for n in mesh.values())


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


def plan_text(plan: Plan) -> str:
  """What the entry point prints."""
  lora = f", LoRA rank {plan['lora_rank']}" if plan["lora_rank"] else ""
  names = max(16, *(len(name) + 2 for name in plan["programs"]))  # Width of their column.
  lines = [
      f"{plan['config']}{lora} on {plan['topology']}: {plan['devices']} devices of "
      f"{plan['hbm_bytes'] / _GIB:.2f} GiB, {plan['parameters'] / 1e9:.2f} B parameters",
      *(f"{name:<{names}}" + ", ".join(f"{field} {n}" for field, n in work.items())
        for name, work in plan["batch"].items()),
      "",
      f"{'mesh (data,fsdp,tensor)':<26}{'accumulation':>14}{'estimated GiB':>14}"
      f"{'estimated s':>13}  compiled",
  ]
  for c in plan["candidates"]:
    outcome = {None: "not compiled", True: "fits", False: "does not fit"}[c["fits"]]
    if c["peak_bytes"] is not None:
      outcome += f", {c['peak_bytes'] / _GIB:.1f} GiB"
    if c["bound_seconds"] is not None:
      outcome += f", at least {c['bound_seconds']:.2f} s"
    parts = ",".join(map(str, c["accumulation"]))
    lines.append(f"{mesh_text(c['mesh']):<26}{parts:>14}{c['estimated_peak_bytes'] / _GIB:>14.1f}"
                 f"{c['estimated_seconds']:>13.2f}  {outcome}")
  head = ("args", "temp", "peak", "+ resident", "PFLOP", "HBM GB", "ICI GB", "bound: compute",
          "HBM", "ICI")
  lines += ["", f"mesh {mesh_text(plan['mesh'])}; figures of one device, memory in GiB, roofline "
                "bounds in seconds:",
            f"{'program':<{names}}{'fits':>5}" + "".join(f"{h:>15}" for h in head)]
  for name, p in plan["programs"].items():
    if p["peak_bytes"] is None:
      over = out_of_memory(p)
      outcome = f"no  out of memory: {p['compiler_message']}" if over else "  not compiled"
      lines.append(f"{name:<{names}}{'':>3}{outcome}")
      continue
    memory = [p["argument_bytes"], p["temp_bytes"], p["peak_bytes"], peak_bytes(p)]
    cells = [f"{x / _GIB:.2f}" for x in memory] + [
        f"{p['flops'] / 1e15:.3f}", f"{p['hbm_bytes_moved'] / 1e9:.1f}",
        f"{sum(p['collective_bytes'].values()) / 1e9:.1f}",
        *(f"{s:.3f}" for s in p["bound_seconds"].values()),
    ]
    fits = "yes" if p["fits"] else "no"
    lines.append(f"{name:<{names}}{fits:>5}" + "".join(f"{c:>15}" for c in cells))
    lines.append(" " * names + "collectives: " + (", ".join(
        f"{k} {p['collective_count'][k]} times {v / 1e9:.2f} GB"
        for k, v in p["collective_bytes"].items()) or "none"))
  lines += ["", *warnings(plan)]
  if plan["fits"]:
    fields = {f"config.mesh.{axis}": n for axis, n in plan["mesh"].items()} | plan["accumulation"]
    speeds = [f"{x:,.0f} {stage}" for stage, x in plan["tokens_per_second_bound"].items()]
    flags = " ".join(f"--{field}={n}" for field, n in fields.items())
    lines.append(f"suggested: {flags}; tokens/s of each stage, at most: {', '.join(speeds)} "
                 "(bounds, not measurements)")
  else:
    lines.append(f"nothing compiled fits; raise {' and '.join(plan['accumulation'])}, use LoRA "
                 "(--config.model.lora.rank=16), or take more devices")
  return "\n".join(lines)
