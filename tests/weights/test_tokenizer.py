"""Tokenizers of Hugging Face folders and of GGUF metadata."""

import json
import unicodedata

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from dpr_jax.errors import UserError
from dpr_jax.weights import load_generation_config, load_tokenizer
from dpr_jax.weights.byte_tokenizer import byte_tokenizer
from dpr_jax.weights.gguf_tokenizer import build

CORPUS = [
  "It's 2024 and we've counted 1234567 sheep, 89 of them black;  two   spaces.\n\nLines\t tabs.",
  "The CamelCase HTTPServer isn't HTMLish: naïve café, Größe, 中文字符, русский, 😀😀.",
  "def f(x):\n    return x ** 2  # square\n\n\n", " leading and trailing ", "x" * 40, "",
] * 3
TEXTS = CORPUS[:6] + ["unseen: Ωμέγα 007 1,000.50\r\n  ok", "e\u0301 decomposed", "\u2581literal"]


@pytest.fixture
def folder(tmp_path):
  byte_tokenizer().save_pretrained(tmp_path)
  return tmp_path


# --- folders ---


def test_a_folder_without_config_is_enough(folder):
  tokenizer, loaded = byte_tokenizer(), load_tokenizer(folder)
  for text in TEXTS:
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
  assert loaded.chat_template == tokenizer.chat_template
  assert load_generation_config(folder) == {}


def test_ids_come_from_config_where_there_is_no_generation_config(folder):
  fields = {"vocab_size": 261, "eos_token_id": [7, 8], "bos_token_id": None, "pad_token_id": 0}
  (folder / "config.json").write_text(json.dumps(fields))
  assert load_generation_config(folder) == {"eos_token_id": [7, 8], "pad_token_id": 0}
  (folder / "generation_config.json").write_text('{"eos_token_id": 9, "top_p": 0.5}')
  assert load_generation_config(folder) == {"eos_token_id": 9, "top_p": 0.5}


def test_a_tokenizer_beyond_the_embedding_is_refused(folder):
  (folder / "config.json").write_text('{"vocab_size": 259}')
  with pytest.raises(UserError, match="'<.end.>' has id 260, but .* only 259 rows"):
    load_tokenizer(folder)  # special, but it is the EOS.
  (folder / "config.json").write_text('{"vocab_size": 255}')
  with pytest.raises(UserError, match="has id 255, but .* only 255 rows"):
    load_tokenizer(folder)
  # A padding token that was added without resizing the embedding.
  tokenizer = byte_tokenizer()
  tokenizer.add_special_tokens({"pad_token": "[PAD]"})
  tokenizer.save_pretrained(folder)
  (folder / "config.json").write_text('{"vocab_size": 261}')
  with pytest.raises(UserError, match=r"'\[PAD\]' has id 261"):
    load_tokenizer(folder)
  # An ordinary word that was added.
  tokenizer = byte_tokenizer()
  tokenizer.add_tokens(["hello"])
  tokenizer.save_pretrained(folder)
  with pytest.raises(UserError, match="'hello' has id 261"):
    load_tokenizer(folder)


def test_a_placeholder_of_another_modality_is_dropped(folder):
  """Gemma 3 1B has 262,144 rows and <image_soft_token> with id 262,144."""
  tokenizer = byte_tokenizer()
  tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<image>", special=True)])
  tokenizer.save_pretrained(folder)
  (folder / "config.json").write_text('{"text_config": {"vocab_size": 261}}')
  loaded = load_tokenizer(folder)
  assert len(loaded) == 261
  assert loaded("<image>")["input_ids"] == list(b"<image>")
  plain = byte_tokenizer()
  assert loaded.special_tokens_map == plain.special_tokens_map
  assert loaded.chat_template == plain.chat_template
  for text in [*TEXTS, "<|user|>hi<|end|>"]:
    assert loaded(text)["input_ids"] == plain(text)["input_ids"]
  loaded.save_pretrained(folder / "again")
  assert load_tokenizer(folder / "again").get_vocab() == plain.get_vocab()


def test_missing_and_damaged_tokenizers(folder):
  (folder / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match="tokenizer.json: cannot be loaded"):
    load_tokenizer(folder)
  (folder / "tokenizer.json").unlink()
  with pytest.raises(UserError, match="tokenizer.json does not exist"):
    load_tokenizer(folder)


# --- GGUF metadata ---


def _byte_level(pre_tokenizer, ignore_merges=False, nfc=False):
  """A small byte-level BPE trained with the pipeline of a published tokenizer.json."""
  tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
  tokenizer.pre_tokenizer = pre_tokenizer
  if nfc:
    tokenizer.normalizer = normalizers.NFC()
  trainer = trainers.BpeTrainer(
    vocab_size=400, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
  )
  tokenizer.train_from_iterator(CORPUS, trainer)
  return tokenizer


def _metadata(tokenizer, pre, **extra):
  model = json.loads(tokenizer.to_str())["model"]
  tokens = sorted(model["vocab"], key=model["vocab"].get)
  merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
  return {
    "general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
    "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges,
    "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    **{f"tokenizer.{k}": v for k, v in extra.items()},
  }


def _isolated(pattern):
  return pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ])


