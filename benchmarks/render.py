"""Fills the tables of docs/performance.md from the JSON lines of the benchmarks.

    python -m benchmarks.render RESULTS.jsonl docs/performance.md

A table stands between <!-- table:NAME --> and <!-- /table -->; the last matching line fills it.
Lines measured on an accelerator fill the tables whose names end in _gpu or _tpu.
"""

import json
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dpr_jax import cli
from dpr_jax.errors import UserError

Record = dict[str, Any]


def number(x: float | None, digits: int = 3) -> str:
  """Three significant digits, without an exponent; "" for None."""
  if x is None:
    return ""
  if x == 0:
    return "0"
  if abs(x) >= 10 ** (digits - 1):
    return f"{x:,.0f}"
  return f"{x:.{digits}g}" if abs(x) >= 1e-3 else f"{x:.1e}"


def gigabytes(x: float | None) -> str:
  return "" if x is None else f"{x / 1e9:.2f}"


def percent(x: float | None) -> str:
  return "" if x is None else f"{100 * x:.0f}%"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(record: Record) -> str:
  """The model, the hardware and the versions behind a table, in one line."""
  model, devices = record["model"], record.get("devices")
  parts = [model["source"] if isinstance(model, dict) else model, record["dtype"]]
  if devices:
    parts.append(f"{devices['count']} x {devices['kind']}")
  if remat := record.get("shape", {}).get("remat"):
    parts.append(f"remat {remat}")
  parts += [f"jax {record['versions']['jax']}", f"{record['repeats']} rounds"]
  if record.get("load_average") is not None:
    parts.append(f"load average before {record['load_average']:.1f}")
  if peak_rates := record.get("peak_rates"):
    parts.append(f"matmul {peak_rates['flops_per_s'] / 1e9:,.0f} GFLOP/s, "
                 f"memory {peak_rates['bytes_per_s'] / 1e9:,.0f} GB/s")
  if "bandwidth_share" in record and record.get("peers"):
    parts.append(f"decoding reads at {percent(record['bandwidth_share'])} of it")
  return "; ".join(parts) + "."


def against_peers(record: Record) -> str:
  """Throughput, share of the roofline bound, memory and compile time, next to each peer's."""
  share = record.get("roofline_share", record.get("mfu"))
  rows = [["dpr_jax", number(record["tokens_per_s"]), "", percent(share),
           gigabytes(record["peak_bytes"]), number(record["compile_seconds"])]]
  for name, peer in record["peers"].items():
    if "unavailable" in peer:
      rows.append([f"{name} ({peer['unavailable']})", "", "", "", "", ""])
      continue
    theirs = share * record["seconds"] / peer["seconds"]
    rows.append([name, number(peer["tokens_per_s"]), f"{peer['ratio']:.2f}", percent(theirs),
                 gigabytes(peer["peak_bytes"]), number(peer["compile_seconds"])])
  header = ["", "tokens/s", "ours / theirs", "of roofline bound", "peak, GB", "compile, s"]
  return table(header, rows)


def skewed(record: Record) -> str:
  found = record["skewed"]
  rows = [
      [name, number(r["tokens_per_s"]), str(r["tokens"]), str(r["steps"]), str(r["longest"])]
      for name, r in found.items() if isinstance(r, dict)
  ]
  text = table(["", "tokens/s", "tokens", "decoding steps", "longest"], rows)
  return (f"{text}\n\nRefilled over plain: {found['gain']:.2f} x tokens/s; the number of steps "
          f"gives {found['step_ratio']:.2f} x, the formula {found['predicted_step_ratio']:.2f} x.")


def shared_prefill(record: Record) -> str:
  r = record["shared_prefill"]
  return table(
      ["samples per prompt", "own, s", "shared, s", "gain predicted", "gain measured"],
      [[str(r["samples"]), number(r["own_seconds"]), number(r["shared_seconds"]),
        f"{r['predicted_gain']:.2f}", f"{r['gain']:.2f}"]],
  )


def dpr_parts(record: Record) -> str:
  parts, shares = record["parts_seconds"], record["shares"]
  rows = [[name, number(parts[name]), percent(shares[name])] for name in parts]
  rows.append(["whole step", number(record["seconds"]), ""])
  return table(["", "seconds", "share"], rows)


def dpr_tricks(record: Record) -> str:
  names = {"no_refill": "refilled slots", "own_prefill": "shared prefill",
           "rescored": "no second log-probs of the policy", "no_chunks": "chunked logits"}
  rows = [
      [names[name], number(r["seconds"]), f"{record['predicted_gain'][name]:.2f}",
       f"{r['gain']:.2f}"]
      for name, r in record["without"].items()
  ]
  return table(["trick", "step without it, s", "gain predicted", "gain measured"], rows)


