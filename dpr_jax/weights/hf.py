"""Reads and writes Hugging Face folders: parameters in safetensors files, and config.json."""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpr_jax.errors import UserError
from dpr_jax.models import ModelConfig
from dpr_jax.sharding import to_host
from dpr_jax.weights import families, hf_config
from dpr_jax.weights.names import flatten, tensor_specs
from dpr_jax.weights.placement import Source, check_names, fill_params
from dpr_jax.weights.safetensors_file import SafetensorsFile, write_safetensors

SCORE = "score.weight"  # the head of a sequence classifier.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
# Prefixes of the text model's tensors in multimodal checkpoints, old and new.
_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
# Not parameters of the decoder: other modalities, and buffers in old checkpoints.
_IGNORED = re.compile(
    r"(model\.)?(vision_tower|multi_modal_projector)\..*|.*\.rotary_emb\.inv_freq"
)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object from a file; raises UserError if there is none."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise UserError(f"{path}: cannot be read: {error.strerror}") from None
  except (ValueError, RecursionError) as error:
    line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
    raise UserError(f"{path}:{line} is not valid JSON") from None
  if not isinstance(value, dict):
    raise UserError(f"{path}: must hold a JSON object")
  return value


def load_hf_config(folder: pathlib.Path) -> ModelConfig:
  """Reads the ModelConfig of a folder; raises UserError if missing or not implemented."""
  path = folder / "config.json"
  if not path.is_file():
    raise UserError(f"{path} does not exist; a Hugging Face model folder has one")
  return hf_config.from_hf(read_json(path), str(path))


class Folder:
  """The tensors of all safetensors files of a folder, under their names in a text model."""

  def __init__(self, folder: pathlib.Path):
    self.where = str(folder)
    self._place: dict[str, tuple[SafetensorsFile, str]] = {}
    for file, names in _files(folder):
      for name in file.shapes if names is None else names:
        if name not in file.shapes:
          raise UserError(f"{file.path}: tensor {name!r} is missing, but {INDEX} lists it")
        old = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
        ours = _PREFIXES.get(old, "") + name.removeprefix(old)
        if ours in self._place:
          raise UserError(f"{file.path}: tensor {ours!r} is stored twice")
        self._place[ours] = file, name
    self.shapes = {name: file.shapes[theirs] for name, (file, theirs) in self._place.items()}

  def dtype(self, name: str) -> np.dtype:
    file, theirs = self._place[name]
    return file.dtype(theirs)

  def read(self, name: str, start: int, stop: int) -> np.ndarray:
    file, theirs = self._place[name]
    return file.read(theirs, start, stop)


def _files(folder: pathlib.Path) -> list[tuple[SafetensorsFile, list[str] | None]]:
  """Lists the files of a folder with their tensors according to the index, or None for all."""
  if (folder / INDEX).is_file():
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
      raise UserError(f"{index}: weight_map must be an object of tensor names and files")
    by_file: dict[str, list[str]] = {}
    for name, file in weight_map.items():
      if not isinstance(file, str) or pathlib.PurePath(file).name != file or "\\" in file:
        raise UserError(f"{index}: weight_map of {name!r} is {file!r}; it must be a file of this "
                        "folder")
      by_file.setdefault(file, []).append(name)
    for file in by_file:
      if not (folder / file).is_file():
        raise UserError(f"{index}: weight_map names {file!r}, which does not exist in {folder}")
      if not file.endswith(".safetensors"):
        raise UserError(f"{index}: weight_map names {file!r}; only .safetensors files are read")
    if (folder / SINGLE).is_file() and SINGLE not in by_file:
      raise UserError(f"{index}: names other files than {SINGLE}, which lies beside it; remove "
                      "whichever is stale")
    return [(SafetensorsFile(folder / file), names) for file, names in by_file.items()]
  if (folder / SINGLE).is_file():
    return [(SafetensorsFile(folder / SINGLE), None)]
  pickled = sorted(
      p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
  )
  if pickled:
    raise UserError(f"{folder / pickled[0]}: pickled weights are not read, because they can run "
                    f"code; convert them to {SINGLE}")
  raise UserError(f"{folder}: has neither {SINGLE} nor {INDEX}")


