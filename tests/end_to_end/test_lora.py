"""The whole way with adapters: SFT, DPR, checkpoints, score and export."""

import json

import numpy as np
import pytest

from dpr_jax import cli, export, generate, score
from dpr_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def lora_run(entry_point, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("lora") / "run"
  flags = ("--config.model.lora.rank=2", "--config.sft.optimizer.learning_rate=0.01",
           "--config.eval.frontier_samples=0")
  entry_point.finish(entry_point.start(workdir, *flags))
  return workdir


def call(module, *argv):
  cli.run_entry_point(module.main, [str(a) for a in argv])


def test_the_adapter_learns_and_is_all_that_is_saved(lora_run):
  lines = read_metrics(lora_run / "sft" / "metrics.jsonl")
  assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
  record = json.loads((lora_run / "config.json").read_text())
  files = (lora_run / "sft" / "checkpoints" / "20" / "variables").rglob("*")
  saved = sum(p.stat().st_size for p in files if p.is_file())
  assert saved < 4 * record["model"]["num_params"]  # float32 parameters alone would be more.
  assert abs(read_metrics(lora_run / "dpr" / "metrics.jsonl")[0]["kl"]) < 1e-5


def test_score_and_export_agree(lora_run, tmp_path):
  source = tmp_path / "in.jsonl"
  source.write_text('{"prompt": "upper rose", "response": "ROSE"}\n')
  call(export, f"--model={lora_run}/sft", f"--output={tmp_path}/hf")
  call(export, f"--model={lora_run}/sft", f"--output={tmp_path}/peft", "--adapter")
  config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
  assert config["r"] == 2 and "q_proj" in config["target_modules"]
  scored = []
  for name, model in (("stage", f"{lora_run}/sft"), ("merged", tmp_path / "hf")):
    call(score, f"--sft={model}", f"--ref={model}", f"--input={source}",
         f"--output={tmp_path}/{name}.jsonl")
    scored.append(json.loads((tmp_path / f"{name}.jsonl").read_text()))
  np.testing.assert_allclose(scored[0]["logp_sft"], scored[1]["logp_sft"], atol=1e-4)
  call(generate, f"--model={lora_run}/dpr", f"--input={source}", f"--output={tmp_path}/g.jsonl",
       "--max_new_tokens=8")
  assert json.loads((tmp_path / "g.jsonl").read_text())["prompt"] == "upper rose"


def test_a_full_model_has_no_adapter_to_export(finished_run, tmp_path, capsys):
  with pytest.raises(SystemExit) as exit_info:
    call(export, f"--model={finished_run[0]}/sft", f"--output={tmp_path}/peft", "--adapter")
  assert exit_info.value.code == 2 and "no adapter" in capsys.readouterr().err
