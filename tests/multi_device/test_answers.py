"""Sampled responses of an evaluation on meshes of 8 devices: those of one device."""


def respond_on(shapes):
  """Tokens of 2 samples of each of 11 prompts on each mesh; logits are equal, so that no rounding
  decides what is sampled.
  """
  import flax.linen as nn
  import jax
  import numpy as np

  from dpr_jax import sharding
  from dpr_jax.evaluation.responses import Responder
  from dpr_jax.models import ModelConfig, Transformer, init_variables

  cfg = ModelConfig(vocab_size=32, hidden_size=8, mlp_size=8, num_layers=1, num_heads=2,
                    num_kv_heads=2, head_dim=8, max_length=64)
  shapes_of = nn.unbox(jax.eval_shape(lambda k: init_variables(cfg, k), jax.random.key(0)))
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes_of)
  prompts = [np.arange(2, 3 + i % 7, dtype=np.int32) for i in range(11)]
  runs = []
  for shape, rows in shapes:
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
      responder = Responder(Transformer(cfg), mesh, rows, 16, max_new_tokens=8, stop_ids=(0, 1))
      out = responder.respond((zeros,), prompts, jax.random.key(0), samples_per_prompt=2)
    runs.append([r.tokens.tolist() for r in out])
  return runs


def test_the_mesh_does_not_decide_what_is_sampled(run_on_devices):
  shapes = [((1, 1, 1), 4), ((2, 4, 1), 8), ((2, 2, 2), 16)]
  one, *others = run_on_devices(respond_on, shapes).result
  assert len({str(tokens) for tokens in one}) == len(one)
  assert all(other == one for other in others)
