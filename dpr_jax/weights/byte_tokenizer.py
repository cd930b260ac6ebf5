"""A byte-level tokenizer for models small enough to train on a laptop.

Ids 0 to 255 are the bytes of the UTF-8 text, so any text round-trips; five special tokens
follow. The result is an ordinary `PreTrainedTokenizerFast`, which saves, loads and renders chats.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

PAD, USER, ASSISTANT, SYSTEM, END = SPECIAL_TOKENS = (
  "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
)

# <|user|>text<|end|><|assistant|>answer<|end|>: each turn adds a role token and an end token.
CHAT_TEMPLATE = (
  "{% for message in messages %}"
  "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
  "{{ raise_exception('unknown role ' + message['role']) }}"
  "{% endif %}"
  "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_symbols() -> list[str]:
  """The character by which the ByteLevel pre-tokenizer (GPT-2) stands for each byte.

  Printable Latin-1 characters represent themselves; the other bytes map to U+0100, U+0101, ...
  """
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  symbols, shifted = [], 0x100
  for byte in range(256):
    symbols.append(chr(byte if byte in printable else shifted))
    shifted += byte not in printable
  return symbols


def byte_tokenizer() -> "PreTrainedTokenizerFast":
  """Builds the tokenizer of 256 bytes and SPECIAL_TOKENS, 261 ids; EOS is <|end|>, no BOS."""
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  vocab = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
  backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.decoder = decoders.ByteLevel()
  special = [AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS]
  backend.add_special_tokens(special)
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend,
    eos_token=END,
    pad_token=PAD,
    extra_special_tokens=[USER, ASSISTANT, SYSTEM],
    clean_up_tokenization_spaces=False,
  )
  tokenizer.chat_template = CHAT_TEMPLATE
  return tokenizer
