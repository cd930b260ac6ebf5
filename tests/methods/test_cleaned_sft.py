"""Which demonstrations are left out, against rewards computed one by one from the fold's models."""

import collections
import dataclasses
import shutil

import jax
import numpy as np
import pytest

from dpr_jax.config.fields import package_defaults
from dpr_jax.data.packing import pack
from dpr_jax.data.tasks import verify
from dpr_jax.errors import UserError
from dpr_jax.evaluation import training_dynamics
from dpr_jax.evaluation.cleaning import FILE, summarize
from dpr_jax.methods import cross_fitting
from dpr_jax.methods.cleaned_sft import CleanedSFT, treated
from dpr_jax.methods.cross_fitting import CrossFit, fold_of
from dpr_jax.methods.dpr import DPR
from dpr_jax.methods.programs import Shapes, TrainWork
from dpr_jax.workdir import read_lines

METHODS = {name: method for name, method in package_defaults("dpr_jax.methods").items()
           if isinstance(method, CleanedSFT)}
FOLDS = 2
TRAINED = ("cleaned_sft", "masked_sft")  # The others are judged alone.


@pytest.fixture(scope="module")
def cleaned(train_sft):
  """A run whose methods of this kind are all trained; SFT is not, and need not be."""

  def change(config):
    config.data.num_demos, config.data.corrupt = 60, 0.3
    config.sft.steps, config.sft.batch_size, config.checkpoint.every = 30, 4, 15
    config.methods.cleaned_sft.folds, config.methods.cleaned_sft.reference_fraction = FOLDS, 0.5
    config.methods.cleaned_sft.rival_checkpoints = 3
    config.compare = tuple(METHODS)

  run = train_sft(change, steps=False)
  for name in run.config.compare:
    method = run.config.methods[name]
    method.train(run, name) if name in TRAINED else method.judge(run, name)
  return run


@pytest.fixture(scope="module")
def logits_of(cleaned):
  """logits_of(variables, example) -> float64 [T, V], from which the next token is chosen."""
  model, width = cleaned.model, max(len(e.tokens) for e in cleaned.data.examples)

  @jax.jit
  def logits(variables, tokens, segments):
    hidden, _ = model.apply(variables, tokens, None, segments)
    return model.apply(variables, hidden, method="unembed")[0]

  def of(variables, example):
    beyond = width - len(example.tokens)
    rows = (np.pad(x, (0, beyond))[None] for x in (example.tokens, np.ones_like(example.tokens)))
    return np.asarray(logits(variables, *rows), np.float64)[: len(example.tokens)]

  return of


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
  monkeypatch.setattr(cross_fitting, "pack", lambda chosen, *args: (
      trained.append([e.tokens.tobytes() for e in chosen]), packed(chosen, *args))[1])
  monkeypatch.setattr(cross_fitting, "fine_tuning", lambda run, stage, rows, *args: rows)
  monkeypatch.setattr(cross_fitting, "train_planned", lambda planned: planned.build())
  stages = tuple(f"fold{fold}" for fold in range(folds))
  fit = CrossFit(cleaned, "cleaned_sft", stages, METHODS["cleaned_sft"].budget(cleaned.config), 15)
  fit.train(examples)
  for fold in range(folds):
    own = {e.tokens.tobytes() for e, f in zip(examples, of_example) if f == fold}
    assert own and not own & set(trained[fold])
    assert len(trained[fold]) == int((of_example != fold).sum())
  trained.clear()  # In a later round what was cut is judged again, but trains none of the folds.
  fit.train([None if i % 3 == 0 else e for i, e in enumerate(examples)])
  for fold in range(folds):
    left = [e.tokens.tobytes() for i, e in enumerate(examples) if i % 3 and of_example[i] != fold]
    assert trained[fold] == left


def test_the_rewards_are_those_of_the_fold_and_their_sign_is_the_cut(cleaned, logits_of):
  lines = judged(cleaned, "cleaned_sft")
  of_example = fold_of([e.tokens for e in cleaned.data.examples], FOLDS, cleaned.config.seed)
  assert [line["demo"] for line in lines] == list(range(60))
  params = {fold: [cleaned.checkpoint(f"cleaned_sft/fold{fold}", step, "float32")
                   for step in (30, 15)] for fold in range(FOLDS)}
  for example, fold, line in zip(cleaned.data.examples, of_example, lines, strict=True):
    logps = []
    for variables in params[int(fold)]:
      logits = logits_of(variables, example)
      logps.append([logits[t - 1, token] - np.logaddexp.reduce(logits[t - 1])
                    for t, token in enumerate(example.tokens) if example.loss_mask[t]])
    sft, ref = map(np.array, logps)
    assert line["fold"] == fold and line["judged"]
    np.testing.assert_allclose(line["token_rewards"], sft - ref, atol=7e-5)  # Four decimals.
    np.testing.assert_allclose(line["logp_sft"], sft, rtol=1e-5, atol=7e-5)
    for name, reduce in (("sum", np.sum), ("mean", np.mean), ("min", np.min)):
      np.testing.assert_allclose(line[f"reward_{name}"], reduce(sft - ref), atol=2e-5)
      np.testing.assert_allclose(line[f"logp_sft_{name}"], reduce(sft), rtol=1e-5)
    assert line["kept"] == (line["reward_sum"] >= 0)
    demo = cleaned.data.demos[line["demo"]]
    assert line["wrong"] == (not verify(demo.task, demo.prompt[0]["content"], demo.response))
    assert line["task"] == demo.task
  assert 0 < sum(line["wrong"] for line in lines) < 60


