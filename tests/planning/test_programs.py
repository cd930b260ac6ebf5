"""What the lowered programs take, for configs that carry more than one reference."""

import jax
import pytest

from dpr_jax.config import default_config, resolve
from dpr_jax.planning import search
from dpr_jax.planning.programs import make_programs, planned_model, scored_models
from dpr_jax.planning.report import plan_mesh
from dpr_jax.planning.topologies import parse_topology
from dpr_jax.rewards import transforms
from dpr_jax.sharding import make_mesh
from dpr_jax.stages.steps import ema_decay, scoring_of


def _config(**fields):
  config = default_config()
  config.model.shape.update(dict(vocab_size=64, hidden_size=16, mlp_size=32, num_layers=1,
                                 num_heads=2, num_kv_heads=2, head_dim=8))
  config.model.dtype = "float32"
  config.sft.batch_size = config.dpr.batch_size = 4
  config.data.row_length, config.data.prompt_length, config.dpr.max_new_tokens = 16, 8, 4
  for name, value in fields.items():
    config.update_from_flattened_dict({name: value})
  return resolve(config)


def _programs(config):
  mesh = make_mesh(devices=jax.devices()[:1])
  programs = make_programs(config, planned_model(config), mesh)
  return mesh, programs


def _lowered(config, name):
  mesh, programs = _programs(config)
  with jax.set_mesh(mesh):
    return programs[name].lower()


def _shapes(tree):
  return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def test_the_state_of_a_moving_average_is_lowered_with_it():
  config = _config(**{"reference.kind": "ema", "reference.ema_decay": 0.9})
  assert ema_decay(config) == 0.9 and ema_decay(_config()) == 0
  (state, *_), _ = _lowered(config, "sft_step").args_info
  assert jax.tree.leaves(state.ema)
  assert _shapes(state.ema) == _shapes(state.trainable)
  # The average is computed, not only passed through: a multiplication more for each weight.
  text = lambda config: _lowered(config, "sft_step").as_text()
  count = lambda config: text(config).count("stablehlo.multiply")
  assert count(config) >= count(_config()) + len(jax.tree.leaves(state.ema))
  (plain, *_), _ = _lowered(_config(), "sft_step").args_info
  assert not jax.tree.leaves(plain.ema)


@pytest.mark.parametrize("kind", ["ensemble_logmeanexp", "ensemble_mean_logp"])
def test_every_member_of_an_ensemble_is_an_argument(kind):
  config = _config(**{"reference.kind": kind, "reference.fractions": (0.25, 0.5, 1.0)})
  _, programs = _programs(config)
  _, single = _programs(_config())
  (policy, sft, ref, *_), _ = _lowered(config, "rollout_step").args_info
  assert isinstance(ref, tuple) and len(ref) == 3
  assert all(_shapes(member) == _shapes(sft) for member in ref)
  # Beside the update lie sft and three members, where one reference has two sets of weights.
  resident = [p["reinforce_step"].resident_bytes for p in (programs, single)]
  assert resident[0] == 2 * resident[1] > 0
  assert scored_models(config) == 4 and scored_models(_config()) == 2


def test_what_transforms_look_at_is_computed():
  config = _config(**{"dpr.transforms": ("centre", "mask_unsure:2")})
  out = _lowered(config, "rollout_step").out_info
  for name in ("expected_rewards", "sft_entropy", "ref_entropy"):
    assert getattr(out, name).shape == (4, 4)
  plain = _lowered(_config(), "rollout_step").out_info
  assert plain.expected_rewards is None and plain.sft_entropy is None
  assert scored_models(config) == 3
  assert scoring_of(config, config.dpr) == {"expected": True, "entropies": True}
  assert scoring_of(_config(), _config().dpr) == {}
  transforms.parse(config.dpr.transforms)


def test_slots_take_memory_of_their_rows_alone():
  topology = parse_topology("v5e:1x1")

  def plan(slots):
    config = _config(**{"dpr.slots": slots, "dpr.batch_size": 256, "dpr.accumulation": 64,
                        "dpr.max_new_tokens": 64, "model.logits_budget": 0.001})
    return search.estimate(config, planned_model(config), topology, (1, 1, 1))

  few, many = plan(16), plan(0)
  assert few.peak_bytes < many.peak_bytes
  assert few.seconds > many.seconds  # 16 times the steps, each of which reads all weights.
  assert plan(256) == many


def test_a_plan_on_a_mesh_of_this_machine_names_the_attention_of_its_platform():
  """auto resolves by the mesh, which is one of CPUs here; and every key is there."""
  config = _config()
  planned = plan_mesh(config, planned_model(config), parse_topology("v5e:1x1"),
                      jax.devices()[:1], (1, 1, 1))
  assert planned_model(config).attention == "auto" and planned["attention"] == "xla"
  assert planned["fits"] and all(p["flops"] > 0 for p in planned["programs"].values())
  # Nothing of what a CPU logs can be told from silence.
  assert {p["involuntary_rematerializations"] for p in planned["programs"].values()} <= {None, 0}
