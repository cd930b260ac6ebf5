"""Accuracy on preference data, against log-probabilities that are enumerated one by one."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dpr_jax import cli, evaluate, filter, score
from dpr_jax.data.templates import encode_response, render_prompt
from dpr_jax.evaluation.benchmark_run import EvaluationFolder
from dpr_jax.weights import save_pretrained
from dpr_jax.weights.byte_tokenizer import byte_tokenizer
from dpr_jax.workdir import read_lines

NAMES = ("reward_sum", "reward_mean", "reward_min", "logp_sft_sum", "logp_sft_mean",
         "logp_sft_min", "endogenous_sum", "endogenous_mean", "endogenous_min", "length", "random")


def call(module, *argv):
  cli.run_entry_point(module.main, [str(a) for a in argv])


@pytest.fixture
def models(tmp_path, make_model, rng):
  """sft and ref, of different shapes: name -> (folder, the last-token logits of token ids)."""
  out = {}
  for name, layers in (("sft", 2), ("ref", 1)):
    model, variables = make_model(
        int(rng.integers(2**31)), vocab_size=len(byte_tokenizer()), max_length=128,
        num_layers=layers,
    )
    folder = tmp_path / name
    save_pretrained(folder, model.cfg, variables["params"], tokenizer=byte_tokenizer())

    def logits(ids, model=model, variables=variables):
      hidden, _ = model.apply(variables, jnp.asarray([ids]))
      return np.asarray(model.apply(variables, hidden, method="unembed")[0], np.float64)

    out[name] = folder, logits
  return out


@pytest.fixture
def pairs(tmp_path, rng):
  """11 pairs, of which 3 cannot be scored: records 3, 6 and 9, counted from 1."""
  word = lambda: "".join(rng.choice(list("abcdef"), rng.integers(1, 9)))
  records = [
      {"chosen": f"\n\nHuman: {i}\n\nAssistant: g{word()}",
       "rejected": f"\n\nHuman: {i}\n\nAssistant: b{word()}"} for i in range(11)
  ]
  records[1] = {"prompt": "1", "chosen": "tie", "rejected": "eit"}
  records[2]["rejected"] = "\n\nHuman: another\n\nAssistant: b"
  records[5]["chosen"] += "x" * 150
  records[8]["chosen"] = records[8]["rejected"] + "\n"
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path, records


def expected(models, index, texts):
  """Scores of two responses: softmax in numpy, token after token."""
  tokenizer, out = byte_tokenizer(), []
  luck = np.random.default_rng([7, index]).random(2)
  ask = [{"role": "user", "content": str(index)}]
  prompt = render_prompt(ask, tokenizer).tolist()
  for text, number in zip(texts, luck):
    ids = encode_response(text, ask, tokenizer).tolist()
    states = slice(len(prompt) - 1, len(prompt) + len(ids) - 1)
    logp, value = {}, {}
    for name, (_, logits) in models.items():
      of_states = logits(prompt + ids)[states]
      value[name] = [np.log(np.exp(row).sum()) for row in of_states]
      logp[name] = [row[t] - v for row, t, v in zip(of_states, ids, value[name])]
    r = [a - b for a, b in zip(logp["sft"], logp["ref"])]
    q = [x + v for x, v in zip(logp["sft"], value["sft"])]
    endogenous = [x - v for x, v in zip(q, [*value["sft"][1:], 0.0])]
    n = len(ids)
    out.append(dict(zip(NAMES, (
        sum(r), sum(r) / n, min(r), sum(logp["sft"]), sum(logp["sft"]) / n, min(logp["sft"]),
        sum(endogenous), sum(endogenous) / n, min(endogenous), n, number,
    ))))
  return out


def test_scores_accuracies_and_differences_are_those_of_an_enumeration(
    models, pairs, tmp_path, capsys, caplog
):
  path, records = pairs
  out = tmp_path / "out"
  call(evaluate, f"--model={models['sft'][0]}", "--benchmark=preference",
       f"--benchmark.ref={models['ref'][0]}", "--benchmark.seed=7", f"--data={path}",
       f"--output={out}", "--batch_size=2")
  lines, found = read_lines(out / "responses.jsonl"), json.loads((out / "results.json").read_text())
  assert [line["index"] for line in lines] == list(range(11))
  assert [i for i, line in enumerate(lines) if "skipped" in line] == [2, 5, 8]
  skipped = [(why, what["count"], what["first"]) for why, what in found["skipped"].items()]
  assert sorted(skipped) == [
      ("longer than the 128 tokens that the models were made for", 1, [f"{path}:6"]),
      ("the dialogues differ before the last response", 1, [f"{path}:3"]),
      ("the two responses are the same", 1, [f"{path}:9"]),
  ]
  assert f"{path}:3" in caplog.text and "1 of 11 pairs are not scored" in caplog.text
  wins = {name: [] for name in NAMES}
  for i, line in enumerate(lines):
    if "skipped" in line:
      continue
    texts = [records[i][side].rpartition("Assistant: ")[2] for side in ("chosen", "rejected")]
    assert [line[side]["response"] for side in ("chosen", "rejected")] == texts
    want = expected(models, i, texts)
    for side, scores in zip(("chosen", "rejected"), want):
      assert line[side]["scores"] == pytest.approx(scores, rel=1e-4, abs=2e-4)
    a, b = (line[side]["scores"] for side in ("chosen", "rejected"))
    for name in NAMES:
      wins[name].append(1.0 if a[name] > b[name] else 0.5 if a[name] == b[name] else 0.0)
  assert wins["length"][1] == 0.5 and found["n"] == 8
  assert tuple(found["metrics"]) == tuple(found["columns"]) == NAMES
  for name in NAMES:
    figure, p = found["metrics"][name], np.mean(wins[name])
    assert figure["mean"] == pytest.approx(p) and figure["n"] == 8
    # Wilson: where the score test of a share does not reject it.
    for bound in figure["ci95"]:
      if 0 < bound < 1:
        z = scipy.stats.norm.ppf(0.975)
        assert abs(p - bound) == pytest.approx(z * np.sqrt(bound * (1 - bound) / 8), rel=1e-6)
  assert [c["pair"] for c in found["comparisons"]] == [["reward_sum", n] for n in NAMES[1:]]
  for c in found["comparisons"]:
    d = np.subtract(wins["reward_sum"], wins[c["pair"][1]])
    flips = [abs(np.dot(s, d)) for s in itertools.product((-1, 1), repeat=8)]
    assert c["difference"] == pytest.approx(d.mean())
    assert c["p"] == pytest.approx(np.mean(np.array(flips) >= abs(d.sum()) - 1e-9))
  # Both responses have one prompt, whose value is all that the endogenous sum adds to log pi.
  assert wins["endogenous_sum"] == wins["logp_sft_sum"]
  assert "reward_sum - length" in capsys.readouterr().out


def test_what_was_stopped_goes_on_to_the_same_files_and_other_settings_do_not(
    models, pairs, tmp_path, monkeypatch, capsys
):
  given = [f"--model={models['sft'][0]}", "--benchmark=preference", f"--data={pairs[0]}",
           "--batch_size=1"]
  ref = f"--benchmark.ref={models['ref'][0]}"
  whole, part = tmp_path / "whole", tmp_path / "part"
  call(evaluate, *given, ref, f"--output={whole}")
  part.mkdir()
  text = (whole / "responses.jsonl").read_bytes()
  (part / "config.json").write_bytes((whole / "config.json").read_bytes())
  (part / "responses.jsonl").write_bytes(text[: len(text) // 2])
  written, append = [], EvaluationFolder.append
  monkeypatch.setattr(
      EvaluationFolder, "append", lambda self, r: (written.append(len(r)), append(self, r))[1]
  )
  call(evaluate, *given, ref, f"--output={part}")
  assert 0 < sum(written) < 11
  for name in ("config.json", "responses.jsonl", "results.json"):
    assert (part / name).read_bytes() == (whole / name).read_bytes(), name
  capsys.readouterr()
  for flags, complaint in (
      ([f"--benchmark.ref={models['sft'][0]}"], "another --benchmark.ref"),
      ([ref, "--benchmark.seed=1"], "another --benchmark.seed"),
      ([], "--benchmark.ref is missing"),
      (["--benchmark.ref=nowhere"], "--benchmark.ref: nowhere: no such checkpoint"),
      ([ref, "--temperature=1"], "--temperature: preference"),
  ):
    with pytest.raises(SystemExit) as exit_info:
      call(evaluate, *given, *flags, f"--output={part}")
    err = capsys.readouterr().err
    assert exit_info.value.code == 2 and complaint in err and "Traceback" not in err
  pairs[0].write_text(pairs[0].read_text().replace("Assistant: b", "Assistant: c"))
  with pytest.raises(SystemExit):
    call(evaluate, *given, ref, f"--output={part}")
  assert "other contents of --data" in capsys.readouterr().err


@pytest.mark.parametrize("rejected", ["b", "b "])
def test_a_file_of_which_no_pair_can_be_scored_is_refused(models, tmp_path, capsys, rejected):
  path, template = tmp_path / "pairs.jsonl", tmp_path / "trims.jinja"
  path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": rejected}) + "\n")
  template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
                      "{% if add_generation_prompt %}assistant: {% endif %}")
  with pytest.raises(SystemExit) as exit_info:
    call(evaluate, f"--model={models['sft'][0]}", "--benchmark=preference", f"--data={path}",
         f"--benchmark.ref={models['ref'][0]}", f"--template={template}",
         f"--output={tmp_path}/out")
  assert exit_info.value.code == 2
  assert "1 of 1 pairs are not scored: the two responses are the same" in capsys.readouterr().err
  assert not (tmp_path / "out" / "config.json").exists()


def test_a_file_without_a_pair_for_several_reasons_is_refused(models, tmp_path, capsys):
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps({"prompt": "a", "chosen": "b", "rejected": r}) + "\n"
                          for r in ("b", "x" * 150)))
  with pytest.raises(SystemExit) as exit_info:
    call(evaluate, f"--model={models['sft'][0]}", "--benchmark=preference", f"--data={path}",
         f"--benchmark.ref={models['ref'][0]}", f"--output={tmp_path}/out")
  error = capsys.readouterr().err
  assert exit_info.value.code == 2 and error.count("1 of 2 pairs are not scored") == 2
  assert error.count("\n") == 1 and not (tmp_path / "out" / "config.json").exists()


def test_score_writes_the_endogenous_reward_and_filter_cuts_by_it(models, tmp_path, rng):
  """By its definition: Q(s_t, y_t) - V(s_{t+1}), the logit less the next state's logsumexp."""
  words = [rng.choice(list("abcdef"), n).tolist() for n in rng.integers(1, 9, 5)]
  source, scored = tmp_path / "in.jsonl", tmp_path / "scored.jsonl"
  records = [{"prompt": str(i), "response": "".join(w)} for i, w in enumerate(words)]
  source.write_text("".join(json.dumps(r) + "\n" for r in records))
  folder, logits = models["sft"]
  call(score, f"--sft={folder}", f"--ref={folder}", f"--input={source}", f"--output={scored}")
  sums = []
  for r in read_lines(scored):
    ask = [{"role": "user", "content": r["prompt"]}]
    prompt = render_prompt(ask, byte_tokenizer()).tolist()
    ids = encode_response(r["response"], ask, byte_tokenizer()).tolist()
    of_states = logits(prompt + ids)[len(prompt) - 1 : -1]
    values = [*(np.log(np.exp(row).sum()) for row in of_states[1:]), 0.0]
    want = [row[t] - v for row, t, v in zip(of_states, ids, values, strict=True)]
    np.testing.assert_allclose(r["endogenous"], want, rtol=1e-4, atol=2e-4)
    sums.append(sum(want))
  call(filter, f"--input={scored}", f"--kept={tmp_path}/kept.jsonl", "--by=endogenous",
       "--keep=0.6")
  kept = read_lines(tmp_path / "kept.jsonl")
  assert [r["prompt"] for r in kept] == [str(i) for i in sorted(np.argsort(sums)[-3:])]
