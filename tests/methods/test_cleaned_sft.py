"""Which demonstrations are left out, against rewards computed one by one from the fold's models."""

import collections
import dataclasses
import shutil

import jax
import numpy as np
import pytest

from dpr_jax.config.fields import package_defaults
from dpr_jax.data.packing import pack
from dpr_jax.errors import UserError
from dpr_jax.evaluation.cleaning import FILE, summarize
from dpr_jax.methods import cleaned_sft
from dpr_jax.methods.cleaned_sft import CleanedSFT, fold_of
from dpr_jax.methods.programs import Shapes, TrainWork
from dpr_jax.workdir import read_lines

METHODS = {name: method for name, method in package_defaults("dpr_jax.methods").items()
           if isinstance(method, CleanedSFT)}
FOLDS = 2


@pytest.fixture(scope="module")
def cleaned(train_sft):
  """A run whose methods of this kind are all trained; SFT is not, and need not be."""

  def change(config):
    config.data.num_demos, config.data.corrupt = 60, 0.3
    config.sft.steps, config.sft.batch_size, config.checkpoint.every = 12, 4, 6
    config.methods.cleaned_sft.folds, config.methods.cleaned_sft.reference_fraction = FOLDS, 0.5
    config.compare = tuple(METHODS)

  run = train_sft(change, steps=False)
  for name in run.config.compare:
    run.config.methods[name].train(run, name)
  return run


def judged(run, name):
  return read_lines(run.workdir.stage(name) / FILE)


def test_the_folds_are_random_and_equally_large_and_copies_stay_together(rng):
  texts = [rng.integers(0, 9, rng.integers(2, 5)) for _ in range(200)]
  found = fold_of(texts, 4, seed=3)
  of_text = collections.defaultdict(set)
  for text, fold in zip(texts, found):
    of_text[tuple(text)].add(int(fold))
  assert all(len(folds) == 1 for folds in of_text.values()) and len(of_text) < 200
  counts = collections.Counter(fold for (fold,) in of_text.values())
  assert sorted(counts) == [0, 1, 2, 3] and max(counts.values()) - min(counts.values()) <= 1
  np.testing.assert_array_equal(found, fold_of(texts, 4, seed=3))
  assert (found != fold_of(texts, 4, seed=4)).any()
  with pytest.raises(UserError, match="folds=3 exceeds the 2 different demonstrations"):
    fold_of([texts[0]] * 5 + [np.zeros(9, np.int32)], 3, seed=0)


def test_each_demonstration_is_judged_by_models_that_have_not_seen_it(cleaned, monkeypatch):
  examples, folds = cleaned.data.examples, FOLDS
  of_example = fold_of([e.tokens for e in examples], folds, cleaned.config.seed)
  trained, packed = [], pack
  monkeypatch.setattr(cleaned_sft, "pack", lambda chosen, *args: (
      trained.append([e.tokens.tobytes() for e in chosen]), packed(chosen, *args))[1])
  for fold in range(folds):
    CleanedSFT(folds=folds)._others(cleaned, "cleaned_sft", fold)
    own = {e.tokens.tobytes() for e, f in zip(examples, of_example) if f == fold}
    assert own and not own & set(trained[fold])
    assert len(trained[fold]) == int((of_example != fold).sum())


