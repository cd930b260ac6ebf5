"""python -m dpr_jax.generate --best_of: the sample with the highest reward of a judge."""

import json
import pathlib
import re

import numpy as np
import pytest

from dpr_jax import cli, generate, score
from dpr_jax.weights import save_pretrained
from dpr_jax.weights.byte_tokenizer import byte_tokenizer
from dpr_jax.workdir import read_lines

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "extending.md"


def call(module, *argv):
  cli.run_entry_point(module.main, [str(a) for a in argv])


@pytest.fixture
def given(tmp_path, make_model):
  """The flags of `generate`, for the model `a`; there is a model `b` too."""
  for seed, name in enumerate("ab"):
    model, variables = make_model(seed, vocab_size=len(byte_tokenizer()), max_length=128)
    save_pretrained(tmp_path / name, model.cfg, variables["params"], tokenizer=byte_tokenizer())
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text("".join(json.dumps({"prompt": f"ask {i}"}) + "\n" for i in range(3)))
  return [f"--model={tmp_path}/a", f"--input={prompts}", "--max_new_tokens=6", "--batch_size=4"]


def test_the_sample_with_the_highest_log_ratio_is_kept(given, tmp_path):
  out = {name: tmp_path / f"{name}.jsonl" for name in ("all", "best", "likely", "each")}
  a, b = tmp_path / "a", tmp_path / "b"
  call(generate, *given, "--samples=4", f"--output={out['all']}")
  call(generate, *given, "--best_of=4", f"--output={out['best']}", "--judge=log_ratio",
       f"--judge.sft={a}", f"--judge.ref={b}")
  call(generate, *given, "--best_of=4", f"--output={out['likely']}", "--judge=log_ratio",
       f"--judge.sft={a}")
  # The reward of each sample, by the entry point that scores the same tokens.
  call(score, f"--sft={a}", f"--ref={b}", f"--input={out['all']}", f"--output={out['each']}",
       "--batch_size=4")
  each = read_lines(out["each"])
  ratio = np.array([r["reward"] for r in each]).reshape(3, 4)
  logp = np.array([sum(r["logp_sft"]) for r in each]).reshape(3, 4)
  assert min(ratio.std(), logp.std(), np.ptp(ratio.argmax(1))) > 0.1
  for name, expected in (("best", ratio), ("likely", logp)):
    records = read_lines(out[name])
    assert len(records) == 3
    for i, record in enumerate(records):
      np.testing.assert_allclose(record["rewards"], expected[i], atol=1e-4)
      best = int(expected[i].argmax())
      assert record["reward"] == record["rewards"][best] == max(record["rewards"])
      assert record["token_ids"] == each[4 * i + best]["token_ids"]
      assert record["prompt"] == f"ask {i}"


def test_a_judge_of_a_users_file_chooses(given, tmp_path):
  file = tmp_path / "brevity.py"
  file.write_text(re.search(r'```python title="brevity.py"\n(.*?)```', PAGE.read_text(), re.S)[1])
  call(generate, *given, "--best_of=4", f"--judge={file}:Brevity", f"--output={tmp_path}/o.jsonl")
  for record in read_lines(tmp_path / "o.jsonl"):
    assert record["reward"] == -len(record["response"]) == max(record["rewards"])


BAD = {
    "no judge": (["--best_of=4"], "--best_of=N, of at least 2, and a judge"),
    "no number": (["--judge_model=x"], "--best_of=N, of at least 2, and a judge"),
    "words": (["--best_of=2", "--judge_url=http://x/v1", "--judge_model=j"],
              "--judge: --best_of needs a judge that gives rewards"),
    "greedy": (["--best_of=2", "--judge=log_ratio", "--judge.sft=x", "--temperature=0"],
               "--best_of chooses among samples"),
    "no sft": (["--best_of=2", "--judge=log_ratio"], "--judge: sft is missing"),
    "nothing there": (["--best_of=2", "--judge=log_ratio", "--judge.sft=nowhere"],
                      "nowhere: no such checkpoint"),
    "no field": (["--best_of=2", "--judge=log_ratio", "--judge.sft=x", "--judge_model=y"],
                 "--judge_model: --judge=log_ratio has no model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(given, tmp_path, capsys, case):
  argv, message = BAD[case]
  with pytest.raises(SystemExit) as exit_info:
    call(generate, *given, *argv, f"--output={tmp_path}/out.jsonl")
  error = capsys.readouterr().err.strip()
  assert exit_info.value.code == 2 and error.count("\n") == 0 and message in error, error
  assert not (tmp_path / "out.jsonl").exists()
