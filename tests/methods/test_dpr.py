"""The stage of DPR with what its fields can ask of the reward; on one SFT stage."""

import dataclasses
import shutil
import types

import jax
import numpy as np
import pytest

from dpr_jax import sharding
from dpr_jax.config import debug_config, default_config, resolve
from dpr_jax.data.dataset import build_dataset
from dpr_jax.data.loader import prompt_batches
from dpr_jax.data.templates import encode_response
from dpr_jax.evaluation.benchmarks.tasks import Tasks
from dpr_jax.methods import DPR
from dpr_jax.methods.dpr import DEFAULTS
from dpr_jax.references.ensemble import Ensemble
from dpr_jax.references.midrun import Midrun
from dpr_jax.rewards import BaselineRelative, Endogenous, LogLikelihood
from dpr_jax.rewards.base import Reward
from dpr_jax.training.stopping import last_step, read_stopped
from dpr_jax.weights.byte_tokenizer import byte_tokenizer

EARLY = Midrun(fraction=0.1)


@pytest.fixture(scope="module")
def trained(train_sft):
  """A run whose SFT stage is done."""

  def change(config):
    config.budget.steps = 3
    config.budget.optimizer.learning_rate, config.budget.optimizer.warmup_steps = 0.02, 0

  return train_sft(change)


@pytest.fixture
def dpr(trained, with_config):
  """dpr(value of the method, **fields of the config) -> lines of metrics.jsonl."""
  folder = trained.workdir.stage("dpr")

  def run_stage(method=None, **fields):
    method = method or DPR()
    run = with_config(trained, dpr=method, **fields)
    method.check(run.config)
    method.train(run, "dpr")
    lines = run.metrics("dpr")
    last = last_step(folder, method.budget(run.config).steps)
    assert (folder / "checkpoints" / str(last)).is_dir()
    run_stage.stopped = read_stopped(folder)
    shutil.rmtree(folder)
    return lines

  yield run_stage
  shutil.rmtree(folder, ignore_errors=True)


def test_a_steered_stage_with_transforms_and_a_verifier(dpr):
  plain = dpr()
  lines = dpr(DPR(transforms=("scale:0.5", "clip:0.1"), verifier_weight=0.5, target_kl=0.5))
  assert [line["step"] for line in lines] == [1, 2, 3]
  # The same rollouts at first: the reward that is logged is the raw one, the objective is not.
  assert lines[0]["reward"] == plain[0]["reward"]
  bound = 0.5 * 0.1 * lines[0]["response_length"] + 0.5 * lines[0]["verifier_score"]
  assert abs(lines[0]["shaped_reward"]) <= bound + 1e-5 < abs(plain[0]["shaped_reward"])
  assert [line["beta"] for line in plain] == [1.0] * 3
  assert lines[0]["beta"] == 1.0 and lines[1]["beta"] == pytest.approx(0.98)  # KL 0 is below 0.5.
  assert dpr.stopped is None


def test_a_budget_ends_the_stage(dpr):
  lines = dpr(DPR(kl_budget=1e-6))
  assert dpr.stopped["step"] == len(lines) < 3 and "kl_budget" in dpr.stopped["reason"]


def test_an_ensemble_rewards_like_its_members(dpr):
  """At the first step the policy is sft: the same samples, whatever the reference."""
  alone = [dpr(reference=Midrun(fraction=f))[0]["reward"] for f in (0.1, 0.5)]
  ensemble = Ensemble(fractions=(0.1, 0.5), combine="mean_logp")
  mean = dpr(reference=ensemble)[0]["reward"]
  mixture = dpr(reference=dataclasses.replace(ensemble, combine="logmeanexp"))[0]["reward"]
  assert mean == pytest.approx(np.mean(alone), abs=1e-4)
  assert min(alone) - np.log(2) * 6 < mixture < mean