def test_the_rewards_are_those_of_the_fold_and_their_sign_is_the_cut(cleaned):
  model, lines = cleaned.model, judged(cleaned, "cleaned_sft")
  of_example = fold_of([e.tokens for e in cleaned.data.examples], FOLDS, cleaned.config.seed)
  assert [line["demo"] for line in lines] == list(range(60))
  params = {fold: [cleaned.checkpoint(f"cleaned_sft/fold{fold}", step, "float32")
                   for step in (12, 6)] for fold in range(FOLDS)}
  width = max(len(e.tokens) for e in cleaned.data.examples)

  @jax.jit
  def logits_of(variables, tokens, segments):
    hidden, _ = model.apply(variables, tokens, None, segments)
    return model.apply(variables, hidden, method="unembed")[0]

  for example, fold, line in zip(cleaned.data.examples, of_example, lines, strict=True):
    logps, beyond = [], width - len(example.tokens)
    tokens, segments = (np.pad(x, (0, beyond))[None]
                        for x in (example.tokens, np.ones_like(example.tokens)))
    for variables in params[int(fold)]:
      logits = np.asarray(logits_of(variables, tokens, segments), np.float64)
      logps.append([logits[t - 1, token] - np.logaddexp.reduce(logits[t - 1])
                    for t, token in enumerate(example.tokens) if example.loss_mask[t]])
    sft, ref = map(np.array, logps)
    assert line["fold"] == fold and line["judged"]
    for name, reduce in (("sum", np.sum), ("mean", np.mean), ("min", np.min)):
      np.testing.assert_allclose(line[f"reward_{name}"], reduce(sft - ref), atol=2e-5)
      np.testing.assert_allclose(line[f"logp_sft_{name}"], reduce(sft), rtol=1e-5)
    assert line["kept"] == (line["reward_sum"] >= 0)
    assert line["wrong"] == cleaned.benchmark.is_wrong(
        cleaned.data.demos[line["demo"]], cleaned.data.demos[line["demo"]].response)
  assert 0 < sum(line["wrong"] for line in lines) < 60


def test_what_it_is_compared_with_keeps_as_many(cleaned):
  lines = {name: judged(cleaned, name) for name in METHODS}
  kept = {name: {x["demo"] for x in found if x["kept"]} for name, found in lines.items()}
  assert len(kept["random_cut"]) == len(kept["likelihood_cut"]) == len(kept["cleaned_sft"])
  assert kept["right_only"] == {x["demo"] for x in lines["cleaned_sft"] if not x["wrong"]}
  least = min(x["logp_sft_min"] for x in lines["likelihood_cut"] if x["kept"])
  assert all(x["logp_sft_min"] <= least for x in lines["likelihood_cut"] if not x["kept"])
  stages = {p.parent.name for p in cleaned.workdir.path.glob("*/*/checkpoints")}
  assert stages == {f"fold{fold}" for fold in range(FOLDS)}  # Made once, for all of them.


def test_sft_starts_again_on_what_is_kept(cleaned):
  for name in METHODS:
    chosen = [e for e, line in zip(cleaned.data.examples, judged(cleaned, name)) if line["kept"]]
    rows = pack(chosen, cleaned.config.data.row_length, "drop", cleaned.config.seed)
    found = METHODS[name]._kept(cleaned, name)
    np.testing.assert_array_equal(found.tokens, rows.tokens)
    lines = cleaned.metrics(name)
    assert [line["step"] for line in lines] == list(range(1, 13))
    start = cleaned.initial_variables("float32")
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), start, cleaned.result(name))
    assert max(jax.tree.leaves(moved)) > 0
  (program,) = METHODS["cleaned_sft"].programs(
      Shapes(cleaned.config, cleaned.model, cleaned.mesh, cleaned.stop_ids), "cleaned_sft")
  assert program.name == "cleaned_sft/train_step" and isinstance(program.work, TrainWork)
  assert METHODS["cleaned_sft"].own_budget() == "that of SFT, from the model before it"


def test_a_share_is_kept(cleaned, with_config):
  method = CleanedSFT(like="cleaned_sft", keep=0.25, reduce="mean")
  run = with_config(cleaned, quarter=method)
  method._judge(run, "quarter")
  order = sorted(judged(run, "quarter"), key=lambda x: -x["reward_mean"])
  assert [x["kept"] for x in order] == [True] * 15 + [False] * 45


def test_what_is_finished_is_not_made_again_even_without_its_folds(cleaned):
  folder = cleaned.workdir.stage("cleaned_sft")
  state = lambda: {p: p.stat().st_mtime_ns for p in folder.rglob("*") if "fold" not in str(p)}
  before = state()
  for fold in range(FOLDS):
    shutil.move(folder / f"fold{fold}", folder.parent.parent / f"fold{fold}")
  try:
    cleaned.config.methods["cleaned_sft"].train(cleaned, "cleaned_sft")
    assert {p.name for p in folder.iterdir()} >= {"checkpoints", "metrics.jsonl", FILE}
    assert not list(folder.glob("fold*"))
  finally:
    for fold in range(FOLDS):
      shutil.move(folder.parent.parent / f"fold{fold}", folder / f"fold{fold}")
  assert {p: t for p, t in state().items() if p.is_file()} == {
      p: t for p, t in before.items() if p.is_file()}


