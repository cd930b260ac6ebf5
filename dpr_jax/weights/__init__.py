"""Pretrained weights: reads Hugging Face folders and GGUF files, writes Hugging Face folders."""

import os
import pathlib
from typing import TYPE_CHECKING, Any

import jax

from dpr_jax.errors import UserError
from dpr_jax.models import ModelConfig
from dpr_jax.paths import on_disk
from dpr_jax.weights import gguf, hf
from dpr_jax.weights import tokenizer as tokenizer_lib
from dpr_jax.weights.hf import save_pretrained
from dpr_jax.weights.peft import Adapter, is_adapter

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

__all__ = [
    "load_classifier", "load_config", "load_generation_config", "load_pretrained",
    "load_tokenizer", "save_pretrained",
]


def _path(path: str | os.PathLike) -> pathlib.Path:
  try:
    path = on_disk(path).expanduser()
    there = path.exists()
  except FileNotFoundError:
    there = False
  if not there:
    raise UserError(f"{path} does not exist; give a Hugging Face model folder or a .gguf file")
  if path.is_file() and path.suffix != ".gguf":
    raise UserError(f"{path} is not a .gguf file; give it or the folder that holds config.json")
  return path


def _base(path: pathlib.Path) -> pathlib.Path:
  """The base of an adapter; of a model, itself."""
  return Adapter(path).base if is_adapter(path) else path


def load_pretrained(
    path: str | os.PathLike, dtype: Any = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
  """Loads a model.

  Args:
    path: a Hugging Face folder (config.json and safetensors), a .gguf file, or the folder of a PEFT
      adapter (LoRA), which is merged into the base that it names.
    dtype: of the parameters; None keeps the stored dtype, float32 for a quantised GGUF.
    mesh: the parameters are sharded over it by the rules of `dpr_jax.sharding`. None means the
      mesh set by `jax.set_mesh`, else the default device. Each process reads the files itself,
      one tensor at a time, and keeps its shards.

  Returns:
    (ModelConfig, params): `Transformer(cfg).apply({"params": params}, ...)`.

  Raises:
    UserError: the files are missing, damaged or not supported.
  """
  path, adapted = _path(path), {}
  if is_adapter(path):
    adapter = Adapter(path)
    path, adapted = adapter.base, {"adapted": adapter.of}
  return (gguf.load_gguf if path.is_file() else hf.load_hf)(path, dtype, mesh, **adapted)


def load_classifier(
    path: str | os.PathLike, dtype: Any = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[ModelConfig, dict[str, Any], Any]:
  """Loads a reward model: a sequence classifier with one label, in a Hugging Face folder.

  Returns:
    (ModelConfig, params, score_D): a row's reward is score_D times the hidden state of its last
    token. The config has a tied head, so that `params` need none.

  Raises:
    UserError: as `load_pretrained`; or there is no head of one label.
  """
  folder = _path(path)
  if not folder.is_dir():
    raise UserError(f"{folder}: a reward model is read from a Hugging Face folder")
  return hf.load_classifier(folder, dtype, mesh)


def load_config(path: str | os.PathLike) -> ModelConfig:
  """Reads the ModelConfig of what `load_pretrained` loads, without the weights."""
  path = _base(_path(path))
  return gguf.load_gguf_config(path) if path.is_file() else hf.load_hf_config(path)


def load_tokenizer(path: str | os.PathLike) -> "PreTrainedTokenizerFast":
  """Loads the tokenizer of a Hugging Face folder or a .gguf file, with its chat template.

  Raises:
    UserError: there is none, or it has tokens for which the model has no embedding.
  """
  path = _path(path)
  if is_adapter(path) and (path / "tokenizer.json").is_file():
    tokenizer = tokenizer_lib.from_folder(path)
    return tokenizer_lib.fit(tokenizer, load_config(path).vocab_size, str(path))
  path = _base(path)
  return (tokenizer_lib.from_gguf if path.is_file() else tokenizer_lib.from_folder)(path)


def load_generation_config(path: str | os.PathLike) -> dict[str, Any]:
  """Reads generation_config.json; without that file, the token ids of the model's config.

  `eos_token_id` may be one id or a list of ids.
  """
  path = _base(_path(path))
  if path.is_file():
    return tokenizer_lib.generation_from_gguf(path)
  return tokenizer_lib.generation_from_folder(path)
