"""A workdir as a run leaves it: metrics, samples, scored tokens and results, all drawn here."""

import html.parser
import json
import pathlib
import random

import numpy as np
import pytest

from dpr_jax.data.tasks import TASKS, make_demos
from dpr_jax.evals.statistics import compare, interval

# Chance that a system answers right, and mean tokens of its responses.
SYSTEMS = {
  "base": (0.0, 24.0), "ref": (0.48, 6.0), "sft": (0.66, 6.1), "low_temperature": (0.74, 6.0),
  "contrastive": (0.73, 6.2), "weight_extrapolation": (0.71, 6.3), "continued_sft": (0.68, 6.1),
  "dpr": (0.76, 6.6),
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
      "sft": {"steps": 600}, "reference": {"fraction": 0.5},
      "dpr": {
        "steps": 200, "reward": "baseline_relative", "beta": 1.0, "gamma": 1.0, "temperature": 1.0,
        "top_k": 0, "top_p": 1.0, "returns": "reward_to_go", "baseline": "position_mean",
      },
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
      rows.append({
        "prompt": demo.prompt[-1]["content"], "task": demo.task, "answer": demo.answer,
        "mode": mode, "response": demo.answer if right else wrong, "correct": right,
        "length": int(max(1, rng.normal(length, 1.5))), "hit_eos": name != "base", "seed": seed,
      })
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


def results_of(samples: list[dict[str, list[dict]]], seeds, stages) -> dict:
  """samples: system -> rows, for each seed."""
  values: dict = {name: {} for name in samples[0]}
  for name in values:
    for mode in ("sampled", "greedy"):
      rows = [[r for r in s[name] if r["mode"] == mode] for s in samples]
      for metric, key in (("accuracy", "correct"), ("length", "length"), ("eos_rate", "hit_eos")):
        values[name][f"{metric}_{mode}"] = [np.array([r[key] for r in x], float) for x in rows]
      for group in (*TASKS, "unique", "varied"):
        values[name][f"accuracy_{mode}/{group}"] = [
          np.array([r["correct"] for r in x if group == r["task"] or (
            group not in TASKS and TASKS[r["task"]].unique == (group == "unique"))], float)
          for x in rows
        ]
  pairs = [("dpr", "sft"), ("dpr", "continued_sft"), ("dpr", "contrastive"), ("sft", "ref")]
  return {
    "seeds": list(seeds),
    "systems": {n: {m: interval(v) for m, v in ms.items()} for n, ms in values.items()},
    "comparisons": [
      {"pair": [a, b], "metric": m, **compare(values[a][m], values[b][m])}
      for a, b in pairs for m in ("accuracy_sampled", "accuracy_greedy", "length_sampled")
    ],
    "stages": stages, "notes": ["SFT and reference share one run."],
  }


def fill_seed(workdir: pathlib.Path, seed: int, num_prompts: int = 200) -> dict[str, list[dict]]:
  """Writes a single-seed workdir; returns its samples."""
  rng = np.random.default_rng(seed)
  demos = make_demos(tuple(TASKS), num_prompts, seed, split="heldout")
  write_json(workdir / "config.json", run_record(seed))
  write_lines(workdir / "sft" / "metrics.jsonl", sft_lines(rng, 300))
  write_lines(workdir / "dpr" / "metrics.jsonl", dpr_lines(rng, 200))
  write_lines(workdir / "continued_sft" / "metrics.jsonl", sft_lines(rng, 200, 0.95, 0.9))
  samples = {name: sample_rows(rng, name, demos, seed) for name in SYSTEMS}
  for name, rows in samples.items():
    write_lines(workdir / "samples" / f"{name}.jsonl", rows)
  write_json(workdir / "samples" / "heldout_nll.json", {name: [1.0] for name in SYSTEMS})
  for name in ("demos", "rollouts"):
    write_lines(workdir / "samples" / f"heatmap_{name}.jsonl", scored_rows(rng, demos[:8]))
  stages = {"sft": {"steps": 300, "seconds": 63.0, "tokens": 330_000.0}}
  write_json(workdir / "report" / "results.json", results_of([samples], [seed], stages))
  return samples


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
  """A finished single-seed run."""
  path = tmp_path / "arithmetic"
  fill_seed(path, random.randrange(10_000))
  return path


@pytest.fixture
def seeds_workdir(tmp_path: pathlib.Path) -> pathlib.Path:
  """A finished run of three seeds; the page of seed 2 has not been written."""
  path = tmp_path / "three"
  samples = [fill_seed(path / f"seed_{s}", s, 60) for s in range(3)]
  record = {k: v for k, v in run_record().items() if k not in ("model", "data", "devices")}
  write_json(path / "config.json", record)
  write_json(path / "report" / "results.json", results_of(samples, range(3), {}))
  for s in range(2):
    page = path / f"seed_{s}" / "report" / "report.html"
    page.write_text("<p>page</p>")
  return path


class Page(html.parser.HTMLParser):
  """A page taken apart: its elements and its visible text. Fails on tags that do not balance."""

  VOID = ("meta", "img", "source", "input", "br", "line", "rect")

  def __init__(self, text: str):
    super().__init__()
    self.elements: list[tuple[str, dict[str, str]]] = []
    self.text = ""
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
    if "style" not in self._open:
      self.text += data

  def of(self, tag: str, class_: str = "") -> list[dict[str, str]]:
    return [a for t, a in self.elements if t == tag and class_ in ["", *a.get("class", "").split()]]


@pytest.fixture
def read_page():
  return lambda path: Page(path.read_text(encoding="utf-8"))
