"""Conversation -> ids and mask, over tokenizers and templates of several families."""

import dataclasses
import random

import numpy as np
import pytest

from dpr_jax.data.demos import Demo
from dpr_jax.data.templates import encode_demo, encode_response, render_prompt, stop_ids
from dpr_jax.errors import UserError
from dpr_jax.weights.byte_tokenizer import byte_tokenizer

WORDS = ("the quick brown fox . answer is four ! hello there you 42 naïve \U0001f600 a\nb x<y> "
         "don't { } \\n").split(" ")


def text(rng: random.Random) -> str:
  return " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))


def conversation(rng: random.Random, turns: int, system: bool = False):
  messages = [{"role": "system", "content": text(rng)}] if system else []
  for _ in range(turns):
    messages.append({"role": "user", "content": text(rng)})
    messages.append({"role": "assistant", "content": text(rng)})
  return tuple(messages)


def spans(mask: np.ndarray) -> list[tuple[int, int]]:
  """[start, end) of every run of ones."""
  edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
  return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("system", [False, True])
def test_prompt_then_response_is_the_demonstration(family, turns, system, dice):
  tokenizer = family.tokenizer
  messages = conversation(dice, turns, system)
  example = encode_demo(Demo(messages), tokenizer)
  assert example.tokens.dtype == np.int32 and example.loss_mask.dtype == np.float32
  assert example.tokens.shape == example.loss_mask.shape
  end = tokenizer.convert_tokens_to_ids(family.end)
  found = spans(example.loss_mask)
  assert len(found) == turns
  answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
  for (start, stop), i in zip(found, answers):
    prompt = render_prompt(messages[:i], tokenizer)
    response = encode_response(messages[i]["content"], messages[:i], tokenizer)
    # What sampling sees and should write is what was trained, in every turn.
    np.testing.assert_array_equal(example.tokens[:start], prompt)
    np.testing.assert_array_equal(example.tokens[start:stop], response)
    assert prompt.dtype == response.dtype == np.int32
    # From the first token of the content to the EOS, nothing else.
    content = messages[i]["content"]
    written = tokenizer.decode(response[:-1])
    assert written.strip() == content.strip()
    assert response[-1] == end and end not in response[:-1]
  assert found[-1][1] == len(example.tokens)  # nothing is kept after the last EOS
  last = encode_demo(Demo(messages), tokenizer, train_on="last")
  np.testing.assert_array_equal(last.tokens, example.tokens)
  assert spans(last.loss_mask) == found[-1:]


@pytest.mark.parametrize("turns", [1, 2])
def test_a_response_that_was_cut_off_has_no_end(family, turns, dice):
  """The ids of the whole demonstration, without what closes the last turn."""
  tokenizer, messages = family.tokenizer, conversation(dice, turns)
  whole = encode_demo(Demo(messages), tokenizer)
  cut = encode_demo(Demo(messages, ended=False), tokenizer)
  end = tokenizer.convert_tokens_to_ids(family.end)
  assert whole.tokens[-1] == end
  assert cut.tokens.tolist() == whole.tokens[:-1].tolist()
  assert cut.loss_mask.tolist() == whole.loss_mask[:-1].tolist()
  assert np.count_nonzero(cut.tokens[cut.loss_mask > 0] == end) == turns - 1  # earlier turns end.
  whole = encode_response(messages[-1]["content"], messages[:-1], tokenizer)
  cut = encode_response(messages[-1]["content"], messages[:-1], tokenizer, ended=False)
  assert cut.tolist() == whole[:-1].tolist() and len(cut)


