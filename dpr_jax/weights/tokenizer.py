"""Loads tokenizers and generation settings of Hugging Face folders and GGUF files."""

import json
import pathlib
from typing import TYPE_CHECKING, Any

from dpr_jax.errors import UserError
from dpr_jax.weights.gguf_file import GGUFFile
from dpr_jax.weights.hf import read_json

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

ROLES = ("bos", "eos", "pad", "unk")


def from_folder(folder: pathlib.Path) -> "PreTrainedTokenizerFast":
  """Loads tokenizer.json of a folder unchanged, with its chat template.

  Raises:
    UserError: the file is missing or damaged, or it has tokens beyond the embedding.
  """
  from transformers import PreTrainedTokenizerFast

  path = folder / "tokenizer.json"
  if not path.is_file():
    raise UserError(f"{path} does not exist; only fast tokenizers (tokenizer.json) are read")
  # The base class loads the whole pipeline; the model-specific classes of transformers 5 rebuild
  # parts of it.
  try:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
  except Exception as error:  # the tokenizers library raises bare Exception.
    raise UserError(f"{path}: cannot be loaded: {error}") from None
  config = folder / "config.json"
  if config.is_file():
    fields = read_json(config)
    text = fields.get("text_config")
    vocab_size = (text if isinstance(text, dict) else fields).get("vocab_size")
    if isinstance(vocab_size, int):
      tokenizer = fit(tokenizer, vocab_size, str(path))
  return tokenizer


def fit(
    tokenizer: "PreTrainedTokenizerFast", vocab_size: int, where: str
) -> "PreTrainedTokenizerFast":
  """Drops special tokens that have no row in the embedding.

  Some text models (Gemma 3 1B) include placeholders of their multimodal versions with ids
  beyond their own vocabulary. Only such tokens can be dropped.

  Raises:
    UserError: an ordinary token, or one with a role (bos, eos, pad, unk), has no row.
  """
  from tokenizers import Tokenizer
  from transformers import PreTrainedTokenizerFast

  beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= vocab_size}
  if not beyond:
    return tokenizer
  backend = json.loads(tokenizer.backend_tokenizer.to_str())
  special = {t["content"] for t in backend["added_tokens"] if t["special"]}
  roles = {getattr(tokenizer, f"{role}_token") for role in ROLES}
  for token, i in sorted(beyond.items(), key=lambda item: item[1]):
    if token not in special or token in roles or token in (tokenizer.chat_template or ""):
      raise UserError(f"{where}: token {token!r} has id {i}, but the model's embedding has only "
                      f"{vocab_size} rows; this tokenizer belongs to another model, or the "
                      "embedding was not resized")
  backend["added_tokens"] = [t for t in backend["added_tokens"] if t["content"] not in beyond]
  named = {
      name: token
      for name, token in tokenizer.special_tokens_map.items()
      if isinstance(token, str) and token not in beyond
  }
  out = PreTrainedTokenizerFast(
      tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
      extra_special_tokens=[t for t in tokenizer.extra_special_tokens if str(t) not in beyond],
      clean_up_tokenization_spaces=False,
      model_max_length=tokenizer.model_max_length,
      padding_side=tokenizer.padding_side,
      **named,
  )
  out.chat_template = tokenizer.chat_template
  return out


def from_gguf(path: pathlib.Path) -> "PreTrainedTokenizerFast":
  """Builds the tokenizer of a .gguf file; raises UserError if missing or not implemented."""
  from dpr_jax.weights.gguf_tokenizer import build

  file = GGUFFile(path)
  tokenizer = build(file.metadata, file.where)
  return fit(tokenizer, file.shapes.get("token_embd.weight", (1 << 62,))[0], file.where)


def generation_from_folder(folder: pathlib.Path) -> dict[str, Any]:
  """Reads generation_config.json, else the token ids of config.json."""
  if (folder / "generation_config.json").is_file():
    return read_json(folder / "generation_config.json")
  if not (folder / "config.json").is_file():
    return {}
  fields = read_json(folder / "config.json")
  names = [f"{role}_token_id" for role in ("bos", "eos", "pad")]
  return {name: fields[name] for name in names if fields.get(name) is not None}


def generation_from_gguf(path: pathlib.Path) -> dict[str, Any]:
  """Reads the token ids of a .gguf file; an end-of-turn token is a second `eos_token_id`."""
  metadata = GGUFFile(path).metadata
  keys = {"bos": "bos", "eos": "eos", "pad": "padding"}
  ids = {f"{role}_token_id": metadata.get(f"tokenizer.ggml.{keys[role]}_token_id") for role in keys}
  eos, eot = ids["eos_token_id"], metadata.get("tokenizer.ggml.eot_token_id")
  if eos is not None and eot is not None and eot != eos:
    ids["eos_token_id"] = [eos, eot]
  return {name: value for name, value in ids.items() if value is not None}