def evaluate(record: Record) -> str:
  """Responses per second next to each peer's, and whether they are the same."""
  rows = [["dpr_jax", f"{record['responses_per_s']:.3g}", "", "", gigabytes(record["peak_bytes"])]]
  for name, peer in record["peers"].items():
    if "unavailable" in peer:
      rows.append([f"{name} ({peer['unavailable']})", "", "", "", ""])
      continue
    rows.append([name, f"{peer['responses_per_s']:.3g}", f"{peer['ratio']:.2f}",
                 percent(peer["texts_equal"]), gigabytes(peer["peak_bytes"])])
  return table(["", "responses/s", "ours / theirs", "equal responses", "peak, GB"], rows)


def memory(record: Record) -> str:
  rows = []
  for c in record["cases"]:
    rows.append([
        c["what"], f"{c['vocab_size']:,}", str(c["length"]), str(c["batch"]),
        str(min(c["chunk_columns"], c["length"])), str(c["lora_rank"] or "full"),
        c["remat"],
        gigabytes(c["peak_bytes"]), gigabytes(c["argument_bytes"]), gigabytes(c["temporary_bytes"]),
        gigabytes(c["largest_logits_bytes"]), gigabytes(c["logits_bytes"]),
    ])
  return table(["step", "V", "T", "B", "chunk", "LoRA rank", "remat", "peak, GB", "arguments, GB",
                "temporaries, GB", "largest logits, GB", "[B, T, V], GB"], rows)


def scaling(record: Record) -> str:
  rows = [
      [str(r["devices"]), number(r["tokens_per_s"]), f"{r['efficiency']:.2f}",
       gigabytes(r["program_bytes_per_device"]),
       ", ".join(f"{n} {k}" for k, n in r["collectives"].items()) or "none"]
      for r in record["runs"]
  ]
  return table(["devices", "tokens/s", "efficiency", "program per device, GB", "collectives"], rows)


# For each table: the benchmark, the condition on its record, and the function that draws it.
TABLES: dict[str, tuple[str, Callable[[Record], bool], Callable[[Record], str]]] = {
    "sft_step": ("sft_step", lambda r: r["shape"]["remat"] != "full", against_peers),
    "sft_step_full": ("sft_step", lambda r: r["shape"]["remat"] == "full", against_peers),
    "score": ("score", lambda r: True, against_peers),
    "rollout": ("rollout", lambda r: "skewed" not in r, against_peers),
    "skewed": ("rollout", lambda r: "skewed" in r, skewed),
    "shared_prefill": ("rollout", lambda r: "shared_prefill" in r, shared_prefill),
    "dpr_parts": ("dpr_step", lambda r: "shares" in r, dpr_parts),
    "dpr_tricks": ("dpr_step", lambda r: "without" in r, dpr_tricks),
    "evaluate": ("evaluate_speed", lambda r: True, evaluate),
    "memory": ("memory", lambda r: "gemma" not in r["model"], memory),
    "memory_gemma": ("memory", lambda r: "gemma" in r["model"], memory),
    "scaling": ("scaling", lambda r: True, scaling),
}


def platform_of(record: Record) -> str:
  return (record.get("devices") or {}).get("platform", "cpu")


def read(path: pathlib.Path) -> list[Record]:
  records = []
  for number_, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
    try:
      if line.strip():
        records.append(json.loads(line))
    except json.JSONDecodeError as e:
      raise UserError(f"{path}:{number_}: not a JSON line of a benchmark: {e}") from None
  return records


def render(text: str, records: Sequence[Record]) -> str:
  """The page with its tables filled where there are records; others stay as they are.

  Raises:
    UserError: the page has a table that no benchmark fills.
  """

  def fill(match: re.Match) -> str:
    name = match[1]
    kind, _, platform = name.rpartition("_")
    if platform not in ("gpu", "tpu"):
      kind, platform = name, "cpu"
    if kind not in TABLES:
      raise UserError(f"<!-- table:{name} --> is not one of {', '.join(TABLES)}")
    benchmark, suits, draw = TABLES[kind]
    found = [
        r for r in records
        if r["benchmark"] == benchmark and suits(r) and platform_of(r) == platform
    ]
    if not found:
      return match[0]
    body = f"{draw(found[-1])}\n\n{source(found[-1])}"
    return f"<!-- table:{name} -->\n{body}\n<!-- /table -->"

  return re.sub(r"<!-- table:(\w+) -->.*?<!-- /table -->", fill, text, flags=re.DOTALL)


def main(argv) -> None:
  if len(argv) != 2:
    raise UserError("usage: python -m benchmarks.render RESULTS.jsonl docs/performance.md")
  results, page = map(pathlib.Path, argv)
  for path in (results, page):
    if not path.is_file():
      raise UserError(f"{path}: no such file")
  page.write_text(render(page.read_text(encoding="utf-8"), read(results)), encoding="utf-8")


if __name__ == "__main__":
  cli.run_entry_point(main, sys.argv[1:])
