"""Rows of the methods that train on demonstrations, some of which were cut off."""

import json
import types

import numpy as np

from dpr_jax.config import debug_config, default_config, resolve
from dpr_jax.data.dataset import build_dataset
from dpr_jax.methods.on_demos import unpacked_rows
from dpr_jax.weights.byte_tokenizer import byte_tokenizer


def test_a_response_that_ran_out_of_tokens_teaches_no_end(rng, tmp_path):
  """Neither in SFT's rows nor in those of other methods, and none is left out."""
  path = tmp_path / "demos.jsonl"
  words = [f"w{i}" for i in range(12)]
  ends = dict(zip(words, (rng.random(12) < 0.5).tolist() + [True, False]))
  with open(path, "w", encoding="utf-8") as file:
    for word, end in ends.items():
      record = {"prompt": f"say {word}", "response": word, "hit_eos": end}
      file.write(json.dumps(record) + "\n")
  config = debug_config(default_config())
  config.data.demos, config.data.holdout, config.eval.num_prompts = str(path), 2, 2
  config, tokenizer = resolve(config), byte_tokenizer()
  data = build_dataset(config.data, tokenizer, seed=0)
  assert data.summary["cut_off"] == sum(not end for end in ends.values())
  trained = [d.response for d in data.prompts.demos]
  stop = tokenizer.eos_token_id
  stops = lambda rows: int(((rows.tokens == stop) & (rows.loss_mask > 0)).sum())
  assert stops(data.rows) == sum(ends[word] for word in trained)
  assert data.rows.n_examples == len(trained) == 10 and not data.rows.dropped_untrained
  run = types.SimpleNamespace(config=config, data=data, tokenizer=tokenizer)
  rows = unpacked_rows(run, config.budget.max_new_tokens)
  assert len(rows) == len(trained)
  for tokens, mask, word in zip(rows.tokens, rows.loss_mask, trained):
    expected = tokenizer.encode(word, add_special_tokens=False) + [stop] * ends[word]
    np.testing.assert_array_equal(tokens[mask > 0], expected)
