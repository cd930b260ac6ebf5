"""Settings of the cleaning study, and demonstrations whose answers are altered."""

import json

import pytest

from benchmarks import altered_gsm8k, cleaning
from dpr_jax import cli
from dpr_jax.data.formats import read_demos
from dpr_jax.errors import UserError
from dpr_jax.evaluation.benchmarks.gsm8k import GSM8K


def test_a_setting_is_judged_and_its_figures_are_those_of_its_lines(tmp_path, capsys):
  argv = [f"--workdir={tmp_path}/w", "--seeds=2", f"--output={tmp_path}/found.json",
          "--setting=some:corrupt=0.3,debug=True:reference_fraction=0.5"]
  cli.run_entry_point(cleaning.main, argv)
  (row,) = json.loads((tmp_path / "found.json").read_text())
  assert json.loads(capsys.readouterr().out.splitlines()[-1]) == row
  seeds = [[json.loads(line) for line in (
      tmp_path / "w" / "some" / f"seed_{seed}" / "cleaned_sft" / "judged.jsonl"
  ).read_text().splitlines()] for seed in range(2)]
  assert {line["fold"] for line in seeds[0]} == {0, 1} and len(seeds[0]) == row["demos"]
  share = lambda test: 50 * sum(sum(map(test, lines)) / len(lines) for lines in seeds)
  assert row["wrong"][0] == pytest.approx(share(lambda x: x["wrong"]), abs=0.06)
  assert row["cut"][0] == pytest.approx(share(lambda x: not x["kept"]), abs=0.06)
  assert 0 < row["auc_reward_sum"][0] < 100


@pytest.mark.parametrize("text", ["name", "name:", "name:corrupt=0.1:folds"])
def test_a_wrong_setting_is_refused(text):
  with pytest.raises(UserError, match="must be NAME:ARGUMENT"):
    cleaning.Setting.parse(text)


def test_altered_answers_are_wrong_and_the_others_as_they_were(tmp_path):
  source, out = tmp_path / "train.jsonl", tmp_path / "altered.jsonl"
  source.write_text("".join(json.dumps({
      "question": f"{i} and 2000?", "answer": f"They are {i + 2000}.\n#### {i + 2000:,}"}) + "\n"
      for i in range(30)))
  cli.run_entry_point(altered_gsm8k.main, [f"--data={source}", f"--output={out}", "--share=0.2"])
  benchmark, demos = GSM8K(), read_demos(out).demos
  wrong = benchmark.wrong_demos(demos)
  assert sum(wrong) == 6 and len(demos) == 30
  for i, (demo, w) in enumerate(zip(demos, wrong)):
    text = demo.response.partition("#### ")[0]
    assert text == f"They are {i + 2000}.\n" and (demo.response == f"{text}#### {i + 2000:,}") != w
