"""Evaluation prompts that the model was trained on are found, and told apart from held-out ones."""

import json
import types

import pytest

from dpr_jax.config import debug_config, default_config, resolve, to_json
from dpr_jax.data.dataset import fingerprint, split_demos
from dpr_jax.data.demos import Demo
from dpr_jax.errors import UserError
from dpr_jax.evaluation.overlap import find_overlap


def asked(text, **more):
  return Demo(({"role": "user", "content": text},), **more)


@pytest.fixture
def stage(tmp_path):
  """make(**fields of config.data) -> a model of a workdir that was trained on them."""

  def make(**fields):
    config = debug_config(default_config())
    for name, value in fields.items():
      setattr(config.data, name, value)
    config = resolve(config)
    data = {"blake2b": fingerprint(config.data.demos)} if config.data.demos else {}
    (tmp_path / "config.json").write_text(
        json.dumps({"config": to_json(config), "seed": 3, "data": data}))
    return types.SimpleNamespace(workdir=tmp_path), split_demos(config.data, 3)

  return make


def test_training_prompts_of_the_built_in_tasks_are_found(stage, caplog):
  loaded, (train, heldout, *_) = stage(num_demos=200, holdout=40)
  demos = [heldout[0], train[7], heldout[1], train[199]]
  found = find_overlap(loaded, demos, strict=False)
  assert found["count"] == 2 and found["demos"] == "built-in tasks"
  assert [x["prompt"] for x in found["first"]] == ["tasks/train[7]", "tasks/train[199]"]
  assert caplog.text.count("2 of 4 prompts are among the demonstrations") == 1
  with pytest.raises(UserError, match="--strict_overlap: 2 of 4 prompts .*first, tasks/train"):
    find_overlap(loaded, demos, strict=True)
  caplog.clear()
  assert find_overlap(loaded, heldout, strict=True)["count"] == 0 and not caplog.text


def test_prompts_of_a_file_are_compared_but_for_case_and_spacing(stage, tmp_path):
  path = tmp_path / "demos.jsonl"
  lines = [json.dumps({"prompt": f"Say {i}", "response": "x"}) + "\n" for i in range(99)]
  path.write_text("".join(lines))
  loaded, (train, heldout, *_) = stage(demos=str(path), holdout=40)
  question = train[4].prompt[-1]["content"]
  demos = [asked(f" {question.upper()}\n"), asked(heldout[0].prompt[-1]["content"]),
           asked(f"Q: {question} A:", meta={"doc": {"id": 3, "question": question}})]
  found = find_overlap(loaded, demos, strict=False)
  assert found["count"] == 2 and found["demos"] == str(path)
  assert found["first"][0] == {"prompt": "prompt 1", "demo": train[4].source}
  path.write_text("".join(lines[:-1]))
  unknown = find_overlap(loaded, demos, strict=False)["unknown"]
  assert f"config.data.demos={path}" in unknown and "not the file of that run" in unknown
  with pytest.raises(UserError, match="--strict_overlap: the training demonstrations are unknown"):
    find_overlap(loaded, demos, strict=True)
  path.unlink()
  assert "no such file" in find_overlap(loaded, demos, strict=False)["unknown"]
