"""What a run is set up with: the model of its config, and the checks of its input."""

import dataclasses

import jax
import pytest

from dpr_jax import config as config_lib
from dpr_jax import sharding
from dpr_jax.errors import UserError
from dpr_jax.methods.continued_sft import ContinuedSFT
from dpr_jax.methods.spin import SPIN
from dpr_jax.run import build_model, check_mesh, describe, set_up
from dpr_jax.workdir import Workdir


def _config(**model):
  config = config_lib.default_config()
  config.model.update(model)
  return config_lib.resolve(config)


def test_how_it_is_computed_is_taken_from_the_section():
  run = _config(attention="splash", remat="dots", dtype="bfloat16", logits_budget=2.0)
  _, model, _, _ = build_model(run)
  cfg = model.cfg
  assert (cfg.attention, cfg.remat, cfg.dtype) == ("splash", "dots", "bfloat16")
  assert cfg.logits_budget == 2.0
  assert dataclasses.replace(
      cfg, attention="auto", remat="full", dtype="float32", vocab_size=0, logits_budget=0.25
  ) == run.model.shape


def test_a_kernel_of_another_platform_is_refused_before_anything_is_written():
  with pytest.raises(UserError, match="config.model: .*attention=cudnn needs a GPU"):
    build_model(_config(attention="cudnn", dtype="bfloat16"))


def test_the_longest_response_of_any_method_must_fit_the_model():
  config = config_lib.debug_config(config_lib.default_config())
  config.methods.mine = ContinuedSFT(max_new_tokens=250)
  config.compare = ("mine",)
  with pytest.raises(UserError, match=r"\+ max_new_tokens=282 exceeds the 256 tokens"):
    build_model(config_lib.resolve(config))
  config.compare = ("dpr",)
  build_model(config_lib.resolve(config))


def test_every_batch_must_split_over_the_mesh():
  config = config_lib.debug_config(config_lib.default_config())
  config.methods.mine, config.methods.pairs = ContinuedSFT(batch_size=6), SPIN(batch_size=4)
  mesh = jax.sharding.AbstractMesh((4, 1, 1), ("data", "fsdp", "tensor"))

  def refused(**changes):
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as caught:
      check_mesh(config_lib.resolve(config), mesh)
    return str(caught.value)

  assert refused(**{"sft.batch_size": 6}).startswith("config.sft: batch_size / accumulation=6")
  config.sft.batch_size = 8
  assert refused(**{"eval.batch_size": 2}).startswith("config.eval: batch_size=2")
  config.eval.batch_size = 8
  assert refused(compare=("mine",)).startswith("config.methods.mine: batch_size / accumulation=6")
  assert refused(compare=("pairs",)).startswith("config.methods.pairs: batch_size / accumulation")
  assert refused(**{"compare": ("dpr",), "methods.dpr.samples_per_prompt": 8}).startswith(
      "config.methods.dpr: batch_size / samples_per_prompt=2"
  )
  assert refused(**{"methods.dpr.samples_per_prompt": 1, "methods.dpr.slots": 2}).startswith(
      "config.methods.dpr: slots=2"
  )


@pytest.mark.parametrize("name", ["samples", "report", "tokenizer", "a-b", "1st", "a b"])
def test_a_method_whose_name_cannot_be_a_folder_is_refused(name, tmp_path):
  config = config_lib.debug_config(config_lib.default_config())
  config.methods[name] = ContinuedSFT()
  config.compare = (name,)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with pytest.raises(UserError, match=f"^config.methods.{name}: the name of a method"):
    set_up(config_lib.resolve(config), Workdir(tmp_path / "w"), mesh)
  assert not (tmp_path / "w").exists()


def test_what_is_said_of_the_methods():
  config = config_lib.default_config()
  config.methods.mine = SPIN(label="Mine", steps=3)
  config.compare = ("low_temperature", "reward_to_go", "dpr", "mine")
  found = describe(config_lib.resolve(config))
  assert found["labels"] == {
      "low_temperature": "SFT, low temperature", "reward_to_go": "DPR, reward-to-go", "dpr": "DPR",
      "mine": "Mine",
  }
  # Those that learn from the reward, and what the run is about.
  assert found["subjects"] == ["reward_to_go", "dpr", "mine"]
  assert found["own_budget"] == {"mine": "steps 3"} and found["reference"] == "ref at 50% of SFT"