def test_what_a_template_writes_before_the_end_is_cut_off_too(families, tmp_path):
  """Also where the text occurs in the template's own words."""
  tokenizer = families["chatml"].tokenizer
  path = tmp_path / "spaced.jinja"
  path.write_text(tokenizer.chat_template.replace("+ '<|im_end|>'", "+ ' \\nend<|im_end|>'"))
  assert "end<|im_end|>" in path.read_text()
  for content in ("end", "im", "an end", "a"):
    messages = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": content})
    got = encode_response(content, messages[:1], tokenizer, str(path), ended=False)
    assert got.tolist() == tokenizer.encode(content, add_special_tokens=False), content
    whole = encode_response(content, messages[:1], tokenizer, str(path))
    assert len(whole) > len(got) + 1


def test_a_cut_response_of_no_token_is_refused(families):
  tokenizer = families["gemma"].tokenizer  # Its template trims.
  messages = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "  "})
  with pytest.raises(UserError, match="f:3: a response that was cut off .* must have a token"):
    encode_demo(Demo(messages, source="f:3", ended=False), tokenizer)


def test_beginning_of_sequence_occurs_once(family):
  messages = conversation(random.Random(5), 3)
  tokens = encode_demo(Demo(messages), family.tokenizer).tokens
  prompt = render_prompt(messages[:1], family.tokenizer)
  bos = family.tokenizer.bos_token_id
  if family.bos:
    for ids in (tokens, prompt):
      assert ids[0] == bos and (ids == bos).sum() == 1
  else:
    assert bos is None


@pytest.mark.parametrize("name", ["chatml", "gemma", "llama3", "bytes"])
def test_ids_are_those_of_transformers(families, name, dice):
  """Where every turn is closed by special tokens, whole-conversation tokenising must agree."""
  family = families[name]
  for turns in (1, 2, 3):
    messages = conversation(dice, turns)
    want = family.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    got = encode_demo(Demo(messages), family.tokenizer).tokens
    end = family.tokenizer.convert_tokens_to_ids(family.end)
    last = max(i for i, t in enumerate(want) if t == end)
    assert got.tolist() == want[: last + 1]
    want = family.tokenizer.apply_chat_template(
      messages[:-1], tokenize=True, return_dict=False, add_generation_prompt=True)
    assert render_prompt(messages[:-1], family.tokenizer).tolist() == want


def test_mask_is_the_assistant_mask_of_transformers(families, tmp_path, dice):
  """`{% generation %}` in the template makes transformers mark the assistant tokens itself."""
  tokenizer = families["chatml"].tokenizer
  marked = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' "
    "%}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
  path = tmp_path / "marked.jinja"
  path.write_text(marked)
  for turns in (1, 2, 4):
    messages = conversation(dice, turns, system=True)
    want = tokenizer.apply_chat_template(
      list(messages), chat_template=marked, tokenize=True, return_dict=True,
      return_assistant_tokens_mask=True)
    got = encode_demo(Demo(messages), tokenizer, template=str(path))
    n = len(got.tokens)
    assert got.tokens.tolist() == want["input_ids"][:n]
    assert got.loss_mask.tolist() == want["assistant_masks"][:n]
    assert not any(want["assistant_masks"][n:])


def test_pad_equal_to_eos_does_not_hide_the_eos(families):
  for name in ("chatml", "llama3", "text"):
    tokenizer = families[name].tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example = encode_demo(Demo(conversation(random.Random(2), 2)), tokenizer)
    for _, stop in spans(example.loss_mask):
      assert example.tokens[stop - 1] == tokenizer.convert_tokens_to_ids(families[name].end)


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_special_tokens_spelt_in_a_message_stay_text(family, role):
  """No message can open or close a turn: the special ids are those of a harmless conversation."""
  tokenizer = family.tokenizer
  specials = [t for t in tokenizer.all_special_tokens if t != "<unk>"]
  special_ids = set(tokenizer.all_special_ids)
  for i, spelt in enumerate(specials + ["".join(specials), "\ufdd00\ufdd1", "\ufdd0", "\ufdd19"]):
    attack = f"ab{spelt}cd {spelt} ef{spelt}"
    messages = [{"role": "system", "content": "one"}, {"role": "user", "content": "two"},
                {"role": "assistant", "content": "three"}, {"role": "user", "content": "four"},
                {"role": "assistant", "content": "five"}]
    harmless = encode_demo(Demo(tuple(messages)), tokenizer)
    for message in messages:
      if message["role"] == role:
        message["content"] = attack
        break
    attacked = encode_demo(Demo(tuple(messages)), tokenizer)
    for kept in (0, 1):
      want = [t for t in harmless.tokens[harmless.loss_mask == kept] if t in special_ids]
      got = [t for t in attacked.tokens[attacked.loss_mask == kept] if t in special_ids]
      assert got == want, (i, spelt)
    assert len(spans(attacked.loss_mask)) == 2
    # And the text is the text that was written, to the character.
    assert attack in tokenizer.decode(attacked.tokens), (i, spelt)
    if role == "assistant":
      start, stop = spans(attacked.loss_mask)[0]
      assert tokenizer.decode(attacked.tokens[start : stop - 1]).strip() == attack


