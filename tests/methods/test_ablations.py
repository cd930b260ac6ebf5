"""What each ablation of DPR changes, as it arrives where the step is made."""

import types

import pytest

from dpr_jax.config import DPRSection, RunConfig
from dpr_jax.stages import dpr as stages


@pytest.fixture
def sections(monkeypatch):
  """sections(stage, transforms) -> (section that the rollout is made for, keywords of the step)."""
  seen = {}
  monkeypatch.setattr(stages, "scoring_of", lambda config, section: {})
  monkeypatch.setattr(
      stages, "make_rollout",
      lambda model, cfg, section, mesh, stop_ids: seen.update(section=section),
  )
  monkeypatch.setattr(stages, "make_reinforce_step", lambda *args: (None, None))
  monkeypatch.setattr(stages, "rollout_prompts", lambda *args: None)

  def make_dpr_step(*args, **keywords):
    seen.update(keywords)
    return types.SimpleNamespace(compilations=lambda: 2)

  monkeypatch.setattr(stages, "make_dpr_step", make_dpr_step)
  monkeypatch.setattr(stages, "train", lambda run, name, *args, **kwargs: seen.update(name=name))

  def made(stage, transforms):
    config = RunConfig(dpr=DPRSection(transforms=transforms))
    nothing = lambda *args: None
    stage(types.SimpleNamespace(
        config=config, model=None, mesh=None, stop_ids=(), data=types.SimpleNamespace(
            prompts=types.SimpleNamespace(tokens=())),
        load=nothing, rng=nothing, say=nothing, sft_float32=nothing,
        finished=lambda name, steps: False,
    ))
    return seen

  return made


@pytest.mark.parametrize("stage,name,reward,returns,transforms", [
    (stages.dpr_stage, "dpr", "baseline_relative", "per_token", ("centre", "clip:2")),
    (stages.reward_to_go_stage, "reward_to_go", "baseline_relative", "reward_to_go", ("clip:2",)),
    (stages.sentence_level_stage, "sentence_level", "baseline_relative", "full_return",
     ("clip:2",)),
    (stages.log_likelihood_stage, "log_likelihood", "log_likelihood", "per_token",
     ("centre", "clip:2")),
    (stages.endogenous_stage, "endogenous", "endogenous", "reward_to_go", ("clip:2",)),
])
def test_an_ablation_changes_its_reward_or_its_return(
    sections, stage, name, reward, returns, transforms
):
  seen = sections(stage, ("centre", "clip:2"))
  section = seen["section"]
  assert (seen["name"], section.reward, section.returns) == (name, reward, returns)
  assert section.transforms == transforms and seen["returns"] == returns
  assert name == "dpr" or name in stages.REINFORCED
  same = DPRSection(reward=reward, returns=returns, transforms=transforms)
  assert section == same
