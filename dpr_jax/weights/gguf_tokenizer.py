"""Builds tokenizers from the metadata of a GGUF file.

A GGUF holds a vocabulary and, for byte-level BPE, its merges, but only the name of the
pre-tokenizer. Each name below maps to the pipeline of the original tokenizer.json. Unknown names
are refused, because a wrong split would silently produce wrong ids.
Source of the names: llama.cpp, src/llama-vocab.cpp.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dpr_jax.errors import UserError
from dpr_jax.weights.families import FAMILIES

if TYPE_CHECKING:
  from tokenizers import Tokenizer
  from transformers import PreTrainedTokenizerFast

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type.

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Name -> (regex of the split, "digits" or None; whole words skip the merges; NFC; BOS by default).
_PRE = {
    "gpt-2": (None, False, False, False),
    "smollm": ("digits", False, False, False),
    "llama-bpe": (_LLAMA3, True, False, True),
    "llama3": (_LLAMA3, True, False, True),
    "llama-v3": (_LLAMA3, True, False, True),
    "tekken": (_TEKKEN, True, False, True),
    "qwen2": (_QWEN2, False, True, False),
    "deepseek-r1-qwen": (_QWEN2, False, True, True),
}


def build(metadata: Mapping[str, Any], where: str) -> "PreTrainedTokenizerFast":
  """Builds the tokenizer with its special tokens and chat template.

  Args:
    metadata: of the file, see `GGUFFile`.
    where: name of the file in error messages.

  Raises:
    UserError: the metadata have no tokenizer, or one of a kind that is not implemented.
  """
  from tokenizers import AddedToken, processors
  from transformers import PreTrainedTokenizerFast

  def get(name: str, default: Any = None) -> Any:
    return metadata.get(f"tokenizer.ggml.{name}", default)

  tokens, model, pre = get("tokens"), get("model"), get("pre", "default")
  if not isinstance(tokens, list) or not tokens:
    raise UserError(f"{where}: tokenizer.ggml.tokens is missing; the file holds no tokenizer")
  if model == "gpt2":
    if pre not in _PRE:
      raise UserError(f"{where}: tokenizer.ggml.pre={pre!r} is not implemented; known: "
                      f"{', '.join(_PRE)}")
    backend, add_bos = _byte_level(tokens, get("merges"), pre, where), _PRE[pre][3]
  elif model == "llama":
    prefixes = tuple(x.gguf.raw_spaces for x in FAMILIES.values() if x.gguf and x.gguf.raw_spaces)
    raw_spaces = str(metadata.get("general.architecture")).startswith(prefixes)
    prefix, unknown = get("add_space_prefix", not raw_spaces), get("unknown_token_id")
    backend = _sentencepiece(tokens, get("scores"), raw_spaces, prefix, unknown, where)
    add_bos = True
  else:
    raise UserError(f"{where}: tokenizer.ggml.model={model!r} is not implemented; known: gpt2, "
                    "llama")

  vocab = backend.get_vocab()
  # Added in one call, because each call rebuilds the matcher of added tokens.
  backend.add_tokens(
      [
          AddedToken(token, special=kind == _CONTROL, normalized=False)
          for token, kind in zip(tokens, get("token_type") or [])
          if token in vocab and kind in (_CONTROL, _USER_DEFINED)
      ]
  )
  keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
  ids = {role: get(f"{key}_token_id") for role, key in keys.items()}
  for role, i in ids.items():
    if i is not None and not 0 <= i < len(tokens):
      raise UserError(f"{where}: tokenizer.ggml.{keys[role]}_token_id={i} is outside the "
                      "vocabulary")
  named = {f"{role}_token": tokens[i] for role, i in ids.items() if i is not None}
  if get("add_bos_token", add_bos) and ids["bos"] is not None:
    bos = tokens[ids["bos"]]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos"])]
    )
  tokenizer = PreTrainedTokenizerFast(
      tokenizer_object=backend, clean_up_tokenization_spaces=False, **named
  )
  tokenizer.chat_template = metadata.get("tokenizer.chat_template")
  return tokenizer


def _byte_level(tokens: list[str], merges: Any, pre: str, where: str) -> "Tokenizer":
  from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

  if not isinstance(merges, list):
    raise UserError(f"{where}: tokenizer.ggml.merges is missing; a byte-level tokenizer needs it")
  split, ignore_merges, nfc, _ = _PRE[pre]
  pairs = [tuple(merge.split(" ", 1)) for merge in merges]
  vocab = {token: i for i, token in enumerate(tokens)}
  backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=ignore_merges))
  steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (None, "digits"))]
  if split == "digits":
    steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
  elif split is not None:
    steps.insert(0, pre_tokenizers.Split(Regex(split), behavior="isolated"))
  backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
  if nfc:
    backend.normalizer = normalizers.NFC()
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentencepiece(
    tokens: list[str], scores: Any, raw_spaces: bool, prefix: bool, unknown: int | None, where: str
) -> "Tokenizer":
  """SentencePiece BPE: U+2581 for spaces, byte fallback tokens, and merges derived from scores."""
  from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

  if not isinstance(scores, list) or len(scores) != len(tokens):
    raise UserError(f"{where}: tokenizer.ggml.scores must have one score per token")
  space = "\u2581"
  if raw_spaces:
    # Runs of spaces are stored as spaces, and merges are ordered by id instead of by score.
    tokens = [space * len(t) if t and not t.strip(" ") else t for t in tokens]
    scores = [-i for i in range(len(tokens))]
  vocab = {token: i for i, token in enumerate(tokens)}
  backend = Tokenizer(
      models.BPE(
          vocab=vocab,
          merges=_merges(vocab, scores),
          unk_token=None if unknown is None else tokens[unknown],
          fuse_unk=True,
          byte_fallback=True,
      )
  )
  decode = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
  backend.normalizer = replace = normalizers.Replace(" ", space)
  if prefix:
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(space), replace])
    decode.append(decoders.Strip(" ", 1, 0))
  if raw_spaces:
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
  backend.decoder = decoders.Sequence(decode)
  return backend


def _merges(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
  """Returns all pairs of tokens that merge into a token, ordered from the best merged token."""
  found = []
  for token, i in vocab.items():
    cuts = ((token[:k], token[k:]) for k in range(1, len(token)))
    pairs = [(a, b) for a, b in cuts if a in vocab and b in vocab]
    pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    found.extend((scores[i], len(a), len(b), (a, b)) for a, b in pairs)
  found.sort(key=lambda entry: entry[:3], reverse=True)
  return [pair for *_, pair in found]
