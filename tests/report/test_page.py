"""The report: complete, self-contained, escaped, and never in the way of an unfinished run."""

import base64
import json
import re
import shutil

import pytest

from dpr_jax.errors import UserError
from dpr_jax.report import plots, write_report

REWARDED = ("loss", "reward", "kl", "response_length", "eos_rate", "entropy")
PLOTS = {
  "frontier", "results", "sft_loss", "continued_sft_loss", "my_method_loss",
  *(f"dpr_{key}" for key in REWARDED),
}
HEADINGS = [
  "Accuracy and coverage", "Results", "Comparisons", "By task", "What was run", "What moved",
  "Learning curves", "Token rewards", "Sample responses",
]


@pytest.fixture
def undrawn(monkeypatch):
  """Names in place of drawings, where a test reads the text only: drawing takes a second."""
  monkeypatch.setattr(plots, "curve", lambda series, title, axis, dark: title.encode())
  monkeypatch.setattr(plots, "results_plot", lambda systems, metrics, dark: b"results")
  monkeypatch.setattr(plots, "frontier_plot", lambda series, label, dark: b"frontier")


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def put(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_finished_run_has_every_section(workdir, read_page):
  path = write_report(workdir)
  assert path == workdir / "report" / "report.html"
  page = read_page(path)
  assert [h for h in page.headings if h in HEADINGS] == HEADINGS
  for text in ("1.02 million parameters", "10% with a wrong answer", "ref at 50% of SFT", "beta 1",
               "jax 0.10.2", "SFT and reference share one run.", "own budget: steps 50",
               "dpr, optimizer learning rate 3e-05, reward (mine:MyReward, scale 2), beta 1"):
    assert text in page.text, text
  assert {p.stem for p in (workdir / "report").glob("*.png")} == PLOTS


def test_the_numbers_of_results_json_are_on_the_page(workdir, read_page, undrawn):
  results = json.loads((workdir / "report" / "results.json").read_text())
  text = read_page(write_report(workdir)).text
  for metrics in results["systems"].values():
    for metric in ("accuracy_sampled", "accuracy_greedy", "accuracy_sampled/add"):
      low, high = metrics[metric]["ci95"]
      assert f"{100 * metrics[metric]['mean']:.1f}" in text
      assert f"{100 * low:.1f} – {100 * high:.1f}" in text
  for c in results["comparisons"]:
    if c["metric"] == "accuracy_sampled":
      assert f"{100 * c['difference']:+.1f}".replace("-", "−").replace("+0.0", "0.0") in text


def test_the_first_screen_answers(workdir, read_page, undrawn):
  text = read_page(write_report(workdir)).text
  first = text[: text.index("Accuracy and coverage")]
  assert "Accuracy, sampled: DPR reaches" in first
  for trained in ("SFT (", "Continued SFT (", "My own method ("):
    assert trained in first
  assert "lower temperature of SFT" in first and "at temperature 1, " in first


def test_what_only_a_user_declared_is_called_by_its_labels(workdir, read_page, undrawn):
  page = read_page(write_report(workdir))
  assert "my_method" not in page.text.partition("Configuration")[0]
  assert "My own method: loss" in page.text  # a monitor,
  assert page.text.count("My own method − SFT") == 6  # comparisons in three metrics and two modes,
  assert page.text.count("Capital letters, sampled") >= 2
  assert "My own method: loss (loss) over steps" in {i["alt"] for i in page.of("img")}  # a curve.


def test_an_unfinished_run_has_its_labels_too(workdir, read_page, undrawn):
  shutil.rmtree(workdir / "report")
  text = read_page(write_report(workdir)).text
  assert "My own method" in text and "Contrastive decoding" in text


def test_the_page_needs_nothing_but_itself(workdir, read_page):
  page = read_page(write_report(workdir))
  assert not page.of("script") and not page.of("link") and not page.of("iframe")
  for _, attributes in page.elements:
    assert not any(name.startswith("on") for name in attributes)
    for name in ("src", "href", "srcset", "action"):
      assert attributes.get(name, "data:").startswith("data:")
  images = page.of("img")
  assert len(images) == len(PLOTS)
  embedded = {base64.b64decode(i["src"].partition(",")[2]) for i in images}
  assert embedded == {p.read_bytes() for p in (workdir / "report").glob("*.png")}
  assert all(i["alt"] for i in images)


def test_whatever_a_model_wrote_is_text(workdir, read_page, undrawn):
  evil = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}\u202e"
  for path in (workdir / "samples").glob("*.jsonl"):
    rows = lines_of(path)
    if path.stem.startswith("heatmap"):
      rows[0]["tokens"][0] = evil
      rows[0]["messages"][0]["content"] = evil
    else:
      for row in rows[:1]:
        row.update(response=evil, prompt=evil, task=evil, answer=evil)
    put(path, rows)
  record = json.loads((workdir / "config.json").read_text())
  (workdir / "samples" / "sft.jsonl").rename(workdir / "samples" / f"{evil.replace('/', '')}.jsonl")
  results = json.loads((workdir / "report" / "results.json").read_text())
  results["systems"][evil] = results["systems"]["sft"] | {f"accuracy_sampled/{evil}": {
    "mean": 0.5, "ci95": [0.4, 0.6], "n": 3}}
  results["comparisons"].append({**results["comparisons"][0], "pair": [evil, "sft"]})
  results["notes"].append(evil)
  results["labels"]["my_method"] = results["columns"]["shout_sampled"]["label"] = evil
  results["frontier"]["equal_accuracy"]["ref"] = {"difference": None, "reason": evil}
  results["stages"]["my_method"]["own_budget"] = evil
  results["corruption"] = {"all": {evil: {"auc": None}}}
  results["corruption_titles"] = {"all": evil}
  (workdir / "report" / "results.json").write_text(json.dumps(results))
  record["described"]["reference"] = record["described"]["labels"]["dpr"] = evil
  record["config"]["methods"]["dpr"]["returns"] = evil
  record["model"]["source"] = record["config"]["data"]["demos"] = record["versions"]["jax"] = evil
  (workdir / "config.json").write_text(json.dumps(record))
  shutil.copytree(workdir / "continued_sft", workdir / "<b>stage$^2$")

  path = write_report(workdir)
  page = read_page(path)
  raw = path.read_text(encoding="utf-8")
  for harm in ("<script", "onerror=alert(1)>", "\u202e"):
    assert harm not in raw, harm
  assert not page.of("script") and all(i["src"].startswith("data:") for i in page.of("img"))
  assert not any("onerror" in a for _, a in page.elements)
  assert page.text.count("<script>alert('x')</script>") >= 10  # each place shows it as it is.
  assert "{{ 7 * 7 }}" in page.text and "49\\u202e" not in page.text
  assert len([b for b in page.of("b") if not b]) == len(re.findall(r"<b>", raw))


