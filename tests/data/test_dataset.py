"""The data section of a config -> what a run trains on."""

import json

import pytest

from dpr_jax.config.sections import DataSection
from dpr_jax.data.dataset import build_dataset
from dpr_jax.errors import UserError
from dpr_jax.weights.byte_tokenizer import byte_tokenizer


def test_the_section_says_what_is_carried_and_dropped(tmp_path):
  ask = lambda i: {"role": "user", "content": f"q{i}"}
  reply = lambda i, **fields: {"role": "assistant", "content": f"r{i}", **fields}
  records = [{"messages": [ask(i), reply(i)], "style": "plain"} for i in range(8)]
  records.append({"messages": [reply(8), ask(8), reply(9)]})  # Begins with the assistant.
  records.append({"messages": [ask(9), reply(9, weight=0)]})
  (tmp_path / "demos").mkdir()
  for i, half in enumerate((records[:5], records[5:])):
    (tmp_path / "demos" / f"{i}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in half))
  section = dict(demos=str(tmp_path / "demos"), holdout=2, row_length=32)
  tokenizer = byte_tokenizer()
  with pytest.raises(UserError, match=r"0\.jsonl:1: field 'style' is not known"):
    build_dataset(DataSection(**section), tokenizer, 0)
  with pytest.raises(UserError, match=r"1\.jsonl:4: roles out of order"):
    build_dataset(DataSection(**section, extra_fields=("style",)), tokenizer, 0)
  section |= dict(extra_fields=("style",), on_disorder="drop")
  data = build_dataset(DataSection(**section), tokenizer, 0)
  found = data.summary["demos"] + data.summary["heldout"]
  assert data.summary["dropped_disordered"] == 1 and found in (8, 9)
  # Nothing imitates the answer of weight 0: not SFT, nor a method on the prompts of demonstrations.
  assert data.summary["trained_tokens"] == 3 * data.summary["prompts"]
  assert not any(d.messages[0]["content"] == "q9"
                 for d in (*data.prompts.demos, *data.heldout.demos))
