"""Stop strings on meshes of 8 devices: the same responses as on one."""

import pytest

MESHES = ((1, 1, 1), (2, 2, 2), (1, 2, 4))


def respond_with_stops(shapes):
  """Tokens, lengths and ends of sampled responses on each mesh, plain and queued."""
  import flax.linen as nn
  import jax
  import numpy as np

  from dpr_jax import sharding
  from dpr_jax.data.batches import PromptBatch
  from dpr_jax.models import ModelConfig, Transformer, init_variables
  from dpr_jax.rollout import build_stop_strings, generate
  from dpr_jax.weights.byte_tokenizer import byte_tokenizer

  cfg = ModelConfig(vocab_size=264, hidden_size=32, mlp_size=64, num_layers=2, num_heads=4,
                    num_kv_heads=2, head_dim=8)
  model = Transformer(cfg)
  rng = np.random.default_rng(5)
  prompts = PromptBatch(tokens=rng.integers(0, 256, (8, 4)).astype(np.int32),
                        lengths=np.array([4, 1, 0, 3, 2, 4, 1, 3], np.int32))
  # Any of half of the characters, so that responses of random weights end early.
  strings = [chr(i) for i in range(0, 128, 2)]
  stops = build_stop_strings(byte_tokenizer(), cfg.vocab_size, strings)
  boxed = jax.eval_shape(lambda key: init_variables(cfg, key), jax.random.key(0))
  runs = []
  for shape in shapes:
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
      policy = jax.jit(lambda key: nn.unbox(init_variables(cfg, key)),
                       out_shardings=sharding.shardings_of(boxed, mesh))(jax.random.key(1))
      table = jax.device_put(stops, sharding.replicated(mesh))
      for slots in (0, 8):
        run = jax.jit(lambda policy, prompts, table, slots=slots: generate(
            model, (policy,), prompts, jax.random.key(7), max_new_tokens=6, stop_ids=(260,),
            samples_per_prompt=2, slots=slots, stop_strings=table))
        out = run(policy, sharding.place(prompts, mesh), table)
        found = [np.asarray(x).tolist() for x in (out.tokens, out.lengths, out.hit_eos)]
        rows = sharding.batch_sharding(mesh)
        runs.append(dict(found=found, by_rows=[
            x.sharding.is_equivalent_to(rows, x.ndim) for x in jax.tree.leaves(out) if x.ndim
        ]))
  return runs


@pytest.mark.slow
def test_meshes_and_queues_give_the_same_responses(run_on_devices):
  runs = run_on_devices(respond_with_stops, MESHES).result
  tokens, lengths, hit = runs[0]["found"]
  for run in runs:
    assert run["found"] == [tokens, lengths, hit]
    assert all(run["by_rows"])
  stopped = lambda token: token < 128 and token % 2 == 0 or token == 260
  for row, n, ended in zip(tokens, lengths, hit):
    response = row[4 : 4 + n]
    assert not any(stopped(token) for token in response[:-1])
    assert ended == (n > 0 and stopped(response[-1])) and (ended or n in (0, 6))
  assert len(set(lengths)) > 2
