"""config.json over the parts of a run, and checkpoints of a run that is being written."""

import json
import shutil

import jax
import pytest

from dpr_jax import sharding, workdir
from dpr_jax.config import default_config, resolve
from dpr_jax.errors import UserError
from dpr_jax.loading import describe_checkpoint, load_checkpoint
from dpr_jax.weights.byte_tokenizer import byte_tokenizer


def test_the_versions_of_every_part_of_a_run_are_kept(tmp_path, monkeypatch):
  config, parts = resolve(default_config()), []
  run = workdir.Workdir(tmp_path)
  for jax_version in ("1", "1", "2", "1"):
    monkeypatch.setattr(workdir, "versions", lambda v=jax_version: {"jax": v})
    run.check(config)
    run.claim(config)
    parts.append(run.read_config())
  assert [p["versions"]["jax"] for p in parts] == ["1", "1", "2", "1"]
  assert [[v["jax"] for v in p["history"]] for p in parts] == [
      ["1"], ["1"], ["1", "2"], ["1", "2", "1"]
  ]
  # A run of before there was a history.
  record = {k: v for k, v in parts[1].items() if k != "history"}
  run.config_file.write_text(json.dumps(record))
  monkeypatch.setattr(workdir, "versions", lambda: {"jax": "2"})
  run.claim(config)
  assert [v["jax"] for v in run.read_config()["history"]] == ["1", "2"]


@pytest.mark.parametrize("missing", ["config", "model", "tokenizer", "checkpoints", "step"])
def test_a_stage_that_is_being_written_is_refused_in_one_line(tmp_path, make_model, missing):
  tokenizer = byte_tokenizer()
  cfg = make_model(1, vocab_size=len(tokenizer))[0].cfg
  record = {"config": {"sft": {}}, "seed": 0, "model": {"config": cfg.to_dict()}}
  tokenizer.save_pretrained(tmp_path / "tokenizer")
  (tmp_path / "sft" / "checkpoints").mkdir(parents=True)
  if missing == "config":
    (tmp_path / "config.json").write_text(json.dumps(record)[:40])
  else:
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in record.items() if k != missing})
    )
  if missing != "checkpoints":
    (tmp_path / "sft" / "checkpoints" / "7" / "variables").mkdir(parents=True)
  if missing == "tokenizer":
    shutil.rmtree(tmp_path / "tokenizer")
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  for load in (describe_checkpoint, lambda spec: load_checkpoint(spec, mesh)):
    if load is describe_checkpoint and missing == "step":
      continue
    with pytest.raises(UserError, match=str(tmp_path)) as caught:
      load(f"{tmp_path}/sft")
    assert "\n" not in str(caught.value)