def test_what_is_too_long_is_not_judged_and_not_kept(cleaned, with_config):
  lengths = sorted(len(e.tokens) for e in cleaned.data.examples)
  data = dataclasses.replace(cleaned.config.data, row_length=lengths[30], overlong="drop")
  run = with_config(cleaned, data=data)
  lines = run.config.methods["cleaned_sft"]._rewards(run, "cleaned_sft")
  fits = [len(e.tokens) <= lengths[30] for e in cleaned.data.examples]
  assert [line["judged"] for line in lines] == fits and not all(fits)
  kept = CleanedSFT()._choose(lines, None, run)
  assert not any(k and not fit for k, fit in zip(kept, fits))


def test_the_summary_is_that_of_the_lines():
  line = lambda kept, wrong, score: {"judged": True, "kept": kept, "wrong": wrong} | {
      name: score for name in ("reward_sum", "reward_mean", "reward_min", "logp_sft_sum",
                               "logp_sft_mean", "logp_sft_min")}
  lines = [line(True, False, 2.0), line(True, False, 1.0), line(True, True, 1.5),
           line(False, True, -1.0), {"judged": False, "kept": False, "wrong": True}]
  found = summarize([lines, lines])
  means = {name: found[name]["mean"] for name in found}
  assert (means["kept"], means["cut"], means["unjudged"]) == (0.6, 0.2, 0.2)
  assert means["wrong"] == 0.5
  assert means["wrong_kept"] == pytest.approx(1 / 3) and means["wrong_cut"] == 1.0
  assert means["auc_reward_sum"] == 0.75  # Of four pairs one is the wrong way round.
  bare = [{k: v for k, v in x.items() if k != "wrong"} for x in lines]
  assert list(summarize([bare])) == ["kept", "unjudged", "cut"]
  no_wrong = [x for x in lines if not (x["wrong"] and x["judged"])]
  assert "auc_reward_sum" not in summarize([lines, no_wrong])


@pytest.mark.parametrize("fields, pattern", [
  ({"score": "random"}, "score='random' has no zero; set keep, or like"),
  ({"score": "logp_sft"}, "score='logp_sft' has no zero"),
  ({"score": "oracle"}, "score='oracle' needs built-in tasks of which some are"),
  ({"like": "dpr"}, "like='dpr' must be a method of this kind"),
  ({"like": "other"}, "like='other' must be a method of this kind"),
  ({"reference_fraction": 0.9999}, "reference_fraction=0.9999 of 600 steps must leave"),
  ({"reference_fraction": 0.0005}, "reference_fraction=0.0005 of 600 steps must leave"),
  ({"score": "random", "keep": 0.5, "reduce": "min"}, "reduce='min' has no effect with score="),
  ({"score": "oracle", "keep": 0.5}, "keep=0.5 has no effect with score='oracle'"),
  ({"like": "cleaned_sft", "folds": 3}, "folds=3 has no effect with like='cleaned_sft'"),
])
def test_what_cannot_be_is_refused(fields, pattern):
  from dpr_jax.config import default_config, resolve

  config = default_config()
  config.methods.cleaned_sft = CleanedSFT(**fields)
  config.compare = ("cleaned_sft", "dpr")
  with pytest.raises(UserError, match=f"config.methods.cleaned_sft: {pattern}"):
    resolve(config)


def test_copies_are_not_wrong_demonstrations():
  from dpr_jax.config import default_config, resolve

  config = default_config()
  config.data.corrupt, config.data.corruption = 0.2, "slip"
  config.compare = ("cleaned_sft", "right_only")
  assert resolve(config).data.corruption == "slip"
  config.data.corruption = "repeated"
  with pytest.raises(UserError, match="config.methods.right_only: score='oracle' needs .* other "
                                      "than repeated"):
    resolve(config)
