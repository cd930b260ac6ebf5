"""The verifier of a hybrid reward reads the response of each row against its own demonstration."""

import types

import jax
import numpy as np
import pytest

from dpr_jax import sharding
from dpr_jax.config import default_config, resolve, shrink
from dpr_jax.data.dataset import build_dataset
from dpr_jax.data.loader import prompt_batches
from dpr_jax.data.templates import encode_response
from dpr_jax.stages.dpr import _make_verify
from dpr_jax.weights.byte_tokenizer import byte_tokenizer


@pytest.mark.parametrize("samples_per_prompt", [1, 2])
def test_right_answers_score_one_whatever_the_step(rng, samples_per_prompt):
  config = shrink(default_config())
  config.data.tasks = ("add", "sort")
  config.dpr.samples_per_prompt = samples_per_prompt
  config = resolve(config)
  tokenizer = byte_tokenizer()
  data = build_dataset(config.data, tokenizer, seed=3)
  stop = tokenizer.eos_token_id
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  run = types.SimpleNamespace(
      config=config, data=data, tokenizer=tokenizer, stop_ids=(stop,), mesh=mesh
  )
  batches = prompt_batches(
      data.prompts.tokens, 8 // samples_per_prompt, config.data.prompt_length, 3
  )
  verify = _make_verify(run, batches)
  width, new = config.data.prompt_length, 24
  for step in rng.integers(0, 200, 3).tolist():
    tokens = np.zeros((8, width + new), np.int32)
    lengths, right = np.zeros(8, np.int32), rng.random(8) < 0.5
    for row in range(8):  # Samples of a prompt stand in adjacent rows.
      demo = data.prompts.demos[batches.item_indices(step)[row // samples_per_prompt]]
      response = encode_response(demo.response, demo.prompt, tokenizer)
      assert response[-1] == stop
      if not right[row]:
        response = np.asarray([*tokenizer.encode("?", add_special_tokens=False), stop])
      lengths[row] = len(response)
      tokens[row, width : width + len(response)] = response
      tokens[row, width + len(response) :] = 5  # garbage past the end.
    rollout = types.SimpleNamespace(
        tokens=tokens, lengths=lengths, hit_eos=np.ones(8, bool), mask=np.zeros((8, new))
    )
    with jax.set_mesh(mesh):
      np.testing.assert_array_equal(verify(step, rollout), right.astype(np.float32))
