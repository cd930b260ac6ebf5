"""What the lowered programs take, and what their work is estimated to cost."""

import sys

import jax
import pytest

from dpr_jax import plan
from dpr_jax.config import default_config, resolve
from dpr_jax.config.fields import package_defaults
from dpr_jax.config.files import set_kind
from dpr_jax.planning import flops, search, work
from dpr_jax.planning.programs import make_programs, planned_model, planned_works
from dpr_jax.planning.report import plan_mesh
from dpr_jax.planning.topologies import parse_topology
from dpr_jax.references.base import Reference
from dpr_jax.sharding import make_mesh

SMALL = {
    **{f"model.shape.{name}": n for name, n in dict(
        vocab_size=64, hidden_size=16, mlp_size=32, num_layers=1, num_heads=2, num_kv_heads=2,
        head_dim=8).items()},
    "model.dtype": "float32", "sft.batch_size": 4, "budget.batch_size": 4, "data.row_length": 16,
    "data.prompt_length": 8, "budget.max_new_tokens": 4,
}


def _config(compare=("dpr",), reference="midrun", **fields):
  config = default_config()
  set_kind(config, "reference", reference)
  config.update_from_flattened_dict({**SMALL, "compare": compare, **fields})
  return resolve(config)


def _programs(config):
  mesh = make_mesh(devices=jax.devices()[:1])
  return mesh, {p.name: p for p in make_programs(config, planned_model(config), mesh)}


def _lowered(config, name):
  mesh, programs = _programs(config)
  with jax.set_mesh(mesh):
    return programs[name].lower()


def _shapes(tree):
  return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def test_the_state_of_a_moving_average_is_lowered_with_it():
  config = _config(reference="ema", **{"reference.decay": 0.9})
  (state, *_), _ = _lowered(config, "sft/train_step").args_info
  assert jax.tree.leaves(state.ema)
  assert _shapes(state.ema) == _shapes(state.trainable)
  # The average is computed, not only passed through: a multiplication more for each weight.
  text = lambda config: _lowered(config, "sft/train_step").as_text()
  count = lambda config: text(config).count("stablehlo.multiply")
  assert count(config) >= count(_config()) + len(jax.tree.leaves(state.ema))
  (plain, *_), _ = _lowered(_config(), "sft/train_step").args_info
  assert not jax.tree.leaves(plain.ema)
  with_ema, without = (planned_works(c, planned_model(c))[0] for c in (config, _config()))
  assert with_ema.ema and not without.ema


@pytest.mark.parametrize("combine", ["logmeanexp", "mean_logp"])
def test_every_member_of_an_ensemble_is_an_argument(combine):
  config = _config(reference="ensemble", **{
      "reference.combine": combine, "reference.fractions": (0.25, 0.5, 1.0)})
  _, programs = _programs(config)
  _, single = _programs(_config())
  (policy, sft, ref, *_), _ = _lowered(config, "dpr/rollout_step").args_info
  assert isinstance(ref, Reference) and len(ref.members) == 3
  assert all(_shapes(member) == _shapes(sft) for member in ref.members)
  # Beside the update lie sft and three members, where one reference has two sets of weights.
  resident = [p["dpr/train_step"].resident_bytes for p in (programs, single)]
  assert resident[0] == 2 * resident[1] > 0
  works = [p["dpr/rollout_step"].work for p in (programs, single)]
  assert [(w.scored, w.held) for w in works] == [(4, 4), (2, 2)]


def test_what_transforms_look_at_is_computed():
  config = _config(**{"methods.dpr.transforms": ("center", "mask_unsure:2")})
  out = _lowered(config, "dpr/rollout_step").out_info
  for name in ("expected_rewards", "sft_entropy", "ref_entropy"):
    assert getattr(out, name).shape == (4, 4)
  plain = _lowered(_config(), "dpr/rollout_step").out_info
  assert plain.expected_rewards is None and plain.sft_entropy is None
  rollouts = _programs(config)[1]["dpr/rollout_step"].work
  assert (rollouts.scored, rollouts.held) == (3, 2)  # The policy scores, and is no model more.


def test_slots_take_memory_of_their_rows_alone():
  def estimate(slots):
    config = _config(**{"methods.dpr.slots": slots, "budget.batch_size": 256,
                        "budget.accumulation": 64, "budget.max_new_tokens": 64,
                        "model.logits_budget": 0.001})
    cfg = planned_model(config)
    return search.estimate(planned_works(config, cfg), cfg, parse_topology("v5e:1x1"), (1, 1, 1))

  few, many = estimate(16), estimate(0)
  assert few.peak_bytes < many.peak_bytes
  assert few.seconds > many.seconds  # 16 times the steps, each of which reads all weights.
  assert estimate(256) == many


def test_every_method_that_trains_has_programs():
  names = tuple(n for n, m in package_defaults("dpr_jax.methods").items() if m.trained)
  config = _config(names, **{"data.corrupt": 0.2,  # Else none of them is wrong.
                             "methods.cleaned_sft.rival_checkpoints": 2})
  _, programs = _programs(config)
  assert {p.stage for p in programs.values()} == {"sft", *names}
  for stage in ("sft", *names):
    own = [p for p in programs.values() if p.stage == stage]
    assert own[-1].tokens and not any(p.tokens for p in own[:-1])
    assert all(p.resident_bytes >= 0 for p in own)
  # A step of pairs samples for the updates of its own rows.
  pairs, update = programs["spin/make_pairs"].work, programs["spin/train_step"].work
  assert (2 * pairs.rows, pairs.prompt + pairs.new) == (update.rows, update.tokens) == (4, 12)
  (_, (demos, prompts), _), _ = _lowered(config, "spin/make_pairs").args_info
  assert demos.tokens.shape == (2, 12) and prompts.tokens.shape == (2, 8)


