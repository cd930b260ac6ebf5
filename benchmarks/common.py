"""What the benchmarks share: flags, models, the measured rounds, and the JSON line.

A script has a `Workload` (what is timed), `FLAGS` and a `main`. Its rounds alternate with those
of the floors (`benchmarks.floors`) and of one peer after the other, each in a process of its own.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from benchmarks import floors as floors_lib
from benchmarks import protocol
from dpr_jax import config as config_lib
from dpr_jax import sharding
from dpr_jax.errors import UserError
from dpr_jax.loading import compute_dtype
from dpr_jax.models import ModelConfig, Transformer
from dpr_jax.models.logprobs import chunk_size_for
from dpr_jax.models.lora import LoRA
from dpr_jax.models.variables import cast, random_adapter, random_variables

PEERS = {
    "torch": "benchmarks.peers.torch_peer",
    "trl": "benchmarks.peers.trl_peer",
    "tunix": "benchmarks.peers.tunix_peer",
}


# --- Flags ----------------------------------------------------------------------------------------


def parser(description: str, peers: Sequence[str] = ()) -> argparse.ArgumentParser:
  """Flags that every script has; `peers` are the ones that know its task."""
  out = argparse.ArgumentParser(
      description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  out.add_argument("--model", default="", help="a CKPT: folder, .gguf, or a stage of a workdir")
  out.add_argument("--config", default="configs/smollm2_135m.py",
                   help="without --model: random weights of this file's config.model.shape")
  out.add_argument("--vocab_size", type=int, default=0, help="0: that of the config")
  out.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                   help="compute dtype; auto: bfloat16 on TPU and GPU, float32 on CPU")
  out.add_argument("--remat", choices=("none", "dots", "full"), default="none")
  out.add_argument("--chunk_size", type=int, default=0,
                   help="columns whose logits live at a time; 0 fills --logits_budget")
  out.add_argument("--logits_budget", type=float, default=0.25, help="GiB a device")
  out.add_argument("--lora_rank", type=int, default=0, help="0 trains all parameters")
  out.add_argument("--mesh", default="1,-1,1", help="data,fsdp,tensor; one may be -1, the rest")
  out.add_argument("--seed", type=int, default=0)
  out.add_argument("--repeats", type=int, default=5, help="rounds; medians are reported")
  out.add_argument("--in_process", action="store_true",
                   help="no processes of their own: peak memory then includes everything")
  out.add_argument("--sequential", action="store_true",
                   help="one process at a time, for a device that one process owns (TPU); sides "
                   "do not alternate then")
  if peers:
    out.add_argument("--peer", action="append", default=[],
                     help=f"{', '.join(peers)} or none; may be repeated, or a list with commas")
    out.add_argument("--peer_python", action="append", default=[],
                     help="a peer's Python: PATH for all peers, or NAME=PATH")
  # What the script passes to the process in which its workload runs.
  out.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
  out.add_argument("--programs", action="store_true", help=argparse.SUPPRESS)
  out.set_defaults(peer_choices=tuple(peers))
  return out


def parse(parser_: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
  """Parsed flags, with `peers`: name -> Python.

  Raises:
    UserError: a peer that there is not, or that does not know this task.
  """
  args = parser_.parse_args(list(argv))
  if args.repeats < 1:
    raise UserError(f"--repeats={args.repeats} must be at least 1")
  names = [n for text in getattr(args, "peer", []) for n in text.split(",") if n != "none"]
  for name in names:
    if name not in args.peer_choices:
      raise UserError(f"--peer={name} is not one of {', '.join((*args.peer_choices, 'none'))}")
  pythons = {"": sys.executable}
  for text in getattr(args, "peer_python", []):
    name, equals, path = text.partition("=")
    name, path = (name, path) if equals else ("", text)
    if name and name not in args.peer_choices:
      raise UserError(f"--peer_python={text}: {name!r} is not one of "
                      f"{', '.join(args.peer_choices)}")
    if not os.access(path, os.X_OK):
      raise UserError(f"--peer_python={text}: {path} is not a program; give the path of a python")
    pythons[name] = path
  args.peers = {name: pythons.get(name, pythons[""]) for name in names}
  return args


# --- Models and batches ---------------------------------------------------------------------------


def make_mesh(args: argparse.Namespace) -> jax.sharding.Mesh:
  try:
    data, fsdp, tensor = (int(x) for x in args.mesh.split(","))
  except ValueError:
    raise UserError(f"--mesh={args.mesh} must be three integers data,fsdp,tensor") from None
  return sharding.make_mesh(data, fsdp, tensor)


def config_shape(path: str, vocab_size: int) -> ModelConfig:
  """config.model.shape of configs/NAME.py or configs/NAME.py:arg."""
  file, _, arg = path.partition(":")
  if not os.path.isfile(file):
    raise UserError(f"--config={path}: no such file; expected one such as configs/smoke.py")
  section = config_lib.resolve(runpy.run_path(file)["get_config"](arg)).model
  size = vocab_size or section.shape.vocab_size or 272
  return dataclasses.replace(section.shape, vocab_size=size)


def load_model(
    args: argparse.Namespace, mesh: jax.sharding.Mesh, training: bool
) -> tuple[Transformer, dict[str, Any]]:
  """(model, variables). What is trained is float32, what is not has the compute dtype."""
  dtype = compute_dtype(args.dtype)
  how = {"dtype": dtype, "remat": args.remat, "lora": LoRA(rank=args.lora_rank)}
  base_dtype = "float32" if training and not args.lora_rank else dtype
  rng = jax.random.key(args.seed)
  if args.model:
    from dpr_jax.loading import load_checkpoint

    if args.vocab_size:
      raise UserError("--vocab_size is of random weights; it has no meaning with --model")
    loaded = load_checkpoint(args.model, mesh, base_dtype)
    cfg, variables = loaded.model.cfg, {"params": loaded.variables["params"]}
    if cfg.lora.rank:
      raise UserError(f"--model={args.model} holds an adapter; give the base, and --lora_rank")
  else:
    cfg = config_shape(args.config, args.vocab_size)
    variables = random_variables(cfg, mesh, rng)
    if base_dtype != "float32":
      variables = cast(variables, base_dtype)
  cfg = dataclasses.replace(cfg, **how)
  if args.lora_rank:
    adapter = random_adapter(cfg, mesh, rng)
    variables["lora"] = adapter if training or dtype == "float32" else cast(adapter, dtype)
  return Transformer(cfg), variables


def chunk_size(args: argparse.Namespace, cfg: ModelConfig, rows: int, mesh) -> int:
  budget = int(args.logits_budget * 2**30)
  return args.chunk_size or chunk_size_for(rows, cfg.vocab_size, budget, mesh)


def check_length(cfg: ModelConfig, length: int) -> None:
  if length > cfg.max_length:
    raise UserError(f"{length} tokens exceed the {cfg.max_length} that the model was made for")


def peak_bytes() -> int:
  """Peak memory: of the device that keeps statistics, else of this process."""
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  return max(peaks) if peaks else protocol.peak_host_bytes()


def program_bytes(compiled: Any) -> dict[str, int]:
  """What the compiler says a program needs, bytes a device."""
  m = compiled.memory_analysis()
  return {
      "arguments": m.argument_size_in_bytes,
      "temporaries": m.temp_size_in_bytes,
      "outputs": m.output_size_in_bytes,
      "aliased": m.alias_size_in_bytes,
      "total": m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes
      - m.alias_size_in_bytes,
  }


# --- What is timed --------------------------------------------------------------------------------


def timed(call: Callable[[], Any]) -> float:
  """Seconds of one call, its results on the device."""
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start


class Workload:
  """One or more variants of a computation: functions without arguments, the first is `main`.

  A subclass makes `self.variants` in `build`, under `self.mesh`, and returns its facts.
  """

  variants: dict[str, Callable[[], Any]]

  def __init__(self, args: argparse.Namespace):
    self.args = args

  def build(self) -> dict[str, Any]:
    raise NotImplementedError

  def compiled(self) -> dict[str, Any]:
    """The programs, compiled, for their memory and text."""
    raise NotImplementedError

  def setup(self) -> dict[str, Any]:
    self.mesh = make_mesh(self.args)
    with jax.set_mesh(self.mesh):
      facts = self.build()
      compile_seconds, self.peaks = {}, {}
      for name, call in self.variants.items():
        first, second = timed(call), timed(call)
        compile_seconds[name] = max(first - second, 0.0)
        self.peaks[name] = peak_bytes()
    device = jax.devices()[0]
    return {
        **facts,
        "compile_seconds": compile_seconds,
        "devices": {"platform": device.platform, "kind": device.device_kind,
                    "count": jax.device_count()},
    }

  def round(self) -> dict[str, float]:
    with jax.set_mesh(self.mesh):
      return {name: timed(call) for name, call in self.variants.items()}

  def finish(self) -> dict[str, Any]:
    # Of the first variant, before the others were compiled; with a single one, until now.
    main = next(iter(self.peaks))
    facts = {"peak_bytes": self.peaks[main] if len(self.peaks) > 1 else peak_bytes()}
    if self.args.programs:
      with jax.set_mesh(self.mesh):
        facts["programs"] = {k: self.describe(c) for k, c in self.compiled().items()}
    return facts

  def describe(self, compiled: Any) -> dict[str, Any]:
    from benchmarks import programs

    cfg = self.model.cfg
    text = compiled.as_text()
    return {
        **program_bytes(compiled),
        "largest_logits_bytes": programs.largest_logits_bytes(
            text, cfg.vocab_size, cfg.hidden_size
        ),
        "collectives": programs.collectives(text),
    }


# --- Rounds ---------------------------------------------------------------------------------------


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
    args = parse(script.flags(), [*argv, "--in_process"])
    return protocol.InProcess(script.Workload(args))
  return protocol.Process([sys.executable, "-m", module, *argv, "--worker"], env)


def open_floors(args: argparse.Namespace) -> Any:
  if args.in_process:
    return protocol.InProcess(floors_lib.Floors(args.dtype))
  command = [sys.executable, "-m", "benchmarks.floors", f"--dtype={args.dtype}", "--worker"]
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
  if cfg != llama or cfg.rope.scaling != "none":
    raise UserError("--peer: the peers know Llama shapes only; use --config=configs/"
                    "smollm2_135m.py or --peer=none")
  return {
      "vocab_size": cfg.vocab_size, "hidden_size": cfg.hidden_size,
      "intermediate_size": cfg.mlp_size, "num_hidden_layers": cfg.num_layers,
      "num_attention_heads": cfg.num_heads, "num_key_value_heads": cfg.num_kv_heads,
      "head_dim": cfg.head_dim, "max_position_embeddings": cfg.max_length,
      "rms_norm_eps": cfg.norm_eps, "rope_theta": cfg.rope.theta,
      "tie_word_embeddings": cfg.tied_head,
  }


def run(
    module: str,
    argv: Sequence[str],
    args: argparse.Namespace,
    workload: Callable[[argparse.Namespace], Workload],
    report: Callable[[Side, Mapping[str, float]], dict[str, Any]],
    task: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
  """Measures and prints the JSON line; or, told to be the worker, serves the workload.

  Args:
    report: (our side, floors) -> the fields of this benchmark. `tokens` of the setup facts over
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
        {"floors": lambda: open_floors(args), "ours": ours_opener}, args.repeats, args.sequential
    )))
  for name, python in args.peers.items():
    cfg = peer_shape(args)
    full = {**task, "model": cfg, "dtype": args.dtype, "seed": args.seed}
    groups.append((name, alternate(
        {
            "floors": lambda: open_floors(args),
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
  floors = floors_lib.best([r for _, sides in groups for r in sides["floors"].rounds])
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
      "floors": floors,
      **report(ours, floors),
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
    return llama_shape(config_shape(args.config, args.vocab_size))
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


def model_facts(args: argparse.Namespace, cfg: ModelConfig) -> dict[str, Any]:
  return {
      "source": args.model or f"random, {args.config}", "params": cfg.num_params,
      "vocab_size": cfg.vocab_size, "layers": cfg.num_layers, "lora_rank": cfg.lora.rank,
  }
