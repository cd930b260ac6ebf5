"""Adapters of PEFT: read into their base, or refused by the name of what is not implemented."""

import json
import shutil

import numpy as np
import pytest

from dpr_jax.errors import UserError
from dpr_jax.models import ModelConfig
from dpr_jax.models.lora import LoRA, merge
from dpr_jax.models.variables import random_variables
from dpr_jax.sharding import make_mesh
from dpr_jax.weights import (
  load_config,
  load_generation_config,
  load_pretrained,
  load_tokenizer,
  save_pretrained,
)
from dpr_jax.weights.byte_tokenizer import byte_tokenizer
from dpr_jax.weights.names import flatten
from dpr_jax.weights.peft import save_adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A folder with "base" and its "adapter", and the parameters with the adapter merged in."""
  import dataclasses

  import jax

  plain = ModelConfig(vocab_size=261, hidden_size=8, mlp_size=12, num_layers=2, num_heads=2,
                      num_kv_heads=1, head_dim=4, max_length=64)
  cfg = dataclasses.replace(plain, lora=LoRA(rank=2, alpha=3.0))
  variables = random_variables(cfg, make_mesh(), jax.random.key(0))
  rng = np.random.default_rng(0)
  variables["lora"] = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), variables["lora"])
  folder = tmp_path_factory.mktemp("peft")
  save_pretrained(folder / "base", plain, variables["params"], byte_tokenizer())
  save_adapter(folder / "adapter", cfg, variables["lora"], base=str(folder / "base"))
  return folder, merge(variables, cfg.lora)["params"]


def test_the_adapter_is_merged_into_its_base(made):
  folder, merged = made
  cfg, params = load_pretrained(folder / "adapter")
  assert cfg == load_config(folder / "adapter") == load_config(folder / "base")
  got, want = flatten(params), flatten(merged)
  assert got.keys() == want.keys()
  for path in got:
    np.testing.assert_allclose(got[path], want[path], atol=1e-6, err_msg=str(path))
  # Without a tokenizer of its own, it has that of the base.
  assert len(load_tokenizer(folder / "adapter")) == 261
  assert load_generation_config(folder / "adapter") == load_generation_config(folder / "base")


def _change(**fields):
  def change(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
  return change


def _beside_a_model(folder):
  shutil.copy(folder / ".." / "base" / "model.safetensors", folder)


def _wider_tokenizer(folder):
  tokenizer = byte_tokenizer()
  tokenizer.add_tokens(["<more>"])
  tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("change, pattern", [
  (_change(peft_type="IA3"), "peft_type='IA3' is not implemented; known: LORA"),
  (_change(use_dora=True), "use_dora=True is not implemented"),
  (_change(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\] is not implemented"),
  (_change(rank_pattern={"q_proj": 4}), "rank_pattern=.* is not implemented"),
  (_change(bias="all"), "bias='all' is not implemented"),
  (_change(init_lora_weights="pissa"), "init_lora_weights='pissa' is not implemented"),
  (_change(r=3), r"tensor '.*lora_A.weight' has shape \[2, 8\], but .* need \[3, 8\]"),
  (_change(base_model_name_or_path="org/model"), "base_model_name_or_path='org/model' is no model"),
  (_change(base_model_name_or_path=""), "base_model_name_or_path='' is no model"),
  (lambda folder: (folder / "adapter_model.safetensors").unlink(), "only adapters in safetensors"),
  (_beside_a_model, "holds a model and a PEFT adapter"),
])
def test_what_is_not_implemented_is_refused(made, tmp_path, change, pattern):
  shutil.copytree(made[0], tmp_path / "copy")
  change(tmp_path / "copy" / "adapter")
  with pytest.raises(UserError, match=pattern):
    load_pretrained(tmp_path / "copy" / "adapter")


def test_a_tokenizer_of_the_adapter_must_fit_the_base(made, tmp_path):
  shutil.copytree(made[0], tmp_path / "copy")
  _wider_tokenizer(tmp_path / "copy" / "adapter")
  with pytest.raises(UserError, match="token '<more>' has id 261, but .* only 261 rows"):
    load_tokenizer(tmp_path / "copy" / "adapter")
  _change(use_rslora=True, lora_alpha=3.0 / 2**0.5)(tmp_path / "copy" / "adapter")
  got = flatten(load_pretrained(tmp_path / "copy" / "adapter")[1])
  for path, want in flatten(made[1]).items():  # alpha over the root of the rank: the same scale.
    np.testing.assert_allclose(got[path], want, atol=1e-6)
