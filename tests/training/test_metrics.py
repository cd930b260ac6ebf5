"""metrics.jsonl: one line a step, one step late, never a step twice."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.errors import Diverged, UserError
from dpr_jax.training.metrics import MetricsWriter, read_metrics


def _writer(directory, **fields):
  return MetricsWriter(directory, **{"stage": "sft", "steps": 6, "progress": False, **fields})


def _metrics(step):
  device = {"loss": jnp.float32(step / 2), "tokens": jnp.float32(10.0)}
  return {**device, "kl": np.float32(0.1), "skipped": 0.0}


def test_lines_hold_totals_and_are_written_one_step_late(tmp_path):
  with _writer(tmp_path) as writer:
    for step in range(1, 4):
      writer.write(step, _metrics(step))
      assert writer.latest.get("step", 0) == step - 1
  lines = read_metrics(tmp_path / "metrics.jsonl")
  assert [(x["step"], x["loss"], x["tokens"]) for x in lines] == [
      (1, 0.5, 10.0), (2, 1.0, 20.0), (3, 1.5, 30.0)
  ]
  assert all("skipped" not in x and x["kl"] == pytest.approx(0.1) for x in lines)


@pytest.mark.parametrize("metrics, told", [
    ({"empty": 1.0}, "sft: step 2 trained no token"), ({"empty": 0.0}, ""),
    ({"empty": 0.0, "trained_share": 0.04}, "sft: step 2 trained 4.0% of the tokens"),
    ({"empty": 0.0, "trained_share": 0.4}, ""),
])
def test_somebody_is_told_once_that_nothing_is_trained(tmp_path, capsys, metrics, told):
  with _writer(tmp_path) as writer:
    writer.write(1, _metrics(1))
    for step in (2, 3):
      writer.write(step, {**_metrics(step), **metrics})
  said = capsys.readouterr().err
  assert said.startswith(told) and said.count("\n") == bool(told)
  kept = read_metrics(tmp_path / "metrics.jsonl")[1].get("empty")
  assert kept == (metrics["empty"] or None)


def test_every_and_the_last_step(tmp_path):
  with _writer(tmp_path, every=4) as writer:
    for step in range(1, 7):
      writer.write(step, _metrics(step))
      if step == 2:
        writer.flush()
  lines = read_metrics(tmp_path / "metrics.jsonl")
  assert [x["step"] for x in lines] == [2, 4, 6]
  assert [x["tokens"] for x in lines] == [20.0, 40.0, 60.0]


def test_a_resumed_writer_cuts_what_came_after_its_step(tmp_path):
  with _writer(tmp_path) as writer:
    for step in range(1, 6):
      writer.write(step, _metrics(step))
  with open(tmp_path / "metrics.jsonl", "a") as f:
    f.write('{"step": 6, "lo')  # the process died here.
  with _writer(tmp_path, start_step=3) as writer:
    writer.write(4, _metrics(40))
  lines = read_metrics(tmp_path / "metrics.jsonl")
  assert [(x["step"], x["loss"], x["tokens"]) for x in lines] == [
      (1, 0.5, 10.0), (2, 1.0, 20.0), (3, 1.5, 30.0), (4, 20.0, 40.0)
  ]
  assert lines[3]["seconds"] >= lines[2]["seconds"]


@pytest.mark.parametrize("bad", [dict(loss=np.nan), dict(loss=np.inf), dict(skipped=1.0)])
def test_what_is_not_finite_raises_and_is_not_written(tmp_path, bad):
  with pytest.raises(Diverged, match="sft: .* step 2 is not finite"):
    with _writer(tmp_path) as writer:
      writer.write(1, _metrics(1))
      writer.write(2, {**_metrics(2), **bad})
      writer.flush()
  assert [x["step"] for x in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_lines_are_json_even_where_a_metric_is_not_finite(tmp_path):
  with _writer(tmp_path) as writer:
    writer.write(1, {**_metrics(1), "kl": jnp.inf})
  text = (tmp_path / "metrics.jsonl").read_text()

  def refuse(name):
    raise AssertionError(name)

  assert json.loads(text, parse_constant=refuse)["kl"] is None


def test_tensorboard_gets_the_same_scalars(tmp_path):
  with _writer(tmp_path, tensorboard_dir=tmp_path / "board") as writer:
    writer.write(1, _metrics(1))
  (events,) = (tmp_path / "board").iterdir()
  data = events.read_bytes()
  assert b"sft/loss" in data and b"sft/kl" in data and b"sft/step" not in data


@pytest.mark.parametrize("broken", [b"\0" * 40, b"[1]", b'{"step": 3, "lo', b"\xff\xfe"])
def test_a_damaged_line_hides_no_later_one(tmp_path, caplog, broken):
  with _writer(tmp_path) as metrics:
    for step in range(1, 5):
      metrics.write(step, {"loss": 1.0, "tokens": 8.0})
  path = tmp_path / "metrics.jsonl"
  lines = path.read_bytes().split(b"\n")
  path.write_bytes(b"\n".join([*lines[:2], broken, *lines[3:]]))
  damaged = path.read_bytes()
  assert [line["step"] for line in read_metrics(path)] == [1, 2, 4]
  assert "line 3 is damaged" in caplog.text
  # A resumed stage keeps what there is, counts on, and leaves the damaged file under another name.
  with _writer(tmp_path, start_step=4) as metrics:
    metrics.write(5, {"loss": 1.0, "tokens": 8.0})
  assert [(line["step"], line["tokens"]) for line in read_metrics(path)] == [
      (1, 8), (2, 16), (4, 32), (5, 40)]
  assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged


@pytest.mark.parametrize("left", [0, 2])
def test_metrics_that_were_cut_are_refused(tmp_path, left):
  """The totals of a resumed stage go on from its last line."""
  with _writer(tmp_path) as metrics:
    for step in range(1, 5):
      metrics.write(step, {"loss": 1.0, "tokens": 8.0})
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:left]))
  before = path.read_bytes()
  with pytest.raises(UserError, match="its lines up to step 4, .*checkpoints.damaged and run"):
    _writer(tmp_path, start_step=4)
  assert path.read_bytes() == before


def _flip_digit(data):
  return data.replace(b'"loss": 1.0', b'"loss": 3.0', 1)


@pytest.mark.parametrize("edit", [
    _flip_digit, lambda data: data.replace(b"loss", b"lops", 1),
    lambda data: data.replace(b"{", b"\0", 1), lambda data: b"".join(data.splitlines(True)[1:]),
])
def test_metrics_that_were_edited_are_refused(tmp_path, edit):
  """Steps 1 to 4 are covered by a fingerprint, as of a checkpoint; step 5 came after it."""
  with _writer(tmp_path) as metrics:
    for step in range(1, 6):
      metrics.write(step, {"loss": float(step % 3 or 1), "tokens": 8.0})
      if step == 4:
        metrics.flush()
        known = metrics.fingerprint()
  path = tmp_path / "metrics.jsonl"
  good = path.read_bytes()
  path.write_bytes(edit(good))
  with pytest.raises(UserError, match="its lines up to step 4, .*checkpoints.damaged and run"):
    _writer(tmp_path, start_step=4, fingerprint=known)
  assert path.read_bytes() == edit(good)
  path.write_bytes(good)
  with _writer(tmp_path, start_step=4, fingerprint=known) as metrics:
    assert metrics.fingerprint() == known
