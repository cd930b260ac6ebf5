"""Tokenizers trained on a few lines, and chat templates of the families they stand for."""

import dataclasses
import json
import random
from typing import Any

import pytest

CORPUS = [
  "the quick brown fox jumps over the lazy dog and runs away from the other animals",
  "what is the sum of two numbers ? the answer is four . think step by step , then answer",
  "user assistant model system human Response Instruction you are a helpful assistant",
  "hello there , how are you today ? I am fine , thank you . \n\n and you ?\n",
] * 4

# Each is a small form of the template that models of that kind ship.
CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + "
  "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GEMMA = (
  "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
  "{% set first = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}"
  "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
  "{% for m in turns %}"
  "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
  "{% if m['role'] == 'assistant' %}{% set role = 'model' %}"
  "{% else %}{% set role = m['role'] %}{% endif %}"
  "{{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}"
  "{{ m['content'] | trim }}{{ '<end_of_turn>\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
LLAMA3 = (
  "{% set loop_messages = messages %}{% for m in loop_messages %}"
  "{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + "
  "m['content'] | trim + '<|eot_id|>' %}"
  "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
  "{% endfor %}{% if add_generation_prompt %}"
  "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
  "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
  "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
  "{{ ' ' + m['content'] + eos_token }}{% else %}{{ m['content'] + '\\n' }}{% endif %}{% endfor %}"
)
# Closes an assistant turn with plain text, no special token anywhere.
TEXT = (
  "{% for m in messages %}{% if m['role'] == 'assistant' %}"
  "{{ '### Response:\\n' + m['content'] + '\\n\\n' }}{% else %}"
  "{{ '### Instruction:\\n' + m['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
CLOSED_TEXT = TEXT.replace(  # The same, with an EOS after each answer.
  "'### Response:\\n' + m['content']", "'### Response:\\n' + m['content'] + eos_token")
assert CLOSED_TEXT != TEXT
# Writes an empty thought into the last answer only, as Qwen3's does.
THINKING = (
  "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
  "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
  "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}"
  "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
  "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _wrap(backend, specials, template, **tokens):
  from tokenizers import AddedToken
  from transformers import PreTrainedTokenizerFast

  backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, clean_up_tokenization_spaces=False, **tokens)
  tokenizer.chat_template = template
  return tokenizer


def byte_level(specials, template, **tokens):
  """Byte-level BPE with merges, as Llama 3 and Qwen have, split by the regex of Llama 3."""
  from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

  backend = Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(
      r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
      r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  backend.decoder = decoders.ByteLevel()
  backend.train_from_iterator(CORPUS, trainers.BpeTrainer(
    vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
  return _wrap(backend, specials, template, **tokens)


def sentencepiece(specials, template, prepend="never", bos="", **tokens):
  """BPE over words marked with U+2581, bytes as fallback, as Llama 2, Mistral and Gemma have."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

  trained = Tokenizer(models.BPE())
  trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=True)
  trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
  model = json.loads(trained.to_str())["model"]
  pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)),
            *sorted(model["vocab"], key=model["vocab"].get)]
  backend = Tokenizer(models.BPE(
    vocab={piece: i for i, piece in enumerate(pieces)}, merges=[tuple(m) for m in model["merges"]],
    byte_fallback=True, unk_token="<unk>", fuse_unk=True))
  backend.pre_tokenizer = trained.pre_tokenizer
  backend.decoder = decoders.Sequence([
    decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
  tokenizer = _wrap(backend, specials, template, unk_token="<unk>",
                    **({"bos_token": bos} if bos else {}), **tokens)
  if bos:
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
  return tokenizer


@dataclasses.dataclass(frozen=True)
class Family:
  """A tokenizer, its template, and what a conversation should look like under it."""

  name: str
  tokenizer: Any
  end: str  # the special token that ends a response.
  bos: str = ""
  trims: bool = False  # the template strips its messages.
  system: bool = True  # the template takes a system message.


def _families():
  from dpr_jax.weights.byte_tokenizer import byte_tokenizer

  im = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
  header = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
            "<|eot_id|>"]
  gemma = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
  end = "<|im_end|>"
  return {
    "bytes": Family("bytes", byte_tokenizer(), "<|end|>"),
    "chatml": Family(
      "chatml", byte_level(im, CHATML, eos_token=end, pad_token=end), end),  # pad is EOS
    "gemma": Family(
      "gemma",
      sentencepiece(gemma, GEMMA, bos="<bos>", eos_token="<eos>", pad_token="<pad>"),
      "<end_of_turn>", bos="<bos>", trims=True),
    "llama3": Family(
      "llama3",
      byte_level(header, LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>",
                 pad_token="<|end_of_text|>"),
      "<|eot_id|>", bos="<|begin_of_text|>", trims=True),
    "mistral": Family(
      "mistral",
      sentencepiece(["<s>", "</s>"], MISTRAL, prepend="first", bos="<s>", eos_token="</s>"),
      "</s>", bos="<s>"),
    "plain": Family(
      "plain",
      sentencepiece(["<s>", "</s>"], None, prepend="always", bos="<s>", eos_token="</s>"),
      "</s>", bos="<s>"),
    "text": Family(
      "text", byte_level(["</s>"], TEXT, eos_token="</s>", pad_token="</s>"), "</s>"),
  }


@pytest.fixture
def dice(rng) -> random.Random:
  """Fresh randomness of the standard library, from the seed that `rng` prints."""
  return random.Random(int(rng.integers(2**63)))


FAMILIES = ("bytes", "chatml", "gemma", "llama3", "mistral", "plain", "text")
_BUILT: dict[str, Family] = {}


def _built() -> dict[str, Family]:
  if not _BUILT:
    _BUILT.update(_families())
  return _BUILT


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
  return _built()[request.param]


@pytest.fixture
def families() -> dict[str, Family]:
  return _built()


@pytest.fixture
def templates() -> dict[str, str]:
  return {"chatml": CHATML, "text": TEXT, "closed_text": CLOSED_TEXT, "thinking": THINKING}
