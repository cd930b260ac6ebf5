"""The measured rounds of a benchmark, and its JSON line.

Rounds of a script's workload alternate with measurements of the peak rates
(`benchmarks.peak_rates`) and with rounds of one peer after the other, each in a process of its own.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import common, protocol
from benchmarks import peak_rates as peak_rates_lib
from dpr_jax.errors import UserError
from dpr_jax.models import ModelConfig
from dpr_jax.weights.hf_config import rope_to_hf

PEERS = {
    "torch": "benchmarks.peers.torch_peer",
    "trl": "benchmarks.peers.trl_peer",
    "tunix": "benchmarks.peers.tunix_peer",
}


@dataclasses.dataclass
class Side:
  """What a side said."""

  setup: dict[str, Any] = dataclasses.field(default_factory=dict)
  rounds: list[dict[str, float]] = dataclasses.field(default_factory=list)
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)

  def median(self, variant: str) -> float:
    """Seconds."""
    return statistics.median(r[variant] for r in self.rounds)


def open_side(module: str, argv: Sequence[str], in_process: bool, env=None) -> Any:
  """The workload of a script of ours: here, or in a process of its own."""
  if in_process:
    script = importlib.import_module(module)
    args = common.parse(script.flags(), [*argv, "--in_process"])
    return protocol.InProcess(script.Workload(args))
  return protocol.Process([sys.executable, "-m", module, *argv, "--worker"], env)


def open_peak_rates(args: argparse.Namespace) -> Any:
  if args.in_process:
    return protocol.InProcess(peak_rates_lib.PeakRates(args.dtype))
  command = [sys.executable, "-m", "benchmarks.peak_rates", f"--dtype={args.dtype}", "--worker"]
  return protocol.Process(command)


def alternate(
    openers: Mapping[str, Callable[[], Any]], repeats: int, sequential: bool
) -> dict[str, Side]:
  """Opens the sides and runs `repeats` rounds, side by side; or one side after the other.

  A side that is unavailable is left out; its `facts` say why.
  """
  out, open_ = {name: Side() for name in openers}, {}
  groups = [[name] for name in openers] if sequential else [list(openers)]
  try:
    for group in groups:
      for name in group:
        open_[name] = openers[name]()
        try:
          out[name].setup = open_[name].setup()
        except (protocol.Unavailable, ImportError) as e:
          out[name].facts = {"unavailable": str(e)}
      there = [name for name in group if "unavailable" not in out[name].facts]
      for _ in range(repeats):
        for name in there:
          out[name].rounds.append(open_[name].round())
      for name in there:
        out[name].facts = open_[name].finish()
      for name in group:
        open_.pop(name).close()
  finally:
    for side in open_.values():
      side.close()
  return out


def peer_command(name: str, python: str, task: Mapping[str, Any]) -> list[str]:
  return [python, "-m", PEERS[name], f"--task={json.dumps(task)}"]


def llama_shape(cfg: ModelConfig) -> dict[str, Any]:
  """The shape for a peer, in the fields of a Hugging Face LlamaConfig.

  Raises:
    UserError: another family.
  """
  llama = ModelConfig(
      **{f: getattr(cfg, f) for f in (
          "vocab_size", "hidden_size", "mlp_size", "num_layers", "num_heads", "num_kv_heads",
          "head_dim", "max_length", "norm_eps", "rope", "tied_head", "dtype", "remat", "attention",
          "lora",
      )}
  )
  if cfg != llama:
    raise UserError("--peer: the peers know Llama shapes only; use --config=configs/"
                    "smollm2_135m.py or --peer=none")
  return {
      "vocab_size": cfg.vocab_size, "hidden_size": cfg.hidden_size,
      "intermediate_size": cfg.mlp_size, "num_hidden_layers": cfg.num_layers,
      "num_attention_heads": cfg.num_heads, "num_key_value_heads": cfg.num_kv_heads,
      "head_dim": cfg.head_dim, "max_position_embeddings": cfg.max_length,
      "rms_norm_eps": cfg.norm_eps, "rope_parameters": rope_to_hf(cfg.rope),
      "tie_word_embeddings": cfg.tied_head,
  }


def arithmetic(ours, peak_rates) -> dict[str, Any]:
  """What a program that is bound by arithmetic reports: its least time, and the share of it."""
  bound = ours.setup["flops"] / peak_rates["flops_per_s"] / ours.setup["devices"]["count"]
  mfu = bound / ours.median("main")
  return {"flops": ours.setup["flops"], "roofline_seconds": bound, "mfu": mfu}


def run(
    module: str,
    argv: Sequence[str],
    args: argparse.Namespace,
    workload: Callable[[argparse.Namespace], common.Workload],
    report: Callable[[Side, Mapping[str, float]], dict[str, Any]],
    task: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
  """Measures and prints the JSON line; with --worker, serves the workload instead.

  Args:
    report: (our side, peak_rates) -> the fields of this benchmark. `tokens` of the setup facts over
      the seconds of `main` is the throughput of every side.
    task: what a peer gets beside the shape of the model.
  """
  if args.worker:
    protocol.serve(lambda: workload(args))
    return None
  load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
  ours_argv = strip_peers(argv)
  ours_opener = lambda: open_side(module, ours_argv, args.in_process)
  groups: list[tuple[str | None, dict[str, Side]]] = []
  if not args.peers:
    groups.append((None, alternate(
        {"peak_rates": lambda: open_peak_rates(args), "ours": ours_opener},
        args.repeats, args.sequential,
    )))
  for name, python in args.peers.items():
    cfg = peer_shape(args)
    full = {**task, "model": cfg, "dtype": args.dtype, "seed": args.seed}
    groups.append((name, alternate(
        {
            "peak_rates": lambda: open_peak_rates(args),
            "ours": ours_opener,
            name: lambda: protocol.Process(peer_command(name, python, full)),  # noqa: B023
        },
        args.repeats, args.sequential,
    )))
  ours = Side(
      setup=groups[0][1]["ours"].setup,
      rounds=[r for _, sides in groups for r in sides["ours"].rounds],
      facts=groups[0][1]["ours"].facts,
  )
  peak_rates = peak_rates_lib.best([r for _, sides in groups for r in sides["peak_rates"].rounds])
  seconds = ours.median("main")
  record = {
      "benchmark": module.rpartition(".")[2],
      "model": ours.setup["model"],
      "shape": ours.setup["shape"],
      "dtype": ours.setup["dtype"],
      "devices": ours.setup["devices"],
      "repeats": args.repeats,
      "seconds": seconds,
      "seconds_all": [r["main"] for r in ours.rounds],
      "tokens_per_s": ours.setup["tokens"] / seconds,
      "peak_bytes": ours.facts["peak_bytes"],
      "peak_of": "all sides in one process" if args.in_process else "own process or device",
      "compile_seconds": ours.setup["compile_seconds"]["main"],
      "peak_rates": peak_rates,
      **report(ours, peak_rates),
      "peers": {
          name: compare(sides[name], sides["ours"], ours.setup["tokens"])
          for name, sides in groups if name
      },
      "load_average": load,
      "versions": versions(),
  }
  print(json.dumps(record), flush=True)
  return record


def strip_peers(argv: Sequence[str]) -> list[str]:
  """The command line without the flags that only the driver needs."""
  out, skip = [], False
  for arg in argv:
    if skip or arg.startswith(("--peer", "--in_process", "--sequential")):
      skip = not skip and arg in ("--peer", "--peer_python")
      continue
    out.append(arg)
  return out


def peer_shape(args: argparse.Namespace) -> dict[str, Any]:
  """The model's shape for peers, without loading its weights."""
  if not args.model:
    return llama_shape(common.config_shape(args.config, args.vocab_size))
  from dpr_jax import weights
  from dpr_jax.loading import is_stage, split_checkpoint
  from dpr_jax.workdir import Workdir

  path, _ = split_checkpoint(args.model)
  if is_stage(path):
    return llama_shape(ModelConfig.from_dict(Workdir(path.parent).read_config()["model"]["config"]))
  return llama_shape(weights.load_config(path))


def compare(peer: Side, ours: Side, tokens: float) -> dict[str, Any]:
  """A peer's figures and the ratios; above 1 we are faster, or need less memory."""
  if "unavailable" in peer.facts:
    return {"unavailable": peer.facts["unavailable"]}
  seconds, own = peer.median("main"), ours.median("main")
  peak = peer.facts["peak_bytes"]
  return {
      "seconds": seconds,
      "seconds_all": [r["main"] for r in peer.rounds],
      "ours_seconds": own,
      "tokens_per_s": tokens / seconds,
      "ratio": seconds / own,
      "peak_bytes": peak,
      "memory_ratio": peak / ours.facts["peak_bytes"],
      "compile_seconds": peer.setup.get("compile_seconds"),
      "versions": peer.setup.get("versions"),
  }


def versions() -> dict[str, str]:
  packages = ("jax", "jaxlib", "flax", "optax", "numpy")
  return {"python": platform.python_version(),
          **{p: importlib.metadata.version(p) for p in packages}}