def load_hf(
    folder: pathlib.Path, dtype: Any = None, mesh: jax.sharding.Mesh | None = None,
    adapted: Callable[[Source, Mapping[str, str]], Source] = lambda source, names: source,
) -> tuple[ModelConfig, dict[str, Any]]:
  """Implements `dpr_jax.weights.load_pretrained` for a folder.

  Args:
    adapted: changes the tensors, given also which tensor of the source has which name here.
  """
  cfg = load_hf_config(folder)
  source = Folder(folder)
  specs = tensor_specs(cfg)
  # Some files also store the head of a tied model.
  copied = {"lm_head.weight"} & set(source.shapes) if cfg.tied_head else set()
  if not cfg.tied_head and "lm_head.weight" not in source.shapes:
    raise UserError(f"{folder}: tensor 'lm_head.weight' is missing, but the config has "
                    "tie_word_embeddings=false; set it to true if the head is the embedding")
  check_names(source, specs, lambda name: name in copied or bool(_IGNORED.fullmatch(name)))
  if copied:
    _check_tied(source)
  names = {spec.name: spec.name for spec in specs}
  return cfg, fill_params(cfg, specs, adapted(source, names), dtype, mesh)


def open_classifier(folder: pathlib.Path) -> tuple[ModelConfig, Folder]:
  """The config, without an output head, and the tensors; UserError without a head of one label."""
  # A tied head has no tensor of its own.
  cfg, source = dataclasses.replace(load_hf_config(folder), tied_head=True), Folder(folder)
  shape = source.shapes.get(SCORE)
  if shape is None or tuple(shape) != (1, cfg.hidden_size):
    found = "no tensor" if shape is None else f"the shape {list(shape)} of the tensor"
    raise UserError(f"{folder}: {found} {SCORE!r}; a reward model is a sequence classifier with "
                    "one label, such as Qwen3ForSequenceClassification, and has this head with the "
                    f"shape [1, {cfg.hidden_size}]")
  return cfg, source


