"""The stage of DPR with what its fields can ask of the reward; on one SFT stage."""

import dataclasses
import shutil
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpr_jax import fingerprints, sharding, weights
from dpr_jax.config import RunConfig, debug_config, default_config, resolve
from dpr_jax.data.dataset import build_dataset
from dpr_jax.data.loader import prompt_batches
from dpr_jax.data.templates import encode_response
from dpr_jax.errors import UserError
from dpr_jax.evaluation.benchmarks.tasks import Tasks
from dpr_jax.evaluation.judges import Judge
from dpr_jax.evaluation.judges.log_ratio import LogRatio
from dpr_jax.evaluation.judges.reward_model import RewardModel, conversation_ids
from dpr_jax.main import parse
from dpr_jax.methods import DPR
from dpr_jax.methods.dpr import DEFAULTS
from dpr_jax.methods.programs import Shapes
from dpr_jax.models import ModelConfig, Transformer
from dpr_jax.references.ensemble import Ensemble
from dpr_jax.references.midrun import Midrun
from dpr_jax.rewards import BaselineRelative, Endogenous, LogLikelihood
from dpr_jax.rewards.base import Reward
from dpr_jax.run import set_up
from dpr_jax.training.stopping import last_step, read_stopped
from dpr_jax.weights import save_pretrained
from dpr_jax.weights.byte_tokenizer import byte_tokenizer
from dpr_jax.workdir import Workdir

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


def test_the_exact_gradient_approaches_its_target(dpr):
  """With what a run may ask of it: beta is steered, and truncated rollouts are masked."""
  lines = dpr(DPR(gradient="full_vocabulary", divergence="forward_kl", target_kl=0.5,
                  transforms=("clip:2",), accumulation=2, truncated="mask"))
  assert [line["step"] for line in lines] == [1, 2, 3] and lines[0]["decode_gap"] < 1e-4
  assert 0 < lines[2]["kl_to_target"] < lines[0]["kl_to_target"]
  assert lines[1]["beta"] == pytest.approx(0.98)  # KL 0 is below 0.5.


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


# --- A judge as the verifier ----------------------------------------------------------------------


@pytest.fixture
def classifier(tmp_path, make_model):
  """classifier(seed, max_length) -> the folder of a random Qwen3 with a score head."""
  def make(seed, max_length=256):
    folder = tmp_path / f"{seed}_{max_length}"
    tokenizer = byte_tokenizer()
    model, variables = make_model(
        seed, vocab_size=len(tokenizer), max_length=max_length, qk_norm=True
    )
    save_pretrained(folder, model.cfg, variables["params"], tokenizer=tokenizer)
    tensors = load_file(folder / "model.safetensors")
    score = np.random.default_rng(seed).normal(size=(1, model.cfg.hidden_size))
    tensors["score.weight"] = score.astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder

  return make


@dataclasses.dataclass(frozen=True, kw_only=True)
class Brevity(Judge):
  """A user's judge."""

  rewards = True

  def replies(self, questions, setting):
    for i in reversed(range(len(questions))):
      yield i, {"reward": -len(questions[i].messages[-1]["content"])}


