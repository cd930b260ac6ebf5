"""A workdir as a run leaves it: metrics, samples, scored tokens, drawn here; and its results."""

import dataclasses
import html.parser
import json
import pathlib
import random
import shutil

import numpy as np
import pytest

from dpr_jax.data.tasks import SHORT_TASKS, TASKS, make_demos
from dpr_jax.evaluation.metrics import ACCURACY, Column, EosRate, Length
from dpr_jax.evaluation.results import build_results

# Chance that a system answers right, and mean tokens of its responses.
SYSTEMS = {
  "base": (0.0, 24.0), "ref": (0.48, 6.0), "sft": (0.66, 6.1), "low_temperature": (0.74, 6.0),
  "contrastive": (0.73, 6.2), "my_method": (0.71, 6.3), "continued_sft": (0.68, 6.1),
  "dpr": (0.76, 6.6),
}
# What nobody but a user has declared: a method and a metric.
LABELS = {
  "low_temperature": "SFT, low temperature", "contrastive": "Contrastive decoding",
  "my_method": "My own method", "continued_sft": "Continued SFT", "dpr": "DPR",
}
COLUMNS = {
  "accuracy": ACCURACY, "length": Length().column(), "eos_rate": EosRate().column(),
  "shout": Column("Capital letters", "letters", main=True),
  "heldout_nll": Column("Held-out NLL", "nats per response", better=-1, compared=False, main=True),
}