@pytest.mark.slow
def test_centering_leaves_no_mean_reward(dpr):
  """The sum of r - E r has mean 0: over the batch it is small beside the reward."""
  large = dict(batch_size=256, steps=1)
  plain = dpr(DPR(**large), reference=EARLY)[0]
  centered = dpr(DPR(**large, transforms=("center",)), reference=EARLY)[0]
  assert centered["reward"] == plain["reward"]
  assert abs(centered["shaped_reward"]) < 0.3 * abs(plain["shaped_reward"])
  unsure = dpr(DPR(**large, transforms=("mask_unsure:1e-9",)), reference=EARLY)[0]
  assert unsure["shaped_reward"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name,reward,returns", [
    ("dpr", BaselineRelative(), "per_token"),
    ("reward_to_go", BaselineRelative(), "reward_to_go"),
    ("sentence_level", BaselineRelative(), "full_return"),
    ("log_likelihood", LogLikelihood(), "per_token"),
    ("endogenous", Endogenous(), "reward_to_go"),
])
def test_an_ablation_changes_its_reward_or_its_return_alone(name, reward, returns):
  method = DEFAULTS[name]
  assert method == DPR(reward=reward, returns=returns, label=method.label)
  config = default_config()
  config.compare = (name,)
  assert resolve(config).methods == {name: method}  # Valid as it is.


def test_an_ablation_runs_with_its_own_reward(dpr):
  """On the same samples of the first step: log sft is below log sft - log ref, which is KL-like."""
  plain, alone = (dpr(DEFAULTS[name])[0] for name in ("dpr", "log_likelihood"))
  assert alone["reward"] < 0 < plain["reward"]
  assert alone["response_length"] == plain["response_length"]
  other = dpr(DEFAULTS["log_likelihood"], reference=EARLY)[0]  # It has no reference.
  assert other["reward"] == alone["reward"] and dpr(reference=EARLY)[0]["reward"] != plain["reward"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sure(Reward):
  """A user's reward: of the tokens about which sft is sure."""

  most: float = 0.5

  def __call__(self, sft_logp, ref_logp, sft_entropy, ref_entropy):
    return (sft_logp - ref_logp) * (sft_entropy + 0.0 * ref_entropy < self.most)


def test_a_users_reward_gets_the_scores_that_it_names(dpr):
  every, none, plain = (
      dpr(DPR(reward=reward))[0]["reward"]
      for reward in (Sure(most=1e9), Sure(most=-1.0), BaselineRelative())
  )
  assert every == pytest.approx(plain, abs=1e-5) and none == 0.0


@pytest.mark.parametrize("samples_per_prompt", [1, 2])
def test_right_answers_score_one_whatever_the_step(rng, samples_per_prompt):
  """The verifier reads the response of each row against its own demonstration."""
  config = debug_config(default_config())
  config.data.tasks = ("add", "sort")
  config = resolve(config)
  tokenizer = byte_tokenizer()
  data = build_dataset(config.data, tokenizer, seed=3)
  stop = tokenizer.eos_token_id
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  run = types.SimpleNamespace(
      config=config, data=data, tokenizer=tokenizer, stop_ids=(stop,), mesh=mesh, benchmark=Tasks()
  )
  batches = prompt_batches(
      data.prompts.tokens, 8 // samples_per_prompt, config.data.prompt_length, 3
  )
  verify = DPR(samples_per_prompt=samples_per_prompt)._verifier(run, "dpr", batches)
  new = 24
  for step in rng.integers(0, 200, 3).tolist():
    tokens = np.full((8, new), 5, np.int32)  # garbage past the end.
    lengths, right = np.zeros(8, np.int32), rng.random(8) < 0.5
    for row in range(8):  # Samples of a prompt stand in adjacent rows.
      demo = data.prompts.demos[batches.item_indices(step)[row // samples_per_prompt]]
      response = encode_response(demo.response, demo.prompt, tokenizer)
      assert response[-1] == stop
      if not right[row]:
        response = np.asarray([*tokenizer.encode("?", add_special_tokens=False), stop])
      lengths[row] = len(response)
      tokens[row, : len(response)] = response
    rollout = types.SimpleNamespace(
        response_tokens=tokens, lengths=lengths, hit_eos=np.ones(8, bool)
    )
    with jax.set_mesh(mesh):
      np.testing.assert_array_equal(verify(step, rollout), right.astype(np.float32))