def test_a_method_names_the_batch_that_a_mesh_does_not_divide():
  config = _config(("spin", "dpr"), **{"budget.batch_size": 6, "sft.batch_size": 8})
  assert list(search.candidates(config, planned_model(config), 2)) == [(1, 1, 2)]
  config = _config(("spin", "dpr"), **{"methods.spin.batch_size": 8})
  assert (1, 2, 1) in search.candidates(config, planned_model(config), 2)


def test_a_plan_on_a_mesh_of_this_machine_names_the_attention_of_its_platform():
  """auto resolves by the mesh, which is one of CPUs here; and every key is there."""
  config = _config()
  planned = plan_mesh(config, planned_model(config), parse_topology("v5e:1x1"),
                      jax.devices()[:1], (1, 1, 1))
  assert planned_model(config).attention == "auto" and planned["attention"] == "xla"
  assert planned["fits"] and all(p["flops"] > 0 for p in planned["programs"].values())
  assert planned["batch"]["sft/train_step"]["rows"] == 4
  # Nothing of what a CPU logs can be told from silence.
  assert {p["involuntary_rematerializations"] for p in planned["programs"].values()} <= {None, 0}


METHOD = """
import dataclasses
from dpr_jax.losses import make_sft_loss
from dpr_jax.methods import DemoMethod

@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(DemoMethod):
  def loss(self, model):
    return make_sft_loss(model)
"""
CONFIG = """
from dpr_jax.config import default_config
from planned_method import Mine

def get_config():
  config = default_config()
  config.methods.mine = Mine(accumulation=2)
  config.compare = ("dpr", "mine")
  return config
"""


def test_a_method_of_a_file_beside_the_config_is_planned(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "path", [*sys.path])
  (tmp_path / "planned_method.py").write_text(METHOD)
  (tmp_path / "own.py").write_text(CONFIG)
  argv = [f"--config={tmp_path}/own.py", "--topology=v5e:1x1", "--methods=mine",
          *(f"--config.{name}={value}" for name, value in SMALL.items())]
  config, _ = plan.parse(argv)
  topology = parse_topology("v5e:1x1")
  planned = plan_mesh(config, planned_model(config), topology, jax.devices()[:1], (1, 1, 1))
  assert list(planned["programs"]) == ["sft/train_step", "mine/train_step"] and planned["fits"]
  update = planned["batch"]["mine/train_step"]
  assert (update["rows"], update["tokens"], update["accumulation"]) == (4, 12, 2)
  assert planned["tokens_per_second_bound"]["mine"] > 0


# Computed when SFT and DPR were all that a plan knew: the estimated peak and seconds, FLOPs of a
# device by program, and bytes through HBM with 1.1 GB of arguments and results.
PINNED = [
    ("llama32_1b", 0, "v5e:4x4", (1, 4, 4), 3128790016.0, 1.3006135945978785,
     (80979645431808.0, 40947278675968.0, 51309289930752.0),
     (20224740096.0, 420482189312.0, 19150998272.0)),
    ("llama32_1b", 16, "v5p:2x2x2", (1, 8, 1), 4279521792.0, 0.9817090891783573,
     (122930830770176.0, 82725453168640.0, 77647640002560.0),
     (62566574848.0, 1476172980224.0, 62029703936.0)),
    ("gemma3_4b", 0, "v5e:4x4", (2, 8, 1), 17207162880.0, 7.5630202628778465,
     (261606922518528.0, 130075810856960.0, 173470272978944.0),
     (27233705728.0, 4301830780928.0, 26520674048.0)),
    ("gemma3_4b", 16, "v6e:4x4", (1, 2, 8), 13898030674.82353, 2.7456355724800003,
     (199997228580864.0, 131174211649536.0, 132757875326976.0),
     (26827211136.0, 3001975770880.0, 21122957696.0)),
]


@pytest.mark.parametrize("name, rank, chips, shape, peak, seconds, done, moved", PINNED)
def test_the_work_of_sft_and_dpr_costs_what_it_did(
    name, rank, chips, shape, peak, seconds, done, moved
):
  config, _ = plan.parse([f"--config=configs/{name}.py", f"--topology={chips}", "--methods=dpr",
                          f"--config.model.lora.rank={rank}"])
  cfg, topology = planned_model(config), parse_topology(chips)
  works = planned_works(config, cfg)
  assert tuple(work.total_flops(w, cfg) / topology.size for w in works) == done
  assert tuple(work.hbm_bytes(w, cfg, shape, 1.1e9) for w in works) == moved
  found = search.estimate(works, cfg, topology, shape)
  assert found.peak_bytes == pytest.approx(peak, rel=1e-12)
  # The estimate took logits of all columns of SFT, one more than there are; it shows where the
  # arithmetic takes longer than the interconnect.
  column = (3 if rank else 4) * flops.head(cfg, config.sft.batch_size)
  more = 0.0 if chips == "v6e:4x4" else column / topology.size / topology.chip.flops
  assert found.seconds == pytest.approx(seconds - more, rel=1e-12)
