"""DPR with the exact gradient: what it refuses, and what a plan says of it."""

import jax
import pytest

from dpr_jax import sharding
from dpr_jax.config import debug_config, default_config, resolve
from dpr_jax.errors import UserError
from dpr_jax.methods import DPR
from dpr_jax.methods.programs import Shapes
from dpr_jax.models import ModelConfig, Transformer
from dpr_jax.models.lora import LoRA
from dpr_jax.rewards import Endogenous, LogLikelihood


@pytest.mark.parametrize("fields,named", [
    (dict(verifier_weight=0.5), ["verifier_weight=0.5", "set 0"]),
    (dict(returns="reward_to_go"), ["returns=reward_to_go", "set returns=per_token"]),
    (dict(returns="full_return"), ["returns=full_return", "set returns=per_token"]),
    (dict(transforms=("clip:2", "zscore")), ["transforms[1]='zscore'", "use scale, clip"]),
    (dict(transforms=("center",)), ["transforms[0]='center'", "use scale, clip"]),
    (dict(transforms=("mask_unsure:1",)), ["transforms[0]='mask_unsure:1'", "use scale, clip"]),
    (dict(variance_baseline="none"), ["variance_baseline=none", "leave it at position_mean"]),
    (dict(reward=Endogenous(), returns="reward_to_go"), ["reward='endogenous'", "pointwise"]),
    (dict(divergence="forward_kl", beta=0.0), ["divergence=forward_kl", "beta_ref above 0"]),
    (dict(divergence="forward_kl", gradient="sampled"),
     ["divergence=forward_kl", "gradient=full_vocabulary"]),
])
def test_what_has_no_meaning_is_refused_by_name(fields, named):
  config = default_config()
  config.methods.exact = DPR(**{"gradient": "full_vocabulary", **fields})
  config.compare = ("exact",)
  with pytest.raises(UserError) as caught:
    resolve(config)
  message = str(caught.value)
  assert message.startswith("config.methods.exact: "), message
  assert all(name in message for name in named), message


def test_what_has_a_meaning_is_taken():
  config = default_config()
  for fields in (
      dict(returns="reward_to_go", gamma=0.0), dict(beta=0.0), dict(temperature=0.7, top_p=0.9),
      dict(divergence="forward_kl", beta=0.0, beta_ref=0.5), dict(reward=LogLikelihood()),
      dict(transforms=("scale:0.5", "clip:-1:2"), target_kl=1.0, kl_budget=9.0, slots=8),
  ):
    config.methods.exact = DPR(gradient="full_vocabulary", **fields)
    config.compare = ("exact",)
    resolve(config)


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_plan_of_the_exact_gradient_counts_each_byte_once(rank):
  """Beyond the sampled gradient, a train step holds the hidden states of sft and ref, and beta."""
  config = resolve(debug_config(default_config()))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  cfg = ModelConfig(vocab_size=272, num_layers=1, tied_head=False, lora=LoRA(rank=rank))
  shapes, held = Shapes(config, Transformer(cfg), mesh), []
  for method in (DPR(), DPR(gradient="full_vocabulary")):
    rollouts, update = method.programs(shapes, "dpr")
    with jax.set_mesh(mesh):
      memory = update.lower().compile().memory_analysis()
    held.append(memory.argument_size_in_bytes + update.resident_bytes)
  assert rollouts.work.kept_states == update.work.teachers == 2
  tokens = config.budget.batch_size * config.budget.max_new_tokens
  assert held[1] - held[0] == 4 * (2 * tokens * cfg.hidden_size + 1 - tokens)  # No advantages.