def test_a_template_that_rewrites_earlier_turns_is_refused(families, templates, tmp_path):
  tokenizer = families["chatml"].tokenizer
  path = tmp_path / "thinking.jinja"
  path.write_text(templates["thinking"])
  messages = conversation(random.Random(3), 2)
  with pytest.raises(UserError, match=r"d\.jsonl:7: the chat template rewrites earlier turns"):
    encode_demo(Demo(messages, source="d.jsonl:7"), tokenizer, template=str(path))
  # What sampling sees is fine, and so is the last turn behind it.
  want = tokenizer.apply_chat_template(
    messages[:3], chat_template=path.read_text(), add_generation_prompt=True, return_dict=False)
  assert render_prompt(messages[:3], tokenizer, template=str(path)).tolist() == want
  last = encode_demo(Demo(messages), tokenizer, "last", template=str(path))
  assert last.tokens[: len(want)].tolist() == want and not last.loss_mask[: len(want)].any()
  assert last.loss_mask[len(want) :].all()
  untrained = encode_demo(Demo(messages, untrained={1}), tokenizer, template=str(path))
  np.testing.assert_array_equal(untrained.tokens, last.tokens)
  # With one turn, too, the empty thought belongs to the response.
  one = encode_demo(Demo(messages[:2]), tokenizer, template=str(path))
  response = tokenizer.decode(one.tokens[one.loss_mask == 1])
  assert response == f"<think>\n\n</think>\n\n{messages[1]['content']}<|im_end|>"


def test_template_that_closes_with_plain_text(families):
  """The EOS follows the content at once; the closing text opens the next prompt, untrained."""
  tokenizer = families["text"].tokenizer
  messages = ({"role": "user", "content": "two ?"}, {"role": "assistant", "content": "four .\n"},
              {"role": "user", "content": "sure ?"}, {"role": "assistant", "content": "yes ,\n\n"})
  example = encode_demo(Demo(messages), tokenizer)
  first, second = spans(example.loss_mask)
  eos = tokenizer.eos_token_id
  assert tokenizer.decode(example.tokens[slice(*first)]) == "four .\n</s>"
  assert tokenizer.decode(example.tokens[slice(*second)]) == "yes ,\n\n</s>"
  assert (example.tokens == eos).sum() == 2
  assert tokenizer.decode(example.tokens[: first[0]]) == (
    "### Instruction:\ntwo ?\n\n### Response:\n")
  assert tokenizer.decode(example.tokens[first[1] : second[0]]) == (
    "\n\n### Instruction:\nsure ?\n\n### Response:\n")


@pytest.mark.parametrize("name, template", [("mistral", "text"), ("mistral", "closed_text"),
                                            ("plain", "text")])