def load_classifier(
    folder: pathlib.Path, dtype: Any = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[ModelConfig, dict[str, Any], np.ndarray]:
  """Implements `dpr_jax.weights.load_classifier`."""
  cfg, source = open_classifier(folder)
  specs, heads = tensor_specs(cfg), (SCORE, "lm_head.weight")
  check_names(source, specs, lambda name: name in heads or bool(_IGNORED.fullmatch(name)))
  score_D = source.read(SCORE, 0, 1)[0].astype(np.float32)
  return cfg, fill_params(cfg, specs, source, dtype, mesh), score_D


def _check_tied(source: Folder) -> None:
  """Checks that a head stored despite `tie_word_embeddings` equals the embedding."""
  head, table = "lm_head.weight", "model.embed_tokens.weight"
  rows = source.shapes[table][0]
  same = source.shapes[head] == source.shapes[table]
  for start in range(0, rows, 8192) if same else ():
    stop = min(start + 8192, rows)
    same = same and np.array_equal(source.read(head, start, stop), source.read(table, start, stop))
  if not same:
    raise UserError(f"{source.where}: tensor {head!r} differs from {table!r}, but config.json has "
                    "tie_word_embeddings=true; set it to false")


def _shards(sizes: dict[str, int]) -> list[list[str]]:
  """Splits the tensors, in order, into files of at most SHARD_BYTES (or one tensor)."""
  shards, total = [[]], 0
  for name, size in sizes.items():
    if shards[-1] and total + size > SHARD_BYTES:
      shards.append([])
      total = 0
    shards[-1].append(name)
    total += size
  return shards


def save_pretrained(
    directory: str | os.PathLike,
    cfg: ModelConfig,
    params: Any,
    tokenizer: Any = None,
    generation_config: dict[str, Any] | None = None,
    dtype: str | None = "float32",
    family: str | None = None,
) -> None:
  """Writes a complete Hugging Face folder for transformers and `load_pretrained`.

  Tensors are written one at a time, above 5 GB into several files with an index. Weights of an
  earlier export in the folder are replaced. In a multi-process run all processes must call this
  function; process 0 writes.

  Args:
    params: the parameter tree of `Transformer(cfg)`, on any mesh.
    tokenizer: written with its chat template; provides the token ids.
    generation_config: overrides, for example the result of `load_generation_config`.
    dtype: of the stored tensors: "float32", "bfloat16", "float16", or None to keep theirs.
    family: `model_type` to write, by default the family that matches `cfg`. A Mistral without a
      sliding window is written as a Llama unless this is "mistral".

  Raises:
    UserError: no family, or not the given one, matches `cfg`; `params` do not belong to `cfg`;
      or the tokenizer has more tokens than the embedding has rows.
  """
  folder = pathlib.Path(directory).expanduser()
  if dtype not in ("float32", "bfloat16", "float16", None):
    raise UserError(f"dtype={dtype!r} must be 'float32', 'bfloat16', 'float16' or None (as stored)")
  if folder.exists() and not folder.is_dir():
    raise UserError(f"{folder} exists and is not a folder")
  record = families.family_named(family, "family") if family else hf_config.family_of(cfg)
  config = hf_config.to_hf(cfg, record)
  if tokenizer is not None and len(tokenizer) > cfg.vocab_size:
    raise UserError(f"the tokenizer has {len(tokenizer)} tokens, but the model's embedding has "
                    f"only {cfg.vocab_size} rows")
  leaves, specs = flatten(params), {spec.name: spec for spec in tensor_specs(cfg)}
  if odd := set(leaves) ^ {spec.path for spec in specs.values()}:
    name = min("/".join(path) for path in odd)
    raise UserError(f"params do not belong to this config: {name!r} is only in one of them")
  entries = {}
  for spec in specs.values():
    leaf = leaves[spec.path]
    if tuple(leaf.shape if spec.repeat is None else leaf.shape[1:]) != spec.param_shape:
      raise UserError(f"params do not belong to this config: {'/'.join(spec.path)} has shape "
                      f"{list(leaf.shape)}")
    entries[spec.name] = np.dtype(jnp.dtype(dtype or leaf.dtype)), spec.shape

  def fetch(name: str) -> np.ndarray:
    spec = specs[name]
    leaf = leaves[spec.path]
    x = to_host(leaf if spec.repeat is None else leaf[spec.repeat])
    return spec.to_file(x).astype(entries[name][0], copy=False)

  writer = jax.process_index() == 0
  if writer:
    folder.mkdir(parents=True, exist_ok=True)
  sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in entries.items()}
  shards, weight_map = _shards(sizes), {}
  for i, shard in enumerate(shards):
    name = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    write_safetensors(folder / name, {key: entries[key] for key in shard}, fetch, write=writer)
    weight_map |= dict.fromkeys(shard, name)
  if not writer:
    return
  if len(shards) > 1:
    metadata = {"total_size": sum(sizes.values())}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
  # Files of an earlier export must not be read as part of this one.
  own = {*weight_map.values(), *([INDEX] if len(shards) > 1 else [])}
  for old in folder.iterdir():
    stale = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old.name)
    if stale and old.name not in own:
      old.unlink()
  ids = {f"{role}_token_id": None for role in ("bos", "eos", "pad")}
  if tokenizer is not None:
    ids = {name: getattr(tokenizer, name) for name in ids}
    tokenizer.save_pretrained(folder)
    _for_transformers_4(folder / "tokenizer_config.json")
  ids |= {k: v for k, v in (generation_config or {}).items() if k in ids and v is not None}
  config["dtype"] = str(jnp.result_type(*(dtype for dtype, _ in entries.values())))
  write_json(folder / "config.json", {**config, **ids})
  generation = {**{k: v for k, v in ids.items() if v is not None}, **(generation_config or {})}
  write_json(folder / "generation_config.json", generation)


def _for_transformers_4(path: pathlib.Path) -> None:
  """Names the tokenizer's class and its special tokens as versions 4 and 5 both read them."""
  fields = read_json(path)
  fields = {k: v for k, v in fields.items() if k not in ("is_local", "local_files_only")}
  fields["tokenizer_class"] = "PreTrainedTokenizerFast"
  if isinstance(fields.get("extra_special_tokens"), list):
    fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
  write_json(path, fields)


def write_json(path: pathlib.Path, value: Any) -> None:
  part = path.with_name(path.name + ".part")
  part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
  os.replace(part, path)
