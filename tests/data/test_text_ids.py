"""The text of each token, and of all."""

import pytest

from dpr_jax.data.templates import encode_response
from dpr_jax.data.text_ids import text_of_ids, token_texts

TEXT = "the answer is  four ! 💡é naïve 日本\n\n you"


def test_the_texts_of_tokens_join_to_the_text(family):
  ids = encode_response(TEXT, ({"role": "user", "content": "hi"},), family.tokenizer)
  texts = token_texts(ids, family.tokenizer)
  assert len(texts) == len(ids) and texts[-1] == family.end
  assert "".join(texts) == text_of_ids(ids, family.tokenizer)
  assert "".join(texts).strip().startswith(TEXT)
  assert not any("\ufffd" in text for text in texts)
  assert " answer" in "".join(texts[:12])


def test_words_keep_their_space(families):
  tokenizer = families["mistral"].tokenizer
  texts = token_texts(tokenizer.encode("the answer is four"), tokenizer)
  assert "".join(texts).endswith("the answer is four") and sum(" " in t for t in texts) >= 3


@pytest.mark.parametrize("name", ["bytes", "chatml"])
def test_a_split_character_stands_with_its_last_token(families, name):
  tokenizer = families[name].tokenizer
  ids = tokenizer.encode("a💡b", add_special_tokens=False)
  assert token_texts(ids, tokenizer) == ["a", "", "", "", "💡", "b"]
  # What is no character at all is shown where it can no longer become one.
  assert token_texts(ids[:3] + ids[-1:], tokenizer) == ["a", "", "\ufffd", "b"]
  end = families[name].tokenizer.eos_token_id
  assert token_texts([ids[1], end], tokenizer) == ["\ufffd", families[name].end]
  for cut in range(1, len(ids)):
    assert "".join(token_texts(ids[:cut], tokenizer)) == text_of_ids(ids[:cut], tokenizer)


def test_no_tokens(families):
  assert token_texts([], families["bytes"].tokenizer) == []
