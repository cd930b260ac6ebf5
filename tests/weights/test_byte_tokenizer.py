"""The byte tokenizer round-trips any text, and saves and loads like any other tokenizer."""

import random

import pytest

from dpr_jax.weights.byte_tokenizer import (
  ASSISTANT,
  END,
  PAD,
  SPECIAL_TOKENS,
  SYSTEM,
  USER,
  byte_tokenizer,
)

TEXTS = [
  "", "a", " ", "  leading and trailing  ", "a . b , c ! don't", "\r\n\t\x00\x7f\x1b", "naïve café",
  "\u2028\u2029\ufeff\ufffd\ufdd0", "日本語 العربية हिन्दी",
  "\U0001f468\u200d\U0001f469\u200d\U0001f467", "e\u0301 and \u00e9", "\U0010ffff\ue000",
]


def random_text(rng: random.Random) -> str:
  top = rng.choice([0x80, 0x800, 0x10000, 0x110000])
  points = (rng.randrange(top) for _ in range(rng.randint(1, 60)))
  return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


def test_ids_are_the_utf8_bytes_and_text_round_trips(rng):
  tokenizer = byte_tokenizer()
  dice = random.Random(int(rng.integers(2**63)))
  for text in TEXTS + [random_text(dice) for _ in range(300)]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.encode(text) == ids  # It adds neither BOS nor EOS.
    assert tokenizer.decode(ids) == text
  every = "".join(map(chr, range(0x80)))
  assert tokenizer.encode(every) == list(range(0x80))


def test_half_a_character_decodes_without_error():
  tokenizer = byte_tokenizer()
  assert tokenizer.decode(list("é".encode())[:1]) == "\ufffd"
  assert isinstance(tokenizer.decode(list(range(256))), str)


def test_special_ids():
  tokenizer = byte_tokenizer()
  assert len(tokenizer) == 261
  assert SPECIAL_TOKENS == (PAD, USER, ASSISTANT, SYSTEM, END)
  assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [256, 257, 258, 259, 260]
  assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (
    256, 260, None)
  assert sorted(tokenizer.all_special_ids) == [256, 257, 258, 259, 260]
  assert tokenizer.decode([104, 105, 260, 256], skip_special_tokens=True) == "hi"
  assert tokenizer.encode("<|end|>") == [260]
  assert tokenizer.encode("<|end|>", split_special_tokens=True) == list(b"<|end|>")


def test_chat_template():
  tokenizer = byte_tokenizer()
  messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "é"},
              {"role": "assistant", "content": "ok"}]
  ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
  assert ids == [259, *b"s", 260, 257, *"é".encode(), 260, 258, *b"ok", 260]
  ids = tokenizer.apply_chat_template(
    messages[:2], tokenize=True, return_dict=False, add_generation_prompt=True)
  assert ids == [259, *b"s", 260, 257, *"é".encode(), 260, 258]
  import jinja2

  with pytest.raises(jinja2.TemplateError, match="unknown role tool"):
    tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_save_and_load(tmp_path):
  from transformers import AutoTokenizer

  tokenizer = byte_tokenizer()
  tokenizer.save_pretrained(tmp_path)
  loaded = AutoTokenizer.from_pretrained(tmp_path)
  assert len(loaded) == 261 and loaded.is_fast
  assert loaded.chat_template == tokenizer.chat_template
  assert (loaded.pad_token_id, loaded.eos_token_id, loaded.bos_token_id) == (256, 260, None)
  assert sorted(loaded.all_special_ids) == sorted(tokenizer.all_special_ids)
  rng = random.Random(1)
  for text in TEXTS + [random_text(rng) for _ in range(50)]:
    ids = loaded.encode(text)
    assert ids == list(text.encode("utf-8"))
    assert loaded.decode(ids) == text
  messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r . s"}]
  assert loaded.apply_chat_template(messages, tokenize=True, return_dict=False) == (
    tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
  from dpr_jax.data import Demo, encode_demo

  a, b = (encode_demo(Demo(tuple(messages)), t) for t in (tokenizer, loaded))
  assert a.tokens.tolist() == b.tokens.tolist() and a.loss_mask.tolist() == b.loss_mask.tolist()
