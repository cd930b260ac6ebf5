"""Stage `expert`: how far every system is from the known expert that made the demonstrations.

Measured on the sampled responses of the evaluation and on the held-out demonstrations. It costs a
pass over both under each system and under the expert, for each system.
"""

import json
from collections.abc import Sequence

import numpy as np

from dpr_jax.evals.expert import score_against_expert
from dpr_jax.evals.results import EXPERT_FILE
from dpr_jax.evals.systems import system_file
from dpr_jax.loading import load_checkpoint
from dpr_jax.stages.context import Run
from dpr_jax.stages.evaluate import (
    evaluated_systems,
    fitting,
    heldout_prompts,
    heldout_responses,
)
from dpr_jax.workdir import read_lines, write_json


def expert_stage(run: Run, only: Sequence[str] | None = None) -> None:
  """Writes samples/expert.json, one system after the other; after stage `evaluate`.

  system -> reverse_kl: nats a sampled response, for each prompt; expert_logp: log pi_expert of its
  tokens, nats; forward_kl: nats a held-out demonstration, of those that fit both models.

  Args:
    only: names of systems; None takes all.
  """
  config = run.config
  if not config.eval.expert:
    return
  path = run.workdir.samples / EXPERT_FILE
  done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  # At temperature 0 a system is no distribution over the vocabulary, and one that chooses among
  # whole responses has none that is known token by token.
  systems = [
      s
      for s in evaluated_systems(run, only)
      if "sampled" in s.modes and s.temperature and s.candidates == 1
  ]
  todo = [s for s in systems if s.name not in done]
  if not todo:
    return
  expert = load_checkpoint(config.eval.expert, run.mesh, run.dtype)
  prompts = heldout_prompts(run)
  demonstrated = heldout_responses(run, prompts)
  length = min(run.model.cfg.max_length, expert.model.cfg.max_length)
  fits = fitting(prompts, demonstrated, length)
  n = len(prompts.tokens)
  for system in todo:
    records = read_lines(system_file(run.workdir.samples, system.name))
    sampled = [np.asarray(r["token_ids"], np.int32) for r in records if r["mode"] == "sampled"]
    # The logits of all members and of the expert live at once.
    rows = config.eval.batch_size * (len(system.members) + 1)
    with run.bar(f"expert {system.name}", n + len(fits), "response") as bar:
      scores = score_against_expert(
          run.model,
          [run.load(name) for name in system.members],
          expert.model,
          expert.variables,
          [*prompts.tokens, *(prompts.tokens[i] for i in fits)],
          [*sampled, *(demonstrated[i] for i in fits)],
          weights=system.weights,
          temperature=system.temperature,
          mesh=run.mesh,
          batch_size=config.eval.batch_size,
          chunk_size=run.chunk_size(rows),
          on_batch=bar.update,
      )
    total = lambda x: float(x.astype(np.float64).sum())
    done[system.name] = {
        "reverse_kl": [total(s.reverse_kl) for s in scores[:n]],
        "forward_kl": [total(s.forward_kl) for s in scores[n:]],
        "expert_logp": [[round(float(x), 6) for x in s.expert_logp] for s in scores[:n]],
    }
    write_json(path, done)
