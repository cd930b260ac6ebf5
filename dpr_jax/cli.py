"""What all doors share: exit codes, readable errors, common flags.

A door is `main(argv) -> None`. An error a user can make ends with exit code 2 and one line on
stderr, a run that diverged with 1, one that was preempted with 143; anything else is a bug and
keeps its traceback.
"""

import argparse
import contextlib
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from dpr_jax import compilations
from dpr_jax.errors import Diverged, Preempted, UserError


def fail(message: str) -> NoReturn:
  """One line on stderr, exit code 2."""
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  raise SystemExit(2)


def run_door(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
  """Calls a door with the command line; turns a UserError into its line and exit code 2."""
  logging.getLogger("absl").setLevel(logging.WARNING)
  try:
    main(sys.argv[1:] if argv is None else argv)
  except UserError as e:
    fail(str(e))
  except (Diverged, Preempted) as e:
    print(f"error: {e}", file=sys.stderr)
    raise SystemExit(1 if isinstance(e, Diverged) else 143) from None
  except KeyboardInterrupt:
    print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
    raise SystemExit(130) from None


# --- Flags of the doors that take a CKPT ----------------------------------------------------------


def positive(text: str) -> int:
  """argparse type: an integer of at least 1."""
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"{value} must be at least 1")
  return value


def add_model_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                      help="compute dtype; auto: bfloat16 on TPU and GPU, float32 on CPU")
  parser.add_argument("--template", default="",
                      help="a .jinja chat template; '' is the tokenizer's own")
  parser.add_argument(compilations.FLAG, default="", help=f"{compilations.HELP} none")
  parser.add_argument("--mesh", default="1,-1,1", help="data,fsdp,tensor; one may be -1, the rest")


def new_file(flag: str, path: str) -> pathlib.Path:
  """A file to be written; refuses to overwrite one."""
  target = pathlib.Path(path)
  if target.exists():
    raise UserError(f"{flag}={path} exists already; name a new file")
  if not target.absolute().parent.is_dir():
    raise UserError(f"{flag}={path}: there is no folder {target.absolute().parent}")
  return target


def new_folder(flag: str, path: str) -> pathlib.Path:
  """A folder to be written; refuses one that holds files."""
  target = pathlib.Path(path)
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise UserError(f"{flag}={path} exists already; name a new or empty folder")
  return target


@contextlib.contextmanager
def model_mesh(args: argparse.Namespace) -> Iterator[tuple[Any, str]]:
  """Sets the mesh that --mesh names; yields (mesh, compute dtype)."""
  import jax

  from dpr_jax import distributed, sharding
  from dpr_jax.loading import compute_dtype

  distributed.initialize()
  compilations.keep_compilations(args.compilation_cache)
  try:
    data, fsdp, tensor = (int(x) for x in args.mesh.split(","))
  except ValueError:
    raise UserError(f"--mesh={args.mesh} must be three integers data,fsdp,tensor") from None
  mesh = sharding.make_mesh(data, fsdp, tensor)
  if args.batch_size % (ways := mesh.shape["data"] * mesh.shape["fsdp"]):
    raise UserError(f"--batch_size={args.batch_size} must be a multiple of {ways}, the data and "
                    "fsdp axes of the mesh")
  with jax.set_mesh(mesh):
    yield mesh, compute_dtype(args.dtype)


def load_pair(sft: str, ref: str, mesh: Any, dtype: str) -> tuple[Any, Any]:
  """Two checkpoints of one architecture and one tokenizer.

  Raises:
    UserError: their shapes or vocabularies differ; rewards would be meaningless.
  """
  import dataclasses

  from dpr_jax.loading import load_checkpoint

  a = load_checkpoint(sft, mesh, dtype)
  b = load_checkpoint(ref, mesh, dtype, beside=a)
  for field in dataclasses.fields(a.model.cfg):
    x, y = getattr(a.model.cfg, field.name), getattr(b.model.cfg, field.name)
    if x != y and field.name not in ("remat", "attention"):
      raise UserError(f"--sft={sft} and --ref={ref} differ in {field.name} ({x} and {y}); they "
                      "must be checkpoints of one architecture")
  if a.tokenizer.get_vocab() != b.tokenizer.get_vocab():
    raise UserError(f"--sft={sft} and --ref={ref} have different vocabularies; token rewards need "
                    "the same tokens")
  return a, b


def bar(name: str, total: int, unit: str):
  """A progress bar on stderr, from process 0."""
  import jax
  import tqdm

  return tqdm.tqdm(total=total, desc=name, unit=unit, disable=jax.process_index() != 0,
                   dynamic_ncols=True, mininterval=0.5)
