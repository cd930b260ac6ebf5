"""The folder of an evaluation, and the figures that are made of its lines."""

import itertools
import json

import numpy as np
import pytest

from dpr_jax.data.demos import Demo
from dpr_jax.errors import UserError
from dpr_jax.evaluation.benchmark_run import BenchmarkRun, EvaluationFolder, pass_at
from dpr_jax.evaluation.benchmarks.tasks import Tasks
from dpr_jax.evaluation.metrics import Length

BLOCKS = [[(0, 0), (0, 1), (1, 0), (1, 1)], [(2, 0), (2, 1)]]
RECORDS = [[{"index": i, "sample": s, "text": "é\u2028\r"} for i, s in block] for block in BLOCKS]
SETTINGS, CONTENTS = {"samples": 2, "stop": ("a",)}, {"data": "12ab"}


@pytest.fixture
def folder(tmp_path):
  folder = EvaluationFolder(tmp_path / "out" / "here")
  folder.check()
  folder.claim(SETTINGS, CONTENTS)
  return folder


def test_whatever_was_written_of_a_file_it_is_completed_to_the_same_one(folder):
  for block in RECORDS:
    folder.append(block)
  whole = folder.responses_file.read_bytes()
  first = whole.index(b'{"index": 2')
  assert folder.resume(BLOCKS) == 2 and folder.responses_file.read_bytes() == whole
  for size in range(len(whole)):  # A kill may cut it anywhere.
    folder.responses_file.write_bytes(whole[:size])
    done = folder.resume(BLOCKS)
    assert done == int(size >= first)
    for block in RECORDS[done:]:
      folder.append(block)
    assert folder.responses_file.read_bytes() == whole


def test_a_line_that_does_not_belong_there_is_named(folder):
  for block in RECORDS:
    folder.append(block)
  lines = folder.responses_file.read_text().split("\n")
  folder.responses_file.write_text("\n".join([lines[0], lines[2], *lines[2:]]))
  with pytest.raises(UserError, match=r"responses.jsonl:2: not the response 1 to prompt 0"):
    folder.resume(BLOCKS)


@pytest.mark.parametrize("wrong", ["[]", "{", "[" * 10**5, '{"index": 2, "sample": 0}', None])
def test_blocks_from_an_edited_line_on_are_made_again(folder, caplog, wrong):
  for block in RECORDS:
    folder.append(block)
  whole = folder.responses_file.read_bytes()
  for number, done in ((5, 1), (2, 0)):
    lines = whole.split(b"\n")
    edited = lines[number - 1].replace(b'"text": "', b'"text": "x')
    lines[number - 1] = edited if wrong is None else wrong.encode()
    folder.responses_file.write_bytes(b"\n".join(lines))
    assert folder.resume(BLOCKS) == done
    assert f"responses.jsonl:{number}: not what was written" in caplog.text
    for block in RECORDS[done:]:
      folder.append(block)
    assert folder.responses_file.read_bytes() == whole
  kept = folder.responses_file.with_name("responses.jsonl.damaged2")
  assert kept.read_bytes() == b"\n".join(lines)


def test_only_the_same_evaluation_goes_on(folder):
  folder.check()
  folder.claim(SETTINGS, CONTENTS)
  with pytest.raises(UserError, match=r"another --samples \(2 there, 3 here\)"):
    folder.claim({**SETTINGS, "samples": 3}, CONTENTS)
  with pytest.raises(UserError, match=r"another --shots \(None there, 5 here\)"):
    folder.claim({**SETTINGS, "shots": 5}, CONTENTS)
  with pytest.raises(UserError, match=r"other contents of --data \('12ab' there, 'ff' here\)"):
    folder.claim(SETTINGS, {"data": "ff"})


@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
def test_a_folder_of_something_else_is_refused(tmp_path, name):
  (tmp_path / name).write_text("{}")
  with pytest.raises(UserError, match=f"no config.json of an evaluation .{name}"):
    EvaluationFolder(tmp_path).check()
  with pytest.raises(UserError, match=f"{name} is a file"):
    EvaluationFolder(tmp_path / name / "below").check()


def test_pass_at_k_is_the_mean_over_all_choices_of_k(rng):
  right = rng.integers(0, 2, (7, 5))
  for k in range(1, 6):
    choices = [right[:, list(c)].any(axis=1) for c in itertools.combinations(range(5), k)]
    np.testing.assert_allclose(pass_at(k, right), np.mean(choices, axis=0), atol=1e-12)


def demos(n):
  return [Demo(({"role": "user", "content": f"add {i} 1"},), str(i + 1), "add") for i in range(n)]


def make_run(n, **fields):
  fields = dict(metrics={}, loaded=None, mesh=None, template="", batch_size=8, seed=0) | fields
  return BenchmarkRun(Tasks(), demos=demos(n), **fields)


def test_figures_average_the_samples_of_a_prompt_first(rng):
  n, samples = 12, 3
  run = make_run(n, samples=samples, metrics={"length": Length()})
  right, length = rng.integers(0, 2, (n, samples)), rng.integers(1, 9, (n, samples))
  records = [
      {"scores": {"accuracy": float(right[i, s]), "length": float(length[i, s])},
       "groups": ["even" if i % 2 == 0 else "odd"]}
      for i in range(n) for s in range(samples)
  ]
  found = run.results(records)
  metrics = found["metrics"]
  assert found["n"] == n and set(metrics) == set(found["columns"]) == {
      "accuracy", "length", "accuracy/even", "accuracy/odd", "pass@2", "pass@3",
  }
  assert metrics["accuracy"]["mean"] == pytest.approx(right.mean())
  assert metrics["accuracy/odd"]["mean"] == pytest.approx(right[1::2].mean())
  assert metrics["accuracy/odd"]["n"] == n // 2
  assert metrics["pass@3"]["mean"] == pytest.approx(right.any(axis=1).mean())
  # Student's t over prompts, whose means are what varies.
  half = 2.200985 * length.mean(axis=1).std(ddof=1) / np.sqrt(n)
  expected = [length.mean() - half, length.mean() + half]
  np.testing.assert_allclose(metrics["length"]["ci95"], expected, rtol=1e-5)


@pytest.mark.parametrize(("samples", "size"), [(1, 32), (3, 12), (8, 4), (20, 4)])
def test_blocks_cover_the_prompts_in_order(samples, size):
  run = make_run(50, samples=samples)
  assert [i for block in run.blocks for i in block] == list(range(50))
  assert {len(block) for block in run.blocks[:-1]} == {size}
  assert run.lines(range(2, 4)) == [(i, s) for i in (2, 3) for s in range(samples)]


def test_a_score_that_is_no_number_is_named():
  line = (0, 0, np.array([1]), "x", True, {"accuracy": float("nan")})
  with pytest.raises(UserError, match="^prompt 1: response 'x': accuracy is nan; a score must be"):
    make_run(1)._line(*line)


def test_data_without_examples_is_refused():
  with pytest.raises(UserError, match="^--benchmark=tasks: its `read` returned no examples"):
    make_run(0).check()


def test_lines_are_json_of_plain_types():
  scores = {"accuracy": np.float32(1)}
  line = make_run(1)._line(0, 0, np.arange(3, dtype=np.int32), "x", np.True_, scores)
  assert json.loads(json.dumps(line)) == line
  assert line["token_ids"] == [0, 1, 2] and line["hit_eos"] is True
