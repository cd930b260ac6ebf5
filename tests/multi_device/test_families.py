"""Every family loads shard by shard on eight devices and computes the same as on one."""

import json
import pathlib

import pytest


def compare(folder: str, names: list, gradients_of: str) -> dict:
  """Largest differences between one device and eight, per family."""
  import tempfile

  import flax.linen as nn
  import jax
  import jax.numpy as jnp
  import numpy as np

  from dpr_jax.models import Transformer, token_logprobs
  from dpr_jax.sharding import make_mesh, shardings_of
  from dpr_jax.weights import load_pretrained, placement, save_pretrained
  from dpr_jax.weights.hf_config import from_hf
  from dpr_jax.weights.names import abstract_params

  small = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, head_dim=8,
  )
  families = {
    "llama": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 9},
  }
  rng = np.random.default_rng(0)
  placement.BLOCK_BYTES = 4 * 32 * 40  # Blocks of 40 rows cross the boundaries of shards of 48.
  tokens = jnp.asarray(rng.integers(0, 96, (8, 20)), jnp.int32)
  segments = jnp.asarray(np.arange(20)[None] >= rng.integers(0, 8, (8, 1)), jnp.int32)

  def logits(cfg, params):
    hidden, _ = Transformer(cfg).apply({"params": params}, tokens, None, segments)
    return Transformer(cfg).apply({"params": params}, hidden, method="unembed")

  def loss(params, cfg):
    out = token_logprobs(Transformer(cfg), {"params": params}, tokens, segments)
    return jnp.mean(out.logp)

  logits_fn = jax.jit(logits, static_argnums=0)
  grad_fn = jax.jit(jax.grad(loss), static_argnums=1)
  report = {}
  for name in names:
    cfg = from_hf(small | {"model_type": name} | families[name])
    shapes = nn.unbox(abstract_params(cfg))
    sample = lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), jnp.float32)
    path = pathlib.Path(folder) / name
    save_pretrained(path, cfg, jax.tree.map(sample, shapes))
    _, one = load_pretrained(path)
    want = np.asarray(logits_fn(cfg, one))
    assert len(jax.tree.leaves(one)[0].sharding.device_set) == 1
    worst = {"logits": 0.0, "gradients": 0.0, "scale": float(np.std(want))}
    for shape in ((2, 2, 2), (1, 4, 2))[name != names[0] :]:
      mesh = make_mesh(*shape)
      if shape[0] == 2:
        _, many = load_pretrained(path, mesh=mesh)
      else:
        with jax.set_mesh(mesh):
          _, many = load_pretrained(path)  # onto the mesh that is set.
      wanted, split = shardings_of(abstract_params(cfg), mesh), 0
      for a, b, s in zip(*map(jax.tree.leaves, (one, many, wanted)), strict=True):
        assert b.sharding == s, (b.sharding, s)
        split += not s.is_fully_replicated
        for shard in b.addressable_shards:
          np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(a)[shard.index])
      assert split >= 8
    with jax.set_mesh(mesh):
      got = np.asarray(logits_fn(cfg, many))
    worst["logits"] = float(np.abs(got - want).max())
    if name == gradients_of:
      want_grads = jax.device_get(grad_fn(one, cfg))
      with jax.set_mesh(mesh):
        grads = jax.device_get(grad_fn(many, cfg))
      for a, b in zip(*map(jax.tree.leaves, (want_grads, grads)), strict=True):
        error = float(np.abs(a - b).max() / np.abs(a).max())
        worst["gradients"] = max(worst["gradients"], error)
    # The export of sharded parameters is the same file.
    with tempfile.TemporaryDirectory() as out:
      save_pretrained(out, cfg, many, family=name)
      same = [(pathlib.Path(d) / "model.safetensors").read_bytes() for d in (out, path)]
      worst["same_file"] = same[0] == same[1]
    report[name] = worst
  return report


# These two families together have every kind of parameter; the others are slow tests.
@pytest.mark.parametrize(
  "names, gradients_of",
  [
    pytest.param(["qwen2", "gemma3_text"], "", id="fast"),
    pytest.param(
      ["llama", "mistral", "qwen3", "gemma3_text"], "gemma3_text", id="rest", marks=pytest.mark.slow
    ),
  ],
)
def test_a_family_is_the_same_on_eight_devices(run_on_devices, tmp_path, names, gradients_of):
  report = run_on_devices(compare, str(tmp_path), names, gradients_of).result
  print(json.dumps(report, indent=2))
  assert list(report) == names
  for name, worst in report.items():
    assert worst["scale"] > 0.3, name
    assert worst["logits"] < 2e-5, name
    assert worst["gradients"] < 1e-5, name
    assert (worst["gradients"] > 0) == (name == gradients_of)
    assert worst["same_file"], name