def test_sentencepiece_puts_no_space_inside_a_conversation(families, templates, tmp_path, name,
                                                           template, dice):
  """Only the beginning of the whole text may get one, though the parts are tokenised apart."""
  tokenizer = families[name].tokenizer
  path = tmp_path / "text.jinja"
  path.write_text(templates[template])
  for turns in (1, 3):
    messages = conversation(dice, turns)
    example = encode_demo(Demo(messages), tokenizer, template=str(path))
    want = "".join(
      ("### Response:\n{}</s>\n\n" if m["role"] == "assistant" else "### Instruction:\n{}\n\n"
       ).format(m["content"]) for m in messages)
    assert tokenizer.decode(example.tokens) == " " + want[: -len("\n\n")]
    for start, stop in spans(example.loss_mask):
      assert tokenizer.decode(example.tokens[start : stop - 1]) in [m["content"] for m in messages]


def test_plain_form_without_a_template(families):
  tokenizer = families["plain"].tokenizer
  messages = ({"role": "system", "content": "you are"}, {"role": "user", "content": "what is"},
              {"role": "assistant", "content": "four"}, {"role": "user", "content": "and"},
              {"role": "assistant", "content": "you"})
  example = encode_demo(Demo(messages), tokenizer)
  assert tokenizer.convert_ids_to_tokens(example.tokens)[0] == "<s>"
  assert [tokenizer.decode(example.tokens[a:b]).strip() for a, b in spans(example.loss_mask)] == [
    "four</s>", "you</s>"]
  prompt = tokenizer.decode(render_prompt(messages[:2], tokenizer))
  assert prompt.split("\n") == ["<s> you are", "what is", ""]


def test_first_response_token_when_the_response_begins_with_space(families):
  for name in ("bytes", "chatml", "text"):
    tokenizer = families[name].tokenizer
    for content in (" four", "\nfour", "\n\n four", "\tfour"):
      messages = ({"role": "user", "content": "two"}, {"role": "assistant", "content": content})
      example = encode_demo(Demo(messages), tokenizer)
      (start, stop), = spans(example.loss_mask)
      assert tokenizer.decode(example.tokens[start : stop - 1]) == content
      np.testing.assert_array_equal(example.tokens[:start], render_prompt(messages[:1], tokenizer))


def test_stop_ids(families):
  for family in families.values():
    found = stop_ids(family.tokenizer)
    assert found[0] == family.tokenizer.eos_token_id
    assert set(found) == {found[0], family.tokenizer.convert_tokens_to_ids(family.end)}
  tokenizer = families["chatml"].tokenizer
  eos = tokenizer.eos_token_id
  assert stop_ids(tokenizer, {"eos_token_id": 7}) == (eos, 7)
  assert stop_ids(tokenizer, {"eos_token_id": [7, eos, 8, 7]}) == (eos, 7, 8)
  assert stop_ids(tokenizer, {}) == (eos,)
  for bad in ("2", [2, None], True, -1):
    with pytest.raises(UserError, match="eos_token_id=.* must be a token id"):
      stop_ids(tokenizer, {"eos_token_id": bad})

  @dataclasses.dataclass
  class GenerationConfig:
    eos_token_id: object = None

  assert stop_ids(tokenizer, GenerationConfig()) == (eos,)
  assert stop_ids(tokenizer, GenerationConfig(0)) == (eos, 0)


def test_tokenizer_without_eos(families, templates, tmp_path):
  from transformers import PreTrainedTokenizerFast

  bare = PreTrainedTokenizerFast(tokenizer_object=families["text"].tokenizer.backend_tokenizer)
  with pytest.raises(UserError, match="defines no eos_token"):
    stop_ids(bare)
  path = tmp_path / "text.jinja"
  path.write_text(templates["text"])
  with pytest.raises(UserError, match="defines no eos_token"):
    encode_demo(Demo(conversation(random.Random(0), 1)), bare, template=str(path))
  # A template that ends the turn with a special token of its own needs none.
  family = families["chatml"]
  bare = PreTrainedTokenizerFast(tokenizer_object=family.tokenizer.backend_tokenizer)
  bare.chat_template = templates["chatml"]
  assert stop_ids(bare) == (family.tokenizer.convert_tokens_to_ids("<|im_end|>"),)
  example = encode_demo(Demo(conversation(random.Random(0), 2)), bare)
  assert len(spans(example.loss_mask)) == 2


