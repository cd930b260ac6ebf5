"""Layer pruning of pretrained weights equals removing the same layers in transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax import sharding
from dpr_jax.config import ModelSection, debug_config, default_config, resolve
from dpr_jax.errors import UserError
from dpr_jax.loading import base_variables
from dpr_jax.models import ModelConfig
from dpr_jax.models.layer_pruning import kept_layers, pruned_config
from dpr_jax.planning.programs import planned_model
from dpr_jax.weights import load_config, save_pretrained


@pytest.mark.parametrize("num_layers", [2, 3, 7, 30, 31])
def test_kept_layers_are_spaced_evenly_from_the_first_to_the_last(num_layers):
  for keep in range(2, num_layers + 1):
    kept = kept_layers(num_layers, keep)
    assert len(set(kept)) == keep and kept[0] == 0 and kept[-1] == num_layers - 1
    gaps = np.diff(kept)
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
  assert kept_layers(num_layers, num_layers) == tuple(range(num_layers))


@pytest.mark.parametrize("case", ["smollm2", "mistral"])
def test_pruned_models_load_and_export_as_in_transformers(hf_model, logits_of, tmp_path, rng, case):
  torch = pytest.importorskip("torch")
  from transformers import AutoModelForCausalLM

  model = hf_model(case, seed=int(rng.integers(2**31)), num_hidden_layers=6)
  model.save_pretrained(tmp_path / "whole")
  cfg = pruned_config(load_config(tmp_path / "whole"), 3)
  section = ModelSection(pretrained=str(tmp_path / "whole"), keep_layers=3)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    params = base_variables(section, cfg, mesh, 0, "float32")["params"]
  x = torch.tensor(rng.integers(3, 96, (2, 20)))
  with torch.no_grad():
    whole = model(x).logits.numpy()
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in (0, 2, 5))
    theirs = model(x, use_cache=False).logits.numpy()
  ours = logits_of(cfg, params, jnp.asarray(x.numpy()))
  assert np.abs(whole - theirs).max() > 0.1
  np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)

  family = "mistral" if case == "mistral" else None
  save_pretrained(tmp_path / "out", cfg, params, family=family)
  again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
  assert again.config.num_hidden_layers == 3
  with torch.no_grad():
    np.testing.assert_allclose(again.eval()(x).logits.numpy(), ours, atol=1e-4, rtol=0)


def test_a_number_of_layers_that_cannot_be_kept_is_refused():
  deep = ModelConfig(num_layers=4)
  assert pruned_config(deep, 0) == deep
  assert pruned_config(deep, 4) == deep
  for keep in (1, 5):
    with pytest.raises(UserError, match=rf"^keep={keep} must be .* most 4"):
      pruned_config(deep, keep)
  mixed = dataclasses.replace(deep, layer_pattern=("local", "local", "global"), window=8)
  with pytest.raises(UserError, match="^keep=2 would break .*local, local, global"):
    pruned_config(mixed, 2)
  window = dataclasses.replace(deep, layer_pattern=("local",), window=8)
  assert pruned_config(window, 2) == dataclasses.replace(window, num_layers=2)


def test_a_plan_has_the_layers_that_are_kept():
  config = default_config()
  config.model.shape.vocab_size, config.model.shape.num_layers = 272, 8
  config.model.keep_layers = 3
  with pytest.raises(UserError, match="keep_layers=3 chooses among layers of config.model.pretr"):
    resolve(config)
  config.model.pretrained = "somewhere"
  assert planned_model(resolve(config)).num_layers == 3
  assert debug_config(config).model.keep_layers == 0
