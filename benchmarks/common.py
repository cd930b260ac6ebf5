"""What the benchmarks share: flags, models, and the base of what is timed.

A script has `flags()`, a `Workload` and a `main`; see `benchmarks.rounds` for how it is measured.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks import protocol
from dpr_jax import config as config_lib
from dpr_jax import sharding
from dpr_jax.config.files import load_config
from dpr_jax.errors import UserError
from dpr_jax.keys import make_key
from dpr_jax.loading import compute_dtype
from dpr_jax.models import ModelConfig, Transformer
from dpr_jax.models.lora import LoRA
from dpr_jax.models.variables import cast, random_adapter, random_variables

# --- Flags ----------------------------------------------------------------------------------------


def positive(text: str) -> int:
  """argparse type: an integer of at least 1."""
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"{value} must be at least 1")
  return value


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
  out.add_argument("--logits_budget", type=float, default=0.25,
                   help="GiB per device for the logits that live at a time")
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
  section = config_lib.resolve(load_config(path)).model
  size = vocab_size or section.shape.vocab_size or 272
  return dataclasses.replace(section.shape, vocab_size=size)


def load_model(
    args: argparse.Namespace, mesh: jax.sharding.Mesh, training: bool
) -> tuple[Transformer, dict[str, Any]]:
  """(model, variables). What is trained is float32, what is not has the compute dtype."""
  dtype = compute_dtype(args.dtype)
  how = {"dtype": dtype, "remat": args.remat, "lora": LoRA(rank=args.lora_rank),
         "logits_budget": args.logits_budget}
  base_dtype = "float32" if training and not args.lora_rank else dtype
  rng = make_key(args.seed)
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


def check_length(cfg: ModelConfig, length: int) -> None:
  if length > cfg.max_length:
    raise UserError(f"{length} tokens exceed the {cfg.max_length} that the model was made for")


def peak_bytes() -> int:
  """Peak memory: of the device that keeps statistics, else of this process."""
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  return max(peaks) if peaks else protocol.peak_host_bytes()


def program_bytes(compiled: Any) -> dict[str, int]:
  """Memory that a program needs according to the compiler, bytes per device."""
  m = compiled.memory_analysis()
  return {
      "arguments": m.argument_size_in_bytes,
      "temporaries": m.temp_size_in_bytes,
      "outputs": m.output_size_in_bytes,
      "aliased": m.alias_size_in_bytes,
      "total": m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes
      - m.alias_size_in_bytes,
  }


def model_facts(args: argparse.Namespace, cfg: ModelConfig) -> dict[str, Any]:
  return {
      "source": os.path.basename(args.model) or f"random, {args.config}",
      "params": cfg.num_params,
      "vocab_size": cfg.vocab_size, "layers": cfg.num_layers, "lora_rank": cfg.lora.rank,
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
    from dpr_jax.planning import hlo

    cfg = self.model.cfg
    text = compiled.as_text()
    elements, size = programs.largest_logits(text, cfg.vocab_size, cfg.hidden_size)
    return {
        **program_bytes(compiled),
        "largest_logits_elements": elements,
        "largest_logits_bytes": size,
        "collectives": hlo.collectives(text).count,
    }