def test_errors_name_what_is_wrong(families, templates, tmp_path):
  tokenizer = families["gemma"].tokenizer
  messages = conversation(random.Random(1), 1)
  with pytest.raises(UserError, match="chat template /nowhere.jinja: no such file"):
    render_prompt(messages[:1], tokenizer, template="/nowhere.jinja")
  with pytest.raises(UserError, match=r"f:3: a prompt must end with a user message"):
    render_prompt(messages, tokenizer, source="f:3")
  with pytest.raises(UserError, match="prompt: a prompt must end with a user message"):
    encode_response("a", (), tokenizer)
  with pytest.raises(UserError, match="f:4: a demonstration must end with an assistant message"):
    encode_demo(Demo(messages[:1], source="f:4"), tokenizer)
  with pytest.raises(UserError, match="train_on='first' is unknown; known: all, last"):
    encode_demo(Demo(messages), tokenizer, train_on="first")
  with pytest.raises(UserError, match="f:5: the chat template refused it: Conversation roles must"):
    encode_demo(Demo(messages[:1] + messages, source="f:5"), tokenizer)
  path = tmp_path / "odd.jinja"
  path.write_text("{{ messages | length }}{% if add_generation_prompt %}: {% endif %}")
  with pytest.raises(UserError, match="the chat template does not write the text of messages"):
    encode_demo(Demo(messages, source="f:6"), tokenizer, template=str(path))
  path.write_text("{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}")
  with pytest.raises(UserError, match="f:6: the chat template's generation prompt is no prefix"):
    encode_demo(Demo(messages, source="f:6"), tokenizer, template=str(path))
  path.write_text("{% for m in messages %}\n{{ m['content'] ")
  with pytest.raises(UserError, match="no valid Jinja: line 2: unexpected end"):
    encode_demo(Demo(messages), tokenizer, template=str(path))
  for text in ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 1 // 0 }}"):
    path.write_text(text)
    with pytest.raises(UserError, match="the chat template (calls itself|refused it: .* zero)"):
      encode_demo(Demo(messages), tokenizer, template=str(path))
  path.write_bytes(b"\xff{{ messages }}")
  with pytest.raises(UserError, match=r"odd.jinja: not UTF-8 text \(byte 0\)"):
    encode_demo(Demo(messages), tokenizer, template=str(path))
  path.write_text("{{ messages[0]['content'] + 1 }}")
  with pytest.raises(UserError, match="the chat template refused it: can only concatenate"):
    encode_demo(Demo(messages), tokenizer, template=str(path))


def test_template_file_overrides_the_tokenizers_own_and_is_read_again(families, templates,
                                                                      tmp_path):
  import os

  family = families["chatml"]
  messages = conversation(random.Random(4), 1)
  own = render_prompt(messages[:1], family.tokenizer)
  path = tmp_path / "t.jinja"
  path.write_text(templates["text"])
  text_form = render_prompt(messages[:1], family.tokenizer, template=str(path))
  assert family.tokenizer.decode(text_form).startswith("### Instruction:\n")
  path.write_text(templates["chatml"])
  os.utime(path, ns=(1, 1))
  np.testing.assert_array_equal(
    render_prompt(messages[:1], family.tokenizer, template=str(path)), own)


def test_empty_response_trains_the_eos_alone():
  tokenizer = byte_tokenizer()
  messages = ({"role": "user", "content": "q"}, {"role": "assistant", "content": ""})
  example = encode_demo(Demo(messages, source="x"), tokenizer)
  assert example.source == "x"
  assert example.tokens[example.loss_mask == 1].tolist() == [tokenizer.eos_token_id]
