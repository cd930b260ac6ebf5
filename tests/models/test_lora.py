"""Adapters start as the identity, merge exactly and compute the same as in PEFT."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpr_jax import sharding
from dpr_jax.data.batches import SFTBatch
from dpr_jax.losses import make_sft_loss
from dpr_jax.models import ModelConfig, Transformer
from dpr_jax.models.lora import LoRA, merge, split_trainable
from dpr_jax.models.variables import random_adapter, random_variables
from dpr_jax.training import TrainState, make_train_step

PLAIN = ModelConfig(
    vocab_size=31, hidden_size=16, mlp_size=24, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=4, qkv_bias=True, tied_head=False, layer_pattern=("local", "global"), window=3,
)
CFG = dataclasses.replace(PLAIN, lora=LoRA(rank=3, alpha=6.0))


@pytest.fixture
def mesh():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    yield mesh


@pytest.fixture
def tokens(rng):
  return jnp.asarray(rng.integers(0, 31, (2, 7)))


def disturbed(variables, rng):
  noise = lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype)
  return {**variables, "lora": jax.tree.map(noise, variables["lora"])}


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, variables, tokens, rngs=None):
  model = Transformer(cfg)
  hidden, _ = model.apply(variables, tokens, rngs=rngs)
  return model.apply(variables, hidden, method="unembed")


def test_a_fresh_adapter_is_the_identity(mesh, tokens):
  variables = random_variables(CFG, mesh, jax.random.key(0))
  base = {"params": variables["params"]}
  np.testing.assert_array_equal(logits(CFG, variables, tokens), logits(CFG, base, tokens))
  # The base under an adapter is the base without one, bit for bit.
  alone = random_variables(PLAIN, mesh, jax.random.key(0))
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), base, alone))
  assert "lora" not in alone


def test_merged_weights_compute_the_same(mesh, tokens, rng):
  variables = disturbed(random_variables(CFG, mesh, jax.random.key(0)), rng)
  with_adapter = logits(CFG, variables, tokens)
  merged = logits(PLAIN, merge(variables, CFG.lora), tokens)
  np.testing.assert_allclose(with_adapter, merged, atol=2e-5)
  assert np.abs(merged - logits(PLAIN, {"params": variables["params"]}, tokens)).max() > 0.1


def test_only_the_named_projections_have_one(mesh):
  cfg = dataclasses.replace(PLAIN, lora=LoRA(rank=2, targets=("query", "down")))
  lora = random_adapter(cfg, mesh, jax.random.key(0))
  layer = lora["group_0"]["layer_0"]
  assert set(layer["attention"]) == {"query"} and set(layer["mlp"]) == {"down"}
  assert layer["attention"]["query"]["a"].shape == (1, 16, 2)
  assert layer["mlp"]["down"]["b"].shape == (1, 2, 16)
  with pytest.raises(ValueError, match="q_proj"):
    LoRA(rank=2, targets=("q_proj",))


def test_training_moves_the_adapter_and_nothing_else(mesh, tokens):
  model = Transformer(CFG)
  trainable, frozen = split_trainable(random_variables(CFG, mesh, jax.random.key(0)))
  before = jax.tree.map(np.asarray, (trainable, frozen))
  optimizer = optax.adam(1e-2)
  state = TrainState.create(trainable, optimizer, jax.random.key(1), frozen)
  step = make_train_step(make_sft_loss(model), optimizer)
  batch = SFTBatch(tokens, jnp.ones_like(tokens), jnp.ones(tokens.shape, jnp.float32))
  losses = []
  for _ in range(5):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0]
  same = lambda a, b: np.array_equal(a, b)
  assert jax.tree.all(jax.tree.map(same, before[1], state.frozen))
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before[0], state.trainable)
  assert jax.tree.all(moved)


def test_dropout_needs_a_key_and_changes_only_the_adapter(mesh, tokens, rng):
  cfg = dataclasses.replace(CFG, lora=dataclasses.replace(CFG.lora, dropout=0.5))
  variables = disturbed(random_variables(cfg, mesh, jax.random.key(0)), rng)
  run = lambda cfg, variables, seed: logits(
      cfg, variables, tokens, None if seed is None else {"dropout": jax.random.key(seed)}
  )
  np.testing.assert_array_equal(run(cfg, variables, None), run(CFG, variables, None))
  assert np.abs(run(cfg, variables, 1) - run(cfg, variables, 2)).max() > 1e-3
  base = {"params": variables["params"]}
  np.testing.assert_array_equal(run(cfg, base, 1), run(cfg, base, None))


def test_peft_computes_the_same(mesh, tokens, rng, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  peft = pytest.importorskip("peft")
  from dpr_jax.weights import load_pretrained, save_pretrained
  from dpr_jax.weights.peft import save_adapter

  plain = dataclasses.replace(PLAIN, layer_pattern=("global",), window=0)
  cfg = dataclasses.replace(plain, lora=CFG.lora)
  variables = disturbed(random_variables(cfg, mesh, jax.random.key(0)), rng)
  save_pretrained(tmp_path / "base", plain, variables["params"])
  save_adapter(tmp_path / "adapter", cfg, variables["lora"], base="base")
  base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
  model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
  with torch.no_grad():
    expected = model(torch.from_numpy(np.array(tokens))).logits.numpy()
  np.testing.assert_allclose(logits(cfg, variables, tokens), expected, atol=1e-4)
  # The folder of the adapter is a model too: its base, named by a path beside it, merged with it.
  for base in ("../base", str(tmp_path / "base")):
    save_adapter(tmp_path / "adapter", cfg, variables["lora"], base=base)
    read, params = load_pretrained(tmp_path / "adapter")
    np.testing.assert_allclose(logits(read, {"params": params}, tokens), expected, atol=1e-4)