def test_rival_scores_are_those_of_their_papers(cleaned, logits_of):
  lines, examples = judged(cleaned, "cleaned_sft"), cleaned.data.examples
  steps = (10, 20, 30)
  variables = {(fold, step): cleaned.checkpoint(f"cleaned_sft/fold{fold}", step, "float32")
               for fold in range(FOLDS) for step in steps}
  chosen = lambda e: [t for t in range(1, len(e.tokens)) if e.loss_mask[t]]
  labelled = collections.defaultdict(list)  # Label -> its probabilities, untrained on.
  held_out = []
  for example, line in zip(examples, lines, strict=True):
    logits = logits_of(variables[line["fold"], 30], example)
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=1)[:, None])
    held_out.append(p)
    for t in chosen(example):
      labelled[int(example.tokens[t])].append(p[t - 1, example.tokens[t]])
  thresholds = {k: np.mean(v) for k, v in labelled.items()}
  near = 0
  for example, line, p in zip(examples, lines, held_out, strict=True):
    margins = np.zeros((3, len(chosen(example))))  # Of the one model that has trained on it.
    for c, step in enumerate(steps):
      logits = logits_of(variables[1 - line["fold"], step], example)
      for n, t in enumerate(chosen(example)):
        others = np.delete(logits[t - 1], example.tokens[t])
        margins[c, n] = logits[t - 1, example.tokens[t]] - others.max()
    for how, reduce in (("sum", np.sum), ("mean", np.mean), ("min", np.min)):
      np.testing.assert_allclose(line[f"aum_{how}"], reduce(margins.mean(axis=0)), atol=3e-5)
    if abs(margins).min() > 1e-4:
      events = sum(
          sum(a > 0 >= b for a, b in zip(m, m[1:])) if (m > 0).any() else 3 for m in margins.T)
      assert line["forgetting"] == -events
    flagged, sharp = 0, True
    for t in chosen(example):
      confident = {k: p[t - 1, k] for k, least in thresholds.items() if p[t - 1, k] >= least}
      sharp &= all(abs(p[t - 1, k] / least - 1) > 1e-4 for k, least in thresholds.items())
      flagged += bool(confident) and max(confident, key=confident.get) != example.tokens[t]
    near += not sharp
    assert line["confident"] == -flagged or not sharp
  assert near < 10 and 0 < sum(line["confident"] < 0 for line in lines)
  assert any(line["forgetting"] for line in lines)


def test_forgetting_is_counted_from_checkpoint_to_checkpoint():
  margins = np.array([[1.0, -1.0, 1.0], [-1.0, -2.0, 1.0], [1.0, -3.0, 2.0], [-1.0, -1.0, 0.5]])
  assert training_dynamics.forgotten(margins) == 2 + 4 + 0  # Learned twice, never, and for good.


def test_what_it_is_compared_with_keeps_as_many(cleaned):
  lines = {name: judged(cleaned, name) for name in METHODS}
  kept = {name: {x["demo"] for x in found if x["kept"]} for name, found in lines.items()}
  own = lines["cleaned_sft"]
  for name, field in (("likelihood_cut", "logp_sft_min"), ("perplexity_cut", "logp_sft_mean"),
                      ("aum_cut", "aum_mean"), ("forgetting_cut", "forgetting")):
    assert len(kept[name]) == len(kept["cleaned_sft"]) < 60
    assert [x[field] for x in lines[name]] == [x[field] for x in own]
    least = min(x[field] for x in lines[name] if x["kept"])
    assert all(x[field] <= least for x in lines[name] if not x["kept"])
  assert len(kept["random_cut"]) == len(kept["cleaned_sft"])
  assert kept["confident_cut"] == {x["demo"] for x in own if x["confident"] == 0}
  assert kept["right_only"] == {x["demo"] for x in own if not x["wrong"]}
  stages = {p.parent.name for p in cleaned.workdir.path.glob("*/*/checkpoints")}
  assert stages == {f"fold{fold}" for fold in range(FOLDS)}  # Made once, for all of them.


