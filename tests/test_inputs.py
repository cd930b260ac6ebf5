"""A run that is resumed reads what it began with, or is refused: tokenizer, template, weights."""

import datetime
import json
import shutil
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpr_jax import inputs, sharding
from dpr_jax.config import debug_config, default_config, resolve
from dpr_jax.data.templates import render_prompt
from dpr_jax.errors import UserError
from dpr_jax.models import ModelConfig
from dpr_jax.references.checkpoint import Checkpoint
from dpr_jax.run import set_up
from dpr_jax.weights import load_tokenizer, save_pretrained
from dpr_jax.weights.byte_tokenizer import byte_tokenizer
from dpr_jax.workdir import Workdir

ASK = [{"role": "user", "content": "q"}]
DATED = """{{ 'On ' + strftime_now("%d %b %Y") + '\\n' }}"""


@pytest.fixture
def pretrained(tmp_path, make_model):
  """A folder of a random model whose template writes the date."""
  cfg = ModelConfig(vocab_size=261, hidden_size=16, mlp_size=24, num_layers=1, num_heads=4,
                    num_kv_heads=2, head_dim=4, max_length=512)
  fields = {k: getattr(cfg, k) for k in (
      "vocab_size", "hidden_size", "mlp_size", "num_layers", "num_heads", "num_kv_heads",
      "head_dim", "max_length")}
  model, variables = make_model(0, **fields)
  tokenizer = byte_tokenizer()
  tokenizer.chat_template = DATED + tokenizer.chat_template
  save_pretrained(tmp_path / "m", model.cfg, variables["params"], tokenizer=tokenizer)
  return tmp_path / "m"


@pytest.fixture
def again(tmp_path, pretrained):
  """again(template) -> Run, set up in the same workdir every time; nothing is trained."""
  demos = tmp_path / "demos.jsonl"
  demos.write_text("".join(
      json.dumps({"prompt": f"q{i}", "response": f"r{i}"}) + "\n" for i in range(20)))

  def run(template="", reference=None, folder="run", like=None):
    config = debug_config(default_config())
    config.model.pretrained, config.data.demos = str(pretrained), str(demos)
    config.data.template = str(template)
    config.reference = reference or config.reference
    config.data.holdout = config.eval.num_prompts = 4
    config.data.row_length, config.data.prompt_length = 128, 96
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
      return set_up(resolve(config), Workdir(tmp_path / folder), mesh, like)

  return run


def on(monkeypatch, year):
  monkeypatch.setattr(inputs, "today", lambda: datetime.date(year, 3, 1))


def test_the_date_of_a_template_is_that_of_the_first_day(again, monkeypatch):
  on(monkeypatch, 2031)
  first = again()
  on(monkeypatch, 2032)
  second = again()
  np.testing.assert_array_equal(first.data.rows.tokens, second.data.rows.tokens)
  stage = load_tokenizer(second.workdir.tokenizer)  # What score and export read.
  for tokenizer in (first.tokenizer, second.tokenizer, stage):
    assert tokenizer.decode(render_prompt(ASK, tokenizer)).startswith("On 01 Mar 2031\n")


def test_the_points_of_a_sweep_have_one_date(again, monkeypatch):
  on(monkeypatch, 2031)
  first = again()
  on(monkeypatch, 2032)
  point = again(folder="beta=1", like=first)
  assert point.tokenizer.chat_template == first.tokenizer.chat_template
  assert point.workdir.read_config()["inputs"]["date"] == "2031-03-01"


def test_a_copy_that_was_damaged_is_made_again_as_it_was(again, monkeypatch, caplog):
  on(monkeypatch, 2031)
  folder = again().workdir.tokenizer
  before = {p.name: p.read_bytes() for p in folder.iterdir()}
  (folder / "chat_template.jinja").write_text("")
  on(monkeypatch, 2032)
  again()
  assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
  assert "tokenizer.damaged" in caplog.text
  assert (folder.with_name("tokenizer.damaged") / "chat_template.jinja").read_text() == ""