@pytest.mark.parametrize("missing", [
  "dpr", "continued_sft", "sft", "samples", "config.json", "report/results.json",
  "samples/heatmap_demos.jsonl", "samples/dpr.jsonl",
])
def test_a_missing_piece_is_left_out(workdir, read_page, missing, undrawn):
  target = workdir / missing
  shutil.rmtree(target) if target.is_dir() else target.unlink()
  page = read_page(write_report(workdir))
  assert ("Sample responses" in page.text) == (missing != "samples")
  assert ("Comparisons" in page.text) == (missing != "report/results.json")
  assert ("DPR: reward and length" in page.text) == (missing != "dpr")
  assert ("Continued SFT: loss" in page.text) == (missing != "continued_sft")


def test_an_empty_folder_has_a_page(tmp_path, read_page):
  (tmp_path / "new").mkdir()
  page = read_page(write_report(tmp_path / "new"))
  assert page.text.split() == ["Run", "new", "Run", "new"]  # its title and its heading.


def test_not_a_number_is_a_dash_and_is_reported(workdir, read_page):
  path = workdir / "dpr" / "metrics.jsonl"
  rows = lines_of(path)
  for row in rows[50:60]:
    row["reward"] = row["kl"] = float("nan")
  rows[70]["entropy"] = float("inf")
  put(path, rows)
  heat = workdir / "samples" / "heatmap_rollouts.jsonl"
  rows = lines_of(heat)
  rows[0]["token_rewards"][0] = rows[0]["reward"] = float("nan")
  put(heat, rows)
  results = json.loads((workdir / "report" / "results.json").read_text())
  nan = float("nan")
  results["systems"]["dpr"]["accuracy_sampled"] = {"mean": nan, "ci95": [nan, nan], "n": 0}
  results["systems"]["sft"]["heldout_nll"] = {"mean": 1.5, "ci95": None, "n": 1}
  results["comparisons"][0] |= {"difference": nan, "ci95": [nan, nan], "p": nan}
  (workdir / "report" / "results.json").write_text(json.dumps(results))
  page = read_page(write_report(workdir))
  assert "11 of 200 lines of the metrics hold a number that is not finite" in page.text
  numbers = page.text.partition("Token rewards")[0]  # what follows may greet someone called nan.
  assert not re.search(r"\bnan\b|\binf\b", numbers, re.IGNORECASE)
  assert len(page.of("span", "unknown")) == 1


def test_a_torn_last_line_is_no_error(workdir, read_page, undrawn):
  for path in (workdir / "dpr" / "metrics.jsonl", workdir / "samples" / "dpr.jsonl"):
    with open(path, "a") as file:
      file.write('{"step": 20')
  assert "DPR: reward" in "".join(i["alt"] for i in read_page(write_report(workdir)).of("img"))


def test_a_stage_that_has_just_begun(workdir, read_page, undrawn):
  path = workdir / "dpr" / "metrics.jsonl"
  put(path, lines_of(path)[:1])
  text = read_page(write_report(workdir)).text
  assert "DPR: reward and length" not in text  # nothing can have moved yet.
  put(path, [])
  read_page(write_report(workdir))


def test_writing_again_changes_nothing(workdir):
  def content():
    return {p.name: p.read_bytes() for p in (workdir / "report").iterdir()}

  write_report(workdir)
  first = content()
  write_report(workdir)
  assert content() == first