def write_json(path: pathlib.Path, value) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: pathlib.Path, rows) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_record(seed: int = 0, **data) -> dict:
  return {
    "config": {
      "seed": seed, "model": {"pretrained": "", "dtype": "float32"},
      "data": {"demos": "", "tasks": [], "num_demos": 20_000, "corrupt": 0.1, **data},
      "sft": {"steps": 600}, "compare": list(LABELS),
      "methods": {"dpr": {
        "kind": "dpr", "label": "", "steps": None,
        "optimizer": {"learning_rate": 3e-5, "eps": None},
        "reward": {"kind": "mine:MyReward", "scale": 2.0}, "transforms": [], "beta": 1.0,
        "returns": "reward_to_go", "variance_baseline": "position_mean",
      }},
    },
    "described": {
      "reference": "ref at 50% of SFT", "labels": LABELS, "subjects": ["dpr"],
      "always": {"base": "Base model", "ref": "Reference", "sft": "SFT"},
      "own_budget": {"my_method": "steps 50"},
    },
    "seed": seed, "versions": {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8"},
    "model": {"source": "random", "num_params": 1_018_240},
    "data": {"source": "tasks", "demos": 20_000}, "devices": {"platform": "cpu", "count": 1},
  }


def sft_lines(rng, steps: int, start: float = 3.1, end: float = 0.92) -> list[dict]:
  x = np.arange(1, steps + 1)
  loss = end + (start - end) * np.exp(-x / (steps / 8)) + rng.normal(0, 0.03, steps)
  return [
    {"step": int(i), "loss": float(v), "tokens": 1_100.0 * i, "seconds": 0.21 * float(i),
     "grad_norm": float(rng.gamma(4, 0.2)), "learning_rate": 1e-3}
    for i, v in zip(x, loss)
  ]


def dpr_lines(rng, steps: int) -> list[dict]:
  lines = []
  for i in range(1, steps + 1):
    done = 1 - np.exp(-i / (steps / 3))
    noise = rng.normal(size=8)
    length = 6.1 + 0.5 * done + 0.15 * noise[0]
    reward = 0.95 + 0.62 * done + 0.16 * noise[1]
    kl = abs(0.42 * done + 0.03 * noise[2])
    lines.append({
      "step": i, "loss": float(0.1 * noise[3]), "tokens": 64 * length * i, "seconds": 0.9 * i,
      "learning_rate": 1e-4, "grad_norm": float(rng.gamma(4, 0.2)), "reward": reward,
      "reward_per_token": reward / length, "reward_eos": 0.11 + 0.01 * noise[4], "kl": kl,
      "response_length": length, "eos_rate": float(min(1, 0.995 - 0.01 * done + 0.004 * noise[5])),
      "entropy": float(0.86 - 0.16 * done + 0.02 * noise[6]), "decode_gap": 3.1e-6,
      "distinct_2": float(0.72 - 0.04 * done + 0.01 * noise[7]), "sft_logp": -0.9 + 0.1 * done,
      "ref_logp": -1.05 + 0.02 * done, "shaped_reward": reward - kl, "advantage_mean": 0.0,
      "advantage_std": 1.0, "on_policy_drift": 2e-8,
    })
  return lines


def sample_rows(rng, name: str, demos, seed: int) -> list[dict]:
  chance, length = SYSTEMS[name]
  rows = []
  for mode, bonus in (("sampled", 0.0), ("greedy", 0.06)):
    for demo in demos:
      right = bool(rng.random() < chance + bonus)
      wrong = "xq" * 12 if name == "base" else demo.answer[::-1] + "b"
      tokens = int(max(1, rng.normal(length, 1.5)))
      scores = {"accuracy": float(right), "length": tokens, "eos_rate": float(name != "base"),
                "shout": int(rng.integers(5))}
      rows.append({
        "prompt": demo.prompt[-1]["content"], "task": demo.task, "answer": demo.answer,
        "groups": groups_of(demo), "mode": mode, "response": demo.answer if right else wrong,
        "correct": right, "length": tokens, "hit_eos": name != "base", "seed": seed,
        "scores": scores,
      })
  return rows


def groups_of(demo) -> list[str]:
  return [demo.task, "unique" if TASKS[demo.task].unique else "varied"]


def frontier_rows(rng, name: str, demos, k: int = 4) -> list[dict]:
  """Colder samples are right more often, and vary less; so is and does a better system."""
  rows = []
  for temperature in (1.0, 0.7, 0.5, 0.35, 0.0):
    n = k if temperature else 1
    chance = SYSTEMS[name][0] * (1 + 0.3 * (1 - temperature))
    for j, demo in enumerate(demos[:64]):
      right = int(rng.binomial(n, chance))
      distinct = len(set(rng.integers(0, 1 + int(12 * temperature), right)))
      rows.append({"temperature": temperature, "prompt": j, "groups": groups_of(demo), "samples": n,
                   "right": right, "distinct": distinct})
  return rows


def scored_rows(rng, demos) -> list[dict]:
  rows = []
  for demo in demos:
    tokens = [*demo.answer, "<|end|>"]
    sft = -rng.gamma(1.0, 0.5, len(tokens))
    ref = sft - rng.normal(0.15, 0.5, len(tokens))
    rows.append({
      "messages": list(demo.prompt), "response": demo.answer, "tokens": tokens,
      "token_rewards": [round(float(x), 6) for x in sft - ref], "reward": float((sft - ref).sum()),
      "logp_sft": sft.tolist(), "logp_ref": ref.tolist(), "correct": True,
    })
  return rows


def fill_seed(workdir: pathlib.Path, seed: int, num_prompts: int = 200) -> None:
  """Writes a single-seed workdir."""
  rng = np.random.default_rng(seed)
  demos = make_demos(tuple(SHORT_TASKS), num_prompts, seed, split="heldout")
  write_json(workdir / "config.json", run_record(seed))
  write_lines(workdir / "sft" / "metrics.jsonl", sft_lines(rng, 300))
  write_lines(workdir / "dpr" / "metrics.jsonl", dpr_lines(rng, 200))
  for name in ("continued_sft", "my_method"):
    write_lines(workdir / name / "metrics.jsonl", sft_lines(rng, 200, 0.95, 0.9))
  samples = workdir / "samples"
  for name in SYSTEMS:
    write_lines(samples / f"{name}.jsonl", sample_rows(rng, name, demos, seed))
    if name != "low_temperature":
      write_lines(samples / "frontier" / f"{name}.jsonl", frontier_rows(rng, name, demos))
  write_json(samples / "measures.json", {
    "columns": {name: dataclasses.asdict(c) for name, c in COLUMNS.items()},
    "values": {n: {"heldout_nll": rng.gamma(5, 1, num_prompts).tolist()} for n in ("sft", "dpr")},
  })
  for name in ("demos", "rollouts"):
    write_lines(samples / f"heatmap_{name}.jsonl", scored_rows(rng, demos[:8]))
  write_results(workdir, [workdir], [seed])


def write_results(root: pathlib.Path, parts, seeds) -> None:
  results = build_results(parts, list(seeds))
  results["notes"] = ["SFT and reference share one run."]
  write_json(root / "report" / "results.json", results)


@pytest.fixture(scope="session")
def _finished(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("runs") / "arithmetic"
  fill_seed(path, random.randrange(10_000))
  return path


@pytest.fixture
def workdir(tmp_path: pathlib.Path, _finished) -> pathlib.Path:
  """A finished single-seed run."""
  return shutil.copytree(_finished, tmp_path / "arithmetic")


@pytest.fixture
def seeds_workdir(tmp_path: pathlib.Path) -> pathlib.Path:
  """A finished run of three seeds; the page of seed 2 has not been written."""
  path = tmp_path / "three"
  parts = [path / f"seed_{s}" for s in range(3)]
  for s, part in enumerate(parts):
    fill_seed(part, s, 60)
  record = {k: v for k, v in run_record().items() if k not in ("model", "data", "devices")}
  write_json(path / "config.json", record)
  write_results(path, parts, range(3))
  for part in parts[:2]:
    (part / "report" / "report.html").write_text("<p>page</p>")
  return path


class Page(html.parser.HTMLParser):
  """A page taken apart: its elements and its visible text. Fails on tags that do not balance."""

  VOID = ("meta", "img", "source", "input", "br", "line", "rect")

  def __init__(self, text: str):
    super().__init__()
    self.elements: list[tuple[str, dict[str, str]]] = []
    self.text, self.headings = "", []
    self._open: list[str] = []
    self.feed(text)
    self.close()
    assert not self._open, f"left open: {self._open}"

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, {k: v or "" for k, v in attrs}))
    if tag not in self.VOID:
      self._open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, {k: v or "" for k, v in attrs}))

  def handle_endtag(self, tag):
    assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-1:]}"
    self._open.pop()

  def handle_data(self, data):
    if self._open[-1:] == ["h2"]:
      self.headings.append(data)
    if "style" not in self._open:
      self.text += data

  def of(self, tag: str, class_: str = "") -> list[dict[str, str]]:
    return [a for t, a in self.elements if t == tag and class_ in ["", *a.get("class", "").split()]]


@pytest.fixture
def read_page():
  return lambda path: Page(path.read_text(encoding="utf-8"))