def test_sft_starts_again_on_what_is_kept(cleaned):
  for name in METHODS:
    chosen = [treated(e, x) for e, x in zip(cleaned.data.examples, judged(cleaned, name))]
    chosen = [e for e in chosen if e is not None]
    if not chosen:
      with pytest.raises(UserError, match=f"methods.{name}: no demonstration is kept; set keep"):
        METHODS[name]._rows(cleaned, name)
      continue
    rows = pack(chosen, cleaned.config.data.row_length, "drop", cleaned.config.seed)
    found = METHODS[name]._rows(cleaned, name)
    np.testing.assert_array_equal(found.tokens, rows.tokens)
    np.testing.assert_array_equal(found.loss_mask, rows.loss_mask)
    if name not in TRAINED:
      continue
    lines = cleaned.metrics(name)
    assert [line["step"] for line in lines] == list(range(1, 31))
    start = cleaned.initial_variables("float32")
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), start, cleaned.result(name))
    assert max(jax.tree.leaves(moved)) > 0
  (program,) = METHODS["cleaned_sft"].programs(
      Shapes(cleaned.config, cleaned.model, cleaned.mesh, cleaned.stop_ids), "cleaned_sft")
  assert program.name == "cleaned_sft/train_step" and isinstance(program.work, TrainWork)
  assert METHODS["cleaned_sft"].own_budget() == "that of SFT, from the model before it"


def test_tokens_are_left_out_and_demonstrations_weighted_by_their_reward(cleaned):
  own = judged(cleaned, "cleaned_sft")
  masked, weighted = (judged(cleaned, name) for name in ("masked_sft", "weighted_sft"))
  some = 0
  for example, line, mask, weight in zip(cleaned.data.examples, own, masked, weighted, strict=True):
    rewards = np.array(line["token_rewards"])
    expected = example.loss_mask.copy()
    expected[np.flatnonzero(example.loss_mask)] = rewards >= 0
    some += 0 < expected.sum() < len(rewards)
    trained = treated(example, mask)
    assert (trained is None) == (not expected.any()) == (not mask["kept"])
    if trained is not None:
      np.testing.assert_array_equal(trained.loss_mask, expected)
      np.testing.assert_array_equal(trained.tokens, example.tokens)
    w = min(1.0, np.exp(line["reward_sum"]))
    np.testing.assert_allclose(treated(example, weight).loss_mask, example.loss_mask * w, rtol=1e-6)
  assert some > 5
  lines = CleanedSFT(treatment="weight", tau=2.0, weight_cap=3.0).decide(own, None, 0)
  np.testing.assert_allclose([x["weight"] for x in lines],
                             [min(3.0, np.exp(x["reward_sum"] / 2)) for x in own])
  share = CleanedSFT(treatment="mask", score="logp_sft", keep=0.75).decide(own, None, 0)
  flags, values = (np.concatenate([x[name] for x in share]) for name in ("tokens_kept", "logp_sft"))
  assert abs(flags.mean() - 0.75) < 0.01 and values[flags == 1].min() >= values[flags == 0].max()


def test_a_weighted_loss_is_the_weighted_mean(cleaned, logits_of, rng):
  from dpr_jax.data.batches import SFTBatch
  from dpr_jax.losses import make_sft_loss

  lines = [{"kept": True, "weight": w} for w in rng.uniform(0.1, 0.9, len(cleaned.data.examples))]
  examples = [treated(*pair) for pair in zip(cleaned.data.examples, lines, strict=True)]
  rows = pack(examples, cleaned.config.data.row_length).first(4)
  batch = SFTBatch(rows.tokens, rows.segment_ids, rows.loss_mask)
  variables = cleaned.initial_variables("float32")
  loss_sum, weight, metrics = make_sft_loss(cleaned.model)(variables, batch, None)
  expected = 0.0
  by_tokens = {e.tokens.tobytes(): e for e in cleaned.data.examples}
  for tokens, segments, mask in zip(rows.tokens, rows.segment_ids, rows.loss_mask, strict=True):
    for segment in range(1, segments.max() + 1):
      at = np.flatnonzero(segments == segment)
      logits = logits_of(variables, by_tokens[tokens[at].tobytes()])
      for t in range(1, len(at)):
        logp = logits[t - 1, tokens[at[t]]] - np.logaddexp.reduce(logits[t - 1])
        expected -= mask[at[t]] * logp
  np.testing.assert_allclose(loss_sum, expected, rtol=1e-5)
  np.testing.assert_allclose(weight, rows.loss_mask.sum(), rtol=1e-6)
  assert metrics["tokens"] == (rows.loss_mask > 0).sum() > weight


