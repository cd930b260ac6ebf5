"""Finished files of a run: those that are not what was written are renamed and made again."""

import json

import pytest

from dpr_jax.errors import UserError
from dpr_jax.workdir import Workdir


@pytest.fixture
def finished(tmp_path):
  """A workdir with one output of each kind, and a finished stage."""
  workdir = Workdir(tmp_path)
  for path in (workdir.system_file("sft"), workdir.frontier / "sft.jsonl",
               workdir.corruption_file, workdir.samples / "heatmap_demos.jsonl"):
    workdir.write(path, [{"response": "a"}, {"response": "b"}])
  workdir.write(workdir.measures_file, {"values": {"sft": {"heldout_nll": [1.0]}}})
  workdir.write(workdir.reference_file, {"candidates": [], "chosen": 1})
  (workdir.stage("sft") / "checkpoints").mkdir(parents=True)
  for name in ("metrics.jsonl", "stopped.json"):
    (workdir.stage("sft") / name).write_text('{"step": 1}\n')
    workdir.record(workdir.stage("sft") / name)
  return workdir


def _empty(path):
  path.write_text("")


def _cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _edit(path):
  """Still JSON."""
  text = path.read_text()
  digit = next((c for c in text if c.isdigit()), None)
  path.write_text(text.replace(digit, str(int(digit) + 1)) if digit else text.replace('"b"', '"c"'))


def _outputs(workdir):
  return [p for p in sorted(workdir.path.rglob("*.json*"))
          if p.suffix != ".damaged" and p.name not in ("metrics.jsonl", "checksums.json")]


@pytest.mark.parametrize("damage", [_empty, _cut, _edit], ids=lambda f: f.__name__)
def test_each_damaged_output_makes_way(finished, caplog, damage):
  outputs = _outputs(finished)
  assert len(outputs) == 7
  for path in outputs:
    before = path.read_bytes()
    damage(path)
    damaged = path.read_bytes()
    assert damaged != before
    caplog.clear()
    finished.set_aside_damaged()
    assert not path.exists() and path.with_name(path.name + ".damaged").read_bytes() == damaged
    (message,) = [r.getMessage() for r in caplog.records]
    assert str(path) in message and "\n" not in message
    path.write_bytes(before)
    finished.record(path)
  finished.set_aside_damaged()
  assert _outputs(finished) == sorted(outputs)


@pytest.mark.parametrize("damage", [_empty, _edit], ids=lambda f: f.__name__)
def test_metrics_of_a_finished_stage_are_refused_with_the_command(finished, damage):
  path = finished.stage("sft") / "metrics.jsonl"
  damage(path)
  checkpoints = path.parent / "checkpoints"
  with pytest.raises(UserError, match=f"mv {checkpoints} {checkpoints}.damaged and run"):
    finished.set_aside_damaged()
  checkpoints.rename(checkpoints.with_name("checkpoints.damaged"))  # As it says.
  finished.set_aside_damaged()


def test_a_stage_that_trains_again_may_write_its_metrics(finished):
  path = finished.stage("sft") / "metrics.jsonl"
  finished.record(path, finished=False)
  path.write_text("")
  finished.set_aside_damaged()
  assert path.exists()


def test_what_was_not_recorded_must_be_json(finished, caplog):
  finished.checksums_file.unlink()  # As a run leaves it that was killed before.
  finished.set_aside_damaged()
  assert not caplog.records and len(_outputs(finished)) == 7
  finished.reference_file.write_text("{")
  finished.system_file("sft").write_text("")
  finished.set_aside_damaged()
  assert len(caplog.records) == 2 and not finished.reference_file.exists()


def test_damaged_checksums_are_set_aside(finished, caplog):
  text = finished.checksums_file.read_text()
  finished.checksums_file.write_text(text.replace("reference", "referense"))
  finished.set_aside_damaged()
  assert "checksums.json.damaged" in caplog.text and len(_outputs(finished)) == 7
  assert json.loads(finished.system_file("sft").read_text().splitlines()[0]) == {"response": "a"}


def test_an_edited_config_json_is_read_from_its_copy(tmp_path, caplog):
  workdir = Workdir(tmp_path)
  workdir.write_config({"seed": 1, "versions": {"jax": "0.10"}, "share": float("nan")})
  assert workdir.read_config() == {"seed": 1, "versions": {"jax": "0.10"}, "share": None}
  text = workdir.config_file.read_text()
  workdir.config_file.write_text(text.replace('"seed": 1', '"seed": 2'))
  assert workdir.read_config()["seed"] == 1  # Of the copy.
  assert "config.json: not what the run wrote; restore it from a copy; its copy" in caplog.text
  workdir.write_config(workdir.read_config())
  assert workdir.config_file.read_text() == text
  assert '"seed": 2' in (tmp_path / "config.json.damaged").read_text()
  for path in (workdir.config_file, tmp_path / ".config.json"):
    path.write_text(text.replace('"seed": 1', '"seed": 2'))
  with pytest.raises(UserError, match="config.json: not what the run wrote; restore it"):
    workdir.read_config()
def test_a_damaged_object_of_a_bucket_makes_way(bucket, caplog):
  workdir = Workdir(bucket / "damaged")
  path = workdir.system_file("sft")
  workdir.write(path, [{"response": "b"}])
  workdir.set_aside_damaged()
  assert path.exists()
  _edit(path)
  damaged = path.read_bytes()
  workdir.set_aside_damaged()
  assert not path.exists() and path.with_name("sft.jsonl.damaged").read_bytes() == damaged
  assert caplog.text.count("renamed to sft.jsonl.damaged") == 1