def test_judges_score_every_rollout_of_a_stage(dpr, trained, classifier, monkeypatch):
  torch = pytest.importorskip("torch")
  from transformers import Qwen3ForSequenceClassification

  seen, loads, load = [], [], weights.load_classifier
  monkeypatch.setattr(weights, "load_classifier", lambda *a, **k: loads.append(a) or load(*a, **k))

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Recorded(DPR):
    """Notes the rollouts of each step, and their scores."""

    def _verifier(self, run, name, batches):
      verify = super()._verifier(run, name, batches)

      def noted(step, rollout):
        scores = verify(step, rollout)
        seen.append((jax.device_get(rollout), np.asarray(scores), batches.item_indices(step)))
        return scores

      return noted

  given = dict(verifier_weight=0.5, verifier_transforms=("zscore",))
  lines = dpr(Recorded(verifier=RewardModel(model=str(classifier(1))), **given))
  assert len(loads) == 1 and len(seen) == len(lines) == 3  # Loaded once for all steps.

  # The same conversations, scored by transformers.
  tokenizer, demos = trained.tokenizer, trained.data.prompts.demos
  theirs = Qwen3ForSequenceClassification.from_pretrained(
      classifier(1), num_labels=1, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  sizes, texts = [], []
  for line, (rollout, scores, items) in zip(lines, seen, strict=True):
    expected = []
    for row, item in enumerate(items):
      tokens = rollout.response_tokens[row, : rollout.lengths[row] - rollout.hit_eos[row]]
      texts.append(tokenizer.decode(tokens))
      talk = (*demos[item].prompt, {"role": "assistant", "content": texts[-1]})
      ids = conversation_ids(talk, tokenizer).astype(np.int64)
      sizes.append(len(ids))
      with torch.no_grad():
        expected.append(theirs(torch.tensor(ids[None])).logits[0, 0].item())
    assert np.std(expected) > 0.05
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert line["verifier_score"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert line["verifier_unscored"] == 0 and line["trained_share"] == 1

  rollout, scores, _ = seen[0]
  sizes, texts = sizes[: len(scores)], texts[: len(scores)]

  def scored(judge):
    method = DPR(verifier=judge, verifier_weight=0.5)
    batches = method._prompts(trained.config, trained.data.prompts.tokens)
    return np.asarray(method._verifier(trained, "dpr", batches)(0, rollout))

  # A conversation that is too long for a model has no score.
  limit = int(np.median(sizes))
  fits = np.array(sizes) <= limit
  tight = scored(RewardModel(model=str(classifier(1, limit))))
  assert 0 < fits.mean() < 1
  np.testing.assert_allclose(tight, np.where(fits, scores, np.nan), atol=1e-4)
  with pytest.raises(UserError, match="dpr.verifier: it can score none of the rollouts of step 1;"):
    scored(RewardModel(model=str(classifier(1, 8))))
  # Other judges: a user's, and the likelihood of the very tokens that were sampled.
  np.testing.assert_array_equal(scored(Brevity()), [-len(text) for text in texts])
  logps = np.where(rollout.mask > 0, rollout.sft_logp, 0).sum(axis=1)
  sft = str(trained.workdir.stage("sft"))
  np.testing.assert_allclose(scored(LogRatio(sft=sft)), logps, atol=1e-3)


def test_a_run_remembers_its_reward_model(train_sft, classifier):
  folder, other, config = classifier(1), classifier(2), []

  def change(c):
    c.methods.dpr = DPR(verifier=RewardModel(model=str(folder)), verifier_weight=0.5)
    config.append(c)

  run = train_sft(change, steps=False)
  resume = lambda: set_up(run.config, run.workdir, run.mesh)
  record = run.workdir.read_config()
  assert resolve(record["config"]) == run.config == resume().config
  kept = folder / "model.safetensors"
  before = kept.read_bytes()
  kept.write_bytes((other / kept.name).read_bytes())
  fingerprints._of_version.cache_clear()
  with pytest.raises(UserError, match=r"dpr.verifier: model.safetensors: the file has changed"):
    set_up(resolve(record["config"]), run.workdir, run.mesh)
  kept.write_bytes(before)
  folder.rename(f"{folder}_moved")
  set_up(resolve(record["config"]), run.workdir, run.mesh)  # It may be needed no more.
  config[0].methods.dpr.verifier.model = str(other)
  with pytest.raises(UserError, match=r"another config \(config.methods.dpr.verifier.model: "):
    set_up(resolve(config[0]), run.workdir, run.mesh)
  tokenizer = str(run.workdir.tokenizer)
  for model, message in ((str(folder), "no such folder"), (tokenizer, "config.json")):
    config[0].methods.dpr.verifier.model = model
    with pytest.raises(UserError, match=f"config.methods.dpr.verifier: .*{message}"):
      set_up(resolve(config[0]), Workdir(run.workdir.path.parent / "new"), run.mesh)


def test_a_verifier_is_set_on_the_command_line(classifier):
  folder, flags = str(classifier(1)), ["--config=configs/smoke.py:debug", "--workdir=x"]
  field = "--config.methods.dpr.verifier"
  given = [f"{field}.kind=reward_model", f"{field}.model={folder}", f"{field}_weight=0.2"]
  found = parse([*flags, *given])
  config = next(x for x in found if isinstance(x, RunConfig))
  assert config.methods["dpr"].verifier == RewardModel(model=folder)
  shapes = Shapes(config, Transformer(ModelConfig(vocab_size=272)), sharding.make_mesh())
  plain = dataclasses.replace(config.methods["dpr"], verifier=None).programs(shapes, "dpr")
  held = config.methods["dpr"].programs(shapes, "dpr")
  size = sum(x.nbytes for name, x in load_file(f"{folder}/model.safetensors").items()
             if name not in ("score.weight", "lm_head.weight"))
  for a, b in zip(plain, held, strict=True):
    assert b.resident_bytes - a.resident_bytes == size
  for bad, message in (
      ([f"{field}.kind=endpoint"], "verifier=endpoint answers in words"),
      ([f"{field}.kind=reward_model", f"{field}_weight=0.2"], "verifier: model is missing"),
      (given[:2], "verifier_weight=0 takes nothing"),
      ([*given, f"{field}_transforms=center"], "a score has no expected_rewards"),
      ([*given, f"{field}_transforms=double"], "verifier_transforms: "),
  ):
    with pytest.raises(UserError, match=message):
      parse([*flags, *bad])
