"""Flags of the entry points that take a CKPT, and what they name."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from absl import flags

from dpr_jax import compilation_cache
from dpr_jax.errors import UserError, naming
from dpr_jax.paths import Path, as_path, in_bucket, refusal


def define_model_flags(values: flags.FlagValues, batch: str) -> None:
  """--dtype, --template, --mesh, --batch_size, --compilation_cache.

  Args:
    batch: what --batch_size counts.
  """
  flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"],
                    "Compute dtype; auto: bfloat16 on TPU and GPU, float32 on CPU.",
                    flag_values=values)
  flags.DEFINE_string("template", "", "A .jinja chat template; '' is the tokenizer's own.",
                      flag_values=values)
  flags.DEFINE_string("mesh", "1,-1,1", "data,fsdp,tensor; one may be -1, the rest.",
                      flag_values=values)
  flags.DEFINE_integer("batch_size", 8, f"{batch} at a time.", lower_bound=1, flag_values=values)
  flags.DEFINE_string("compilation_cache", "", f"{compilation_cache.HELP} none.",
                      flag_values=values)


def _check_writable(flag: str, target: Path, temporary: str) -> None:
  """Writes a little where a file will be written, and removes it again.

  Raises:
    UserError: no permission, a read-only or full disk, a path that cannot be.
  """
  probe = target.with_name(temporary)
  try:
    with probe.open("wb" if in_bucket(probe) else "ab") as file:
      file.write(bytes(1 << 16))
  except OSError as e:
    raise UserError(f"{flag}={str(target)[:200]} cannot be written: {refusal(e)}") from None
  finally:
    with contextlib.suppress(OSError):
      probe.unlink()


def _path(flag: str, path: str) -> tuple[Path, bool]:
  """(the path, whether it exists); UserError where no file can have it."""
  try:
    target = as_path(path)
    target.resolve()
    return target, target.exists() if in_bucket(target) else os.path.lexists(target)
  except UserError as e:
    raise e.at(flag) from None
  except (OSError, ValueError) as e:  # ValueError: a NUL, or half of a character.
    reason = refusal(e) if isinstance(e, OSError) else e
    raise UserError(f"{flag}={path[:200]!r} is no path: {reason}") from None


def new_file(flag: str, path: str, *others: Path) -> Path:
  """A file to be written, at once with `others`; refuses to overwrite one.

  Raises:
    UserError: it exists, is one of the others, or cannot be written.
  """
  target, exists = _path(flag, path)
  if exists:
    raise UserError(f"{flag}={path} exists already; name a new file")
  if target.resolve() in [other.resolve() for other in others]:
    raise UserError(f"{flag}={path} is the file of another flag; name another one")
  if not in_bucket(target) and not target.absolute().parent.is_dir():
    raise UserError(f"{flag}={path[:200]}: its folder does not exist")
  _check_writable(flag, target, target.name + ".tmp")
  return target


def new_folder(flag: str, path: str) -> Path:
  """A folder to be written; refuses one that holds files, or cannot be made."""
  target, exists = _path(flag, path)
  if exists and (not target.is_dir() or any(target.iterdir())):
    raise UserError(f"{flag}={path} exists already; name a new or empty folder")
  made = []
  try:
    if not in_bucket(target):
      made = [p for p in (target, *target.absolute().parents) if not p.exists()]
      target.mkdir(parents=True, exist_ok=True)
    _check_writable(flag, target / "probe", "probe.tmp")
  except OSError as e:
    raise UserError(f"{flag}={path[:200]} cannot be written: {refusal(e)}") from None
  finally:
    for place in made:
      with contextlib.suppress(OSError):
        place.rmdir()
  return target


def _given(values: flags.FlagValues) -> dict[str, Any]:
  """What all processes must be given: the flags, the contents of the files of data, and weights.

  Of a stage no weights: its processes read one checkpoint, each a part of it.
  """
  from dpr_jax.data.dataset import fingerprint
  from dpr_jax.inputs import pretrained_files
  from dpr_jax.loading import is_stage, split_checkpoint

  facts = {f"--{name}": value for name, value in values.flag_values_dict().items()}
  for name in ("input", "data", "template"):
    path = facts.get(f"--{name}")
    if path and as_path(path).exists():
      with contextlib.suppress(UserError):  # A folder of something else, such as tasks of lm_eval.
        facts[f"contents of --{name}={path}"] = fingerprint(path)
  for name in ("model", "sft", "ref"):
    if spec := facts.get(f"--{name}"):
      path = split_checkpoint(os.path.expanduser(spec))[0]
      if path.exists() and not is_stage(path):
        facts[f"weights of --{name}={spec}"] = pretrained_files(path)
  return facts


@contextlib.contextmanager
def model_mesh(values: flags.FlagValues) -> Iterator[tuple[Any, str]]:
  """Sets the mesh that --mesh names; yields (mesh, compute dtype).

  Raises:
    UserError: a wrong --mesh or --batch_size, or processes that were given different things.
  """
  import jax

  from dpr_jax import distributed, sharding
  from dpr_jax.agreement import agree
  from dpr_jax.loading import compute_dtype

  distributed.initialize()
  agree(lambda: None, lambda _: _given(values), seconds=600.0)  # Weights are read for it.
  compilation_cache.keep_compilations(values.compilation_cache)
  try:
    data, fsdp, tensor = (int(x) for x in values.mesh.split(","))
  except ValueError:
    raise UserError(f"--mesh={values.mesh} must be three integers data,fsdp,tensor") from None
  with naming("--mesh"):
    mesh = sharding.make_mesh(data, fsdp, tensor)
  if values.batch_size % (ways := mesh.shape["data"] * mesh.shape["fsdp"]):
    raise UserError(f"--batch_size={values.batch_size} must be a multiple of {ways}, the data and "
                    "fsdp axes of the mesh")
  with jax.set_mesh(mesh):
    yield mesh, compute_dtype(values.dtype)


def load_pair(sft: str, ref: str, mesh: Any, dtype: str) -> tuple[Any, Any]:
  """Two checkpoints of one architecture and one tokenizer.

  Raises:
    UserError: their shapes or vocabularies differ; rewards would be meaningless.
  """
  from dpr_jax.loading import load_checkpoint

  a = load_checkpoint(sft, mesh, dtype)
  b = load_checkpoint(ref, mesh, dtype, beside=a)
  if found := a.model.cfg.difference(b.model.cfg):
    raise UserError(f"--sft={sft} and --ref={ref} differ in {found}; they must be checkpoints of "
                    "one architecture")
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