def test_any_stage_gets_its_curves(workdir, read_page, undrawn):
  shutil.copytree(workdir / "sft", workdir / "spin")
  shutil.copytree(workdir / "dpr", workdir / "other")
  page = read_page(write_report(workdir))
  assert (workdir / "report" / "spin_loss.png").exists()
  assert all((workdir / "report" / f"other_{key}.png").exists() for key in REWARDED)
  assert "spin: loss" in page.text and "other: reward and length" in page.text


def test_several_seeds(seeds_workdir, read_page, undrawn):
  page = read_page(write_report(seeds_workdir))
  assert [a["href"] for a in page.of("a")] == [
    "../seed_0/report/report.html", "../seed_1/report/report.html"
  ]
  assert (seeds_workdir / "report" / page.of("a")[0]["href"]).resolve().is_file()
  assert "seed 2 (no page yet)" in page.text
  assert "1.02 million parameters" in page.text  # from the first seed.
  assert "n = 180" in page.text and "0, 1, 2" in page.text
  assert "Accuracy and coverage" in page.text and "lower temperature of SFT" in page.text
  assert len(page.of("img")) == len(PLOTS)
  assert "Sample responses" not in page.text


def test_bad_input_is_named(tmp_path):
  with pytest.raises(UserError, match="nowhere.*no such workdir"):
    write_report(tmp_path / "nowhere")
  (tmp_path / "config.json").write_text('{"config": {\n "seed" 1}}')
  with pytest.raises(UserError, match=r"config\.json: not JSON.*line 2"):
    write_report(tmp_path)
  (tmp_path / "config.json").write_text("[1]")
  with pytest.raises(UserError, match=r"config\.json: expected a JSON object, found list"):
    write_report(tmp_path)


def test_samples_are_the_first_of_each_task(workdir, read_page, undrawn):
  rows = lines_of(workdir / "samples" / "sft.jsonl")
  sampled = [r for r in rows if r["mode"] == "sampled"]
  first = {}
  for r in sampled:
    first.setdefault(r["task"], r["prompt"])
  page = read_page(write_report(workdir))
  assert len(page.of("article")) == 12
  shown = page.text.partition("Sample responses")[2]
  assert all(prompt in shown for prompt in first.values())
  right = [r for r in sampled if r["prompt"] == next(iter(first.values()))][0]["correct"]
  block = shown.partition(next(iter(first.values())))[2].partition("SFT")[2]
  assert block.strip().startswith("✓ right" if right else "✗ wrong")


def test_the_verdict_on_gaming_leads_the_page_and_its_signs_are_listed(workdir, read_page, undrawn):
  path = workdir / "report" / "results.json"
  results = json.loads(path.read_text())
  results["gaming"] = {"dpr": {
    "verdict": "gaming", "text": "The policy was gaming the reward: it was.",
    "signs": [{"name": "length", "found": True, "text": "Twice as long."}],
  }, "my_method": {"verdict": "clean", "text": "This one was not.", "signs": []}}
  path.write_text(json.dumps(results))
  page = read_page(write_report(workdir))
  assert page.text.count("The policy was gaming the reward: it was.") == 2
  assert "DPR: sign of gaming, length" in page.text and "Twice as long." in page.text
  assert "My own method: gaming the reward" in page.text
  assert page.text.count("This one was not.") == 1  # the first screen is the main system's.


@pytest.mark.parametrize("fields, said", [
  ({"corrupt": 0.2, "corruption": "step"}, "20% with one wrong step"),
  ({"corrupt": 0.2, "corruption": "repeated"}, "20% copies of few demonstrations"),
  ({"corrupt": 0.1, "minority": 0.05}, "10% with a wrong answer, 5% in brackets"),
])
def test_the_page_says_what_demonstrations_there_were(workdir, read_page, undrawn, fields, said):
  record = json.loads((workdir / "config.json").read_text())
  record["config"]["data"] |= fields
  (workdir / "config.json").write_text(json.dumps(record))
  assert said in read_page(write_report(workdir)).text


def test_the_page_says_which_reference_it_was(workdir, read_page, undrawn):
  record = json.loads((workdir / "config.json").read_text())
  record["described"]["reference"] = "ref the milestone with the largest snr"
  (workdir / "config.json").write_text(json.dumps(record))
  found = [{"text": f"ref at {p}% of SFT", "kl": kl, "kl_se": 0.1, "snr": 0.4, "auc": 0.75}
           for p, kl in ((25, 2.0), (50, 1.0))]
  (workdir / "reference.json").write_text(json.dumps({"candidates": found, "chosen": 1}))
  text = read_page(write_report(workdir)).text
  assert ("ref the milestone with the largest snr: ref at 50% of SFT, chosen among 2; on training "
          "prompts KL(sft || ref) 1.00 ± 0.10 nats per response, mean / std of token rewards 0.40, "
          "AUC of corrupted tokens 75.0%") in text
  (workdir / "reference.json").unlink()
  assert "the largest snr" in read_page(write_report(workdir)).text
