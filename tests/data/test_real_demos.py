"""Real demonstrations through tokenising and packing; skipped where the files are not."""

import functools
import pathlib

import numpy as np
import pytest

from dpr_jax.data import encode_demo, encode_response, pack, read_demos, render_prompt

DATA = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"


@functools.cache
def _demos(path):
  return read_demos(path, on_empty="drop").demos


@pytest.mark.parametrize("name", [
  "lima/train_llamafactory.json", "gsm8k/train.jsonl", "dolly/dolly_3k_alpagasus.json",
  "instruction_1k/instruction-data.json", "alpaca/alpaca_data.json",
])
def test_real_demonstrations(name, family, rng):
  path = DATA / name
  if not path.is_file():
    pytest.skip(f"{name} is not here")
  demos = _demos(path)
  # The longest dialogues, and some others.
  chosen = sorted(demos, key=lambda d: -len(d.messages))[:5]
  chosen += [demos[i] for i in rng.permutation(len(demos))[:20]]
  tokenizer = family.tokenizer
  examples = [encode_demo(d, tokenizer) for d in chosen]
  end = tokenizer.convert_tokens_to_ids(family.end)
  for demo, example in zip(chosen, examples):
    assert (example.tokens == end)[example.loss_mask == 1].sum() == len(demo.messages) // 2
    assert example.tokens[-1] == end and example.loss_mask[-1] == 1
    prompt = render_prompt(demo.prompt, tokenizer)
    response = encode_response(demo.response, demo.prompt, tokenizer)
    np.testing.assert_array_equal(example.tokens, np.concatenate([prompt, response]))
    assert tokenizer.decode(response[:-1]).strip() == demo.response.strip(), demo.source
  rows = pack(examples, 512, overlong="truncate")
  assert rows.n_examples + rows.dropped_untrained == len(examples)
  assert (rows.segment_ids > 0).sum() == sum(
    min(len(e.tokens), 512) for e in examples if e.loss_mask[:512].any())