def test_a_share_is_kept(cleaned):
  method = CleanedSFT(like="cleaned_sft", keep=0.25, reduce="mean")
  lines = method.decide(judged(cleaned, "cleaned_sft"), None, 0)
  order = sorted(lines, key=lambda x: -x["reward_mean"])
  assert [x["kept"] for x in order] == [True] * 15 + [False] * 45


def test_a_second_round_judges_all_by_models_of_what_was_kept(cleaned, with_config):
  method = CleanedSFT(folds=FOLDS, reference_fraction=0.5, rounds=2, keep=0.5, steps=4)
  run = with_config(cleaned, twice=method)
  lines = method.judge(run, "twice")
  first = read_lines(run.workdir.stage("twice") / f"round1_{FILE}")
  assert [x["fold"] for x in first] == [x["fold"] for x in lines]
  for found in (first, lines):
    least = min(x["reward_sum"] for x in found if x["kept"])
    assert sum(x["kept"] for x in found) == 30
    assert all(x["reward_sum"] <= least for x in found if not x["kept"])
  assert [x["reward_sum"] for x in first] != [x["reward_sum"] for x in lines]
  assert set(method.stages("twice")[1:]) == {
      p.parent.relative_to(run.workdir.path).as_posix()
      for p in run.workdir.stage("twice").glob("**/checkpoints")}


def test_dpr_starts_from_the_result_with_its_early_checkpoint_as_ref(cleaned, with_config):
  run = with_config(cleaned, after=DPR(start="cleaned_sft", steps=2))
  training = run.config.methods["after"].build(run, "after")
  same = lambda a, b: all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))
  last, early = (run.checkpoint("cleaned_sft", step, "float32") for step in (30, 15))
  assert same(training.step.sft, last) and same(training.step.ref.members, (early,))
  assert same(training.start(), last) and not same(last, early)


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
  method = run.config.methods["cleaned_sft"]
  stages = method.stages("cleaned_sft")[1:]
  fit = CrossFit(run, "cleaned_sft", stages, method.budget(run.config), 15)
  lines = fit.scores()
  fits = [len(e.tokens) <= lengths[30] for e in cleaned.data.examples]
  assert [line["judged"] for line in lines] == fits and not all(fits)
  for treatment in ("cut", "mask", "weight"):
    kept = CleanedSFT(treatment=treatment).decide(lines, None, 0)
    assert not any(line["kept"] and not fit for line, fit in zip(kept, fits))
  none = with_config(cleaned, data=dataclasses.replace(data, row_length=2))
  with pytest.raises(UserError, match="cleaned_sft: fold 0 has no demonstration that can"):
    dataclasses.replace(fit, run=none).train(run.data.examples)


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
  assert means["right_cut"] == 0.0
  assert "right_cut" not in summarize([bare])  # Nobody knows.
  grouped = [{**x, "task": "sort" if i else "add", "minority": i == 1} for i, x in enumerate(
      [line(True, False, 2.0), line(False, False, -2.0), line(True, False, 1.0),
       line(False, True, -3.0)])]
  found = {name: of["mean"] for name, of in summarize([grouped]).items() if "right_cut" in name}
  assert found == {"right_cut": pytest.approx(1 / 3), "right_cut/add": 0.0, "right_cut/sort": 0.5,
                   "right_cut/minority": 1.0}
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
  ({"start": "cleaned_sft"}, "start='cleaned_sft' must be a method that keeps an early checkpoint"),
  ({"start": "late"}, "start='late' must be a method that keeps an early checkpoint"),
  ({"tau": 2.0}, "tau=2.0 has no effect with treatment='cut'"),
  ({"treatment": "weight", "keep": 0.5}, "keep=0.5 has no effect with treatment='weight'"),
  ({"treatment": "mask", "score": "aum", "keep": 0.5}, "treatment='mask' needs the score of a"),
  ({"treatment": "mask", "score": "logp_sft"}, "score='logp_sft' has no zero"),
  ({"treatment": "weight", "score": "oracle"}, "treatment='weight' needs a score in nats"),
  ({"score": "forgetting", "keep": 0.5}, "score='forgetting' needs rival_checkpoints"),
  ({"rival_checkpoints": 1}, "rival_checkpoints=1 must be 2 to 600"),
])
def test_what_cannot_be_is_refused(fields, pattern):
  from dpr_jax.config import default_config, resolve

  if "start" in fields:
    config = default_config()
    config.methods.late = CleanedSFT(reference_fraction=0.0)
    config.methods.dpr = DPR(**fields)
    config.compare = ("late", "dpr", "cleaned_sft")
    with pytest.raises(UserError, match=f"config.methods.dpr: {pattern}"):
      resolve(config)
    return

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