def test_a_template_of_the_config_travels_with_the_run(again, tmp_path):
  template = tmp_path / "mine.jinja"
  template.write_text(
      "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
      "{% else %}?{% endif %}{% endfor %}"
  )
  first = again(template)
  template.rename(tmp_path / "moved.jinja")
  second = again(template)
  np.testing.assert_array_equal(first.data.rows.tokens, second.data.rows.tokens)
  stage = load_tokenizer(second.workdir.tokenizer)
  np.testing.assert_array_equal(render_prompt(ASK, stage), render_prompt(ASK, first.tokenizer))
  template.write_text("EDITED {% for m in messages %}{{ m['content'] }}{% endfor %}")
  with pytest.raises(UserError, match="^config.data.template: the file has changed"):
    again(template)


def _another_template(folder):
  tokenizer = byte_tokenizer()
  tokenizer.chat_template = "NEW " + tokenizer.chat_template
  tokenizer.save_pretrained(folder)


def _one_bit_of_the_weights(folder):
  path = folder / "model.safetensors"
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize("change,file", [
    (_another_template, "chat_template.jinja"), (_one_bit_of_the_weights, "model.safetensors"),
], ids=["tokenizer", "weights"])
def test_another_base_is_refused_by_name_and_nothing_is_written(again, pretrained, change, file):
  workdir = again().workdir
  files = lambda: {p: p.read_bytes() for p in workdir.path.rglob("*") if p.is_file()}
  before = files()
  change(pretrained)
  with pytest.raises(UserError, match=f"^config.model.pretrained: {file}: the file has changed"):
    again()
  assert files() == before


def test_rows_that_differ_for_no_known_reason_are_refused(again, monkeypatch):
  run = again()
  arrays = run.data.arrays()
  monkeypatch.setattr(
      type(run.data), "arrays", lambda self: {**arrays, "tokens": arrays["tokens"] + 1})
  with pytest.raises(UserError, match="^config.data: the same files give other tokens"):
    again()


def test_a_lora_stage_is_refused_over_other_weights(again, pretrained):
  record = again().workdir.read_config()
  inputs.check_base(record)
  tensors = load_file(pretrained / "model.safetensors")
  name = sorted(tensors)[0]
  save_file({**tensors, name: tensors[name] + 1}, pretrained / "model.safetensors")
  with pytest.raises(UserError, match="model.safetensors is not the file that the LoRA stage"):
    inputs.check_base(record)
  (pretrained / "model.safetensors").unlink()
  with pytest.raises(UserError, match="None now"):
    inputs.check_base(record)


def test_another_checkpoint_that_is_read_must_stay_as_it_is(again, pretrained, tmp_path):
  other = tmp_path / "other"
  shutil.copytree(pretrained, other)
  reference = Checkpoint(path=str(other))
  again(reference=reference)
  again(reference=reference)
  _one_bit_of_the_weights(other)
  with pytest.raises(UserError, match="^config.reference.path: model.safetensors: the file has"):
    again(reference=reference)
  shutil.rmtree(other)  # It may be in another place by now: what needs it will say so.
  again(reference=reference)


def test_a_stage_is_not_read_with_a_tokenizer_that_was_edited(again):
  workdir = again().workdir
  path = workdir.tokenizer / "chat_template.jinja"
  path.write_text("EDITED" + path.read_text())
  with pytest.raises(UserError, match="chat_template.jinja: it is not what the run wrote"):
    workdir.load_tokenizer()
  assert path.read_text().startswith("EDITED")


def test_weights_of_an_adapter_are_those_of_its_base_too(tmp_path, pretrained):
  adapter = tmp_path / "adapter"
  adapter.mkdir()
  fields = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "../m"}
  (adapter / "adapter_config.json").write_text(json.dumps(fields))
  before = inputs.pretrained_files(adapter)
  weights = load_file(pretrained / "model.safetensors")
  weights["model.norm.weight"] = weights["model.norm.weight"] + 1
  save_file(weights, pretrained / "model.safetensors")
  after = inputs.pretrained_files(adapter)
  assert {n for n in before if before[n] != after[n]} == {"base/model.safetensors"}


def test_hosts_of_all_time_zones_have_one_date(monkeypatch):
  days = set()
  for zone in ("Etc/GMT+12", "Etc/GMT-14"):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    days.add(inputs.today())
  monkeypatch.undo()
  time.tzset()
  assert len(days) == 1
