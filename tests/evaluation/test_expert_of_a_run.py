"""A student of a known expert: its stages, and the distance of its systems to the expert."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dpr_jax import export
from dpr_jax.errors import UserError
from dpr_jax.evaluation.evaluate import evaluate
from dpr_jax.evaluation.metrics import Expert
from dpr_jax.evaluation.results import build_results
from dpr_jax.loading import load_checkpoint
from dpr_jax.models.layer_pruning import kept_layers
from dpr_jax.run import set_up
from dpr_jax.weights import save_pretrained
from dpr_jax.workdir import Workdir, read_lines, write_lines


def _small(config):
  config.compare = ()
  config.eval.num_prompts = config.eval.batch_size = config.data.holdout = 8
  config.eval.corrupted_tokens = config.eval.heatmaps = 0


@pytest.fixture(scope="module")
def plain(train_sft):
  """A run that has not trained: its system base is there."""
  return train_sft(_small, steps=False)


def _against(run, spec):
  """The run with an expert, and nothing else to measure."""
  metrics = {"expert": Expert()}
  section = dataclasses.replace(run.config.eval, expert=str(spec), metrics=metrics)
  return dataclasses.replace(run, config=dataclasses.replace(run.config, eval=section))


def _folder(path, run, params, tokenizer=None, **changes):
  save_pretrained(
      path, dataclasses.replace(run.model.cfg, **changes), params, tokenizer or run.tokenizer
  )
  return path


def test_base_is_at_no_distance_from_itself_and_at_some_from_another(plain, tmp_path, rng):
  """On given samples, one of them cut off."""
  records = [
      {"mode": mode, "token_ids": [*rng.integers(0, 256, n).tolist(), *end]}
      for mode in ("sampled", "greedy")
      for n, end in zip((1, 3, 5, 2, 4, 1, 2, 6), [plain.stop_ids[:1]] * 7 + [()])
  ]
  write_lines(plain.workdir.system_file("base"), records)
  params, path = plain.initial_variables("float32")["params"], plain.workdir.measures_file

  def measured(spec):
    evaluate(_against(plain, spec), ["base"])
    return json.loads(path.read_text())["values"]["base"]

  own = _folder(tmp_path / "own", plain, params)
  noise = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32) / 2, params)
  other = _folder(tmp_path / "other", plain, noise)
  assert measured("") == {}
  far = measured(other)
  assert min(far["reverse_kl"] + far["forward_kl"]) > 0.1
  assert list(map(len, far["expert_logp"])) == [len(r["token_ids"]) for r in records[:8]]
  assert measured(own) == far  # What is done is not done again.
  path.unlink()
  near = measured(own)
  np.testing.assert_allclose(near["reverse_kl"] + near["forward_kl"], 0.0, atol=1e-5)
  assert len(near["reverse_kl"]) == len(near["forward_kl"]) == 8


def test_an_expert_that_cannot_be_compared_is_refused_before_anything_is_written(plain, tmp_path):
  params, tokens = plain.initial_variables("float32")["params"], plain.tokenizer
  right = _folder(tmp_path / "right", plain, params)
  short = _folder(tmp_path / "short", plain, params, max_length=16)
  other = _folder(tmp_path / "other", plain, params)
  fields = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
  a, b = tokens.convert_ids_to_tokens([70, 71])
  vocab = fields["model"]["vocab"]
  vocab[a], vocab[b] = vocab[b], vocab[a]
  (other / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
  model = dataclasses.replace(
      plain.config.model, shape=dataclasses.replace(plain.config.model.shape, vocab_size=300)
  )
  cases = [
      (tmp_path / "nowhere", {}, r"^config\.eval\.expert: .*nowhere: no such checkpoint; expected"),
      (other, {}, r"^config\.eval\.expert=.* another vocabulary .*'F' .* 71 there, 70 here"),
      (short, {}, r"new_tokens=38 exceeds the 16 tokens that config\.eval\.expert="),
      (right, {"model": model}, r"^config\.eval\.expert=.* logits, the run's model 300"),
  ]
  for spec, changes, message in cases:
    config = dataclasses.replace(_against(plain, spec).config, **changes)
    with pytest.raises(UserError, match=message):
      set_up(config, Workdir(tmp_path / "new"), plain.mesh)
    assert not (tmp_path / "new").exists()


# --- The whole way ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expert(train_sft, tmp_path_factory):
  """(Run of a model of three layers, its SFT stage as a Hugging Face folder)."""

  def change(config):
    config.model.shape.num_layers = 3

  run = train_sft(change)
  folder = tmp_path_factory.mktemp("expert") / "hf"
  save_pretrained(folder, run.model.cfg, run.sft()["params"], run.tokenizer)
  return run, folder


@pytest.fixture(scope="module")
def student(expert, train_sft):
  """Adapters over two of those layers; with the stage for the expert, no DPR."""
  run, folder = expert

  def change(config):
    config.model.pretrained, config.model.keep_layers = str(folder), 2
    config.model.lora.rank = 2
    _small(config)
    config.eval.expert = str(run.workdir.stage("sft"))
    config.compare = ("contrastive", "low_temperature")

  return train_sft(change)


@pytest.mark.slow
def test_the_student_has_rows_of_the_expert_and_is_a_checkpoint(expert, student, tmp_path):
  record = student.workdir.read_config()
  assert record["model"]["config"]["num_layers"] == 2
  whole, ours = expert[0].sft()["params"], student.initial_variables("float32")["params"]
  rows = list(kept_layers(3, 2))
  pick = lambda x: np.asarray(x)[rows]
  jax.tree.map(np.testing.assert_array_equal, ours["group_0"], jax.tree.map(pick, whole["group_0"]))
  np.testing.assert_array_equal(ours["embed"]["table"], whole["embed"]["table"])
  loaded = load_checkpoint(str(student.workdir.stage("sft")), student.mesh)
  assert loaded.model.cfg.num_layers == 2 and loaded.keep_layers == 2
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, student.sft())
  with pytest.raises(UserError, match="--adapter: .* adapts 2 of the layers of .* without"):
    export.main([f"--model={student.workdir.stage('sft')}", f"--output={tmp_path}/a", "--adapter"])
  export.main([f"--model={student.workdir.stage('sft')}", f"--output={tmp_path}/hf"])
  assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.slow
def test_every_system_is_measured_and_the_stage_goes_on(student):
  evaluate(student, ["sft", "base"])
  path = student.workdir.measures_file
  part = json.loads(path.read_text())
  assert set(part["values"]) == {"sft", "base"}
  part["values"]["sft"]["reverse_kl"][0] = 123.0  # What is done is not done again.
  path.write_text(json.dumps(part))
  evaluate(student)
  found = json.loads(path.read_text())["values"]
  assert set(found) == {"base", "ref", "sft", "contrastive", "low_temperature"}
  assert found["sft"] == part["values"]["sft"]
  for name, scores in found.items():
    rows = read_lines(student.workdir.system_file(name))
    lengths = [r["length"] for r in rows if r["mode"] == "sampled"]
    assert [len(x) for x in scores["expert_logp"]] == lengths
    assert len(scores["forward_kl"]) == 8 and min(scores["forward_kl"]) > 0
    assert min(scores["reverse_kl"]) > 0
  results = build_results([student.workdir.path], [0])
  assert results["systems"]["base"]["forward_kl"]["n"] == 8
  assert {"reverse_kl", "forward_kl", "expert_logp"} <= {
      c["metric"] for c in results["comparisons"] if c["pair"] == ["contrastive", "sft"]
  }