# As in the tokenizer.json of Qwen2.5 and Llama 3.
QWEN2 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
PIPELINES = {
  "gpt-2": (_GPT2, False, False),
  "smollm": (
    pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]), False, False
  ),
  "qwen2": (_isolated(QWEN2), False, True),
  "llama-bpe": (_isolated(LLAMA3), True, False),
}


@pytest.mark.parametrize("pre", PIPELINES)
def test_byte_level_gguf_gives_the_ids_of_the_original(pre):
  original = _byte_level(*PIPELINES[pre])
  metadata = _metadata(original, pre, **{"ggml.add_bos_token": False, "chat_template": "{{ x }}"})
  tokenizer = build(metadata, "m.gguf")
  for text in TEXTS:
    ids = original.encode(text).ids
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == (unicodedata.normalize("NFC", text) if pre == "qwen2" else text)
  assert tokenizer("<|im_start|>a<|im_end|>")["input_ids"][::2] == [1, 2]
  assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
  assert tokenizer.chat_template == "{{ x }}"


def test_pipelines_differ_where_they_should():
  """The texts distinguish the pre-tokenizers, so that the test above can fail."""
  seen = {}
  original = _byte_level(*PIPELINES["gpt-2"])
  for pre in PIPELINES:
    tokenizer = build(_metadata(original, pre, **{"ggml.add_bos_token": False}), "m.gguf")
    seen[pre] = json.dumps([tokenizer(text)["input_ids"] for text in TEXTS])
  assert len(set(seen.values())) == len(seen)


def test_the_splits_of_transformers_are_the_same():
  mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
  from dpr_jax.weights.gguf_tokenizer import _PRE

  for name in ("llama-bpe", "qwen2", "tekken"):
    assert _PRE[name][0] == mapping.GGUF_PRE_TOKENIZER_SPLITS[name]


def test_bos_is_added_according_to_the_file():
  original = _byte_level(*PIPELINES["llama-bpe"])
  plain = original.encode("ab").ids
  for flags, wanted in (({}, True), ({"ggml.add_bos_token": False}, False)):
    tokenizer = build(_metadata(original, "llama-bpe", **flags), "m.gguf")
    assert tokenizer("ab")["input_ids"] == [1] * wanted + plain
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == plain
  assert build(_metadata(original, "qwen2"), "m.gguf")("ab")["input_ids"][0] != 1


def _sentencepiece():
  """A vocabulary with bytes, pieces and scores in SentencePiece's order."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
  trainer = trainers.BpeTrainer(vocab_size=260, show_progress=False)
  tokenizer.train_from_iterator(CORPUS, trainer)
  model = json.loads(tokenizer.to_str())["model"]
  merged = ["".join(m) if isinstance(m, list) else m.replace(" ", "") for m in model["merges"]]
  single = sorted(set(model["vocab"]) - set(merged))
  special = ["<unk>", "<s>", "</s>"]
  tokens = special + [f"<0x{i:02X}>" for i in range(256)] + merged + single
  scores = [0.0] * 259 + [-float(i) for i in range(len(merged) + len(single))]
  return {
    "general.architecture": "llama", "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores,
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
  }


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_sentencepiece_gguf_gives_the_ids_of_transformers(arch):
  mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
  metadata = _sentencepiece() | {"general.architecture": arch}
  if arch == "gemma3":
    metadata["tokenizer.ggml.add_space_prefix"] = False
    metadata["tokenizer.ggml.tokens"] = [
      t.replace("\u2581", " ") if set(t) == {"\u2581"} and len(t) > 1 else t
      for t in metadata["tokenizer.ggml.tokens"]
    ]
  tokenizer = build(metadata, "m.gguf")
  names = mapping.GGUF_TOKENIZER_MAPPING["tokenizer"]
  fields = {ours: metadata.get(f"tokenizer.{key}") for key, ours in names.items()}
  fields = {ours: value for ours, value in fields.items() if value is not None}
  theirs, _ = mapping.convert_gguf_tokenizer(arch, fields)
  for text in TEXTS:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1  # BOS.
    # Llama's prefix is a space before any text (sentencepiece, llama.cpp and Llama 2's
    # tokenizer.json); the Metaspace of transformers spares texts that begin with one.
    prefixed = " " + text if arch == "llama" and text[:1] in (" ", "\u2581") else text
    assert ids[1:] == theirs.encode(prefixed, add_special_tokens=False).ids, text
    if text and "\u2581" not in text:
      assert tokenizer.decode(ids, skip_special_tokens=True) == text
  assert 0 not in tokenizer("\U0001f9ff\u0e01")["input_ids"]  # bytes, not <unk>.


@pytest.mark.parametrize(
  "change, message",
  [
    ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
    ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model='t5'"),
    ({"tokenizer.ggml.pre": "superbpe"}, "tokenizer.ggml.pre='superbpe'"),
    ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
    ({"tokenizer.ggml.eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id=1000000"),
    ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores"),
  ],
)
def test_bad_metadata_is_one_clear_line(change, message):
  metadata = _metadata(_byte_level(*PIPELINES["gpt-2"]), "gpt-2") | change
  with pytest.raises(UserError, match=message) as error:
    build(metadata, "m.gguf")
  assert str(error.value).startswith("m.gguf:")
