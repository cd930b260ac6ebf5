"""Stage `plausibility`: what base and ref make of the samples of sft and of what REINFORCE trained.

A policy that games a log-ratio writes text that other models find odd. Scores the sampled responses
of the evaluation, so it costs two passes over them under each of the two models.
"""

import json

import numpy as np

from dpr_jax.evals.results import SAMPLE_NLL_FILE
from dpr_jax.evals.scoring import reference_response_logps
from dpr_jax.evals.systems import system_file
from dpr_jax.stages.context import Run
from dpr_jax.stages.dpr import REINFORCED
from dpr_jax.stages.evaluate import heldout_prompts
from dpr_jax.workdir import read_lines, write_json


def plausibility_stage(run: Run) -> None:
  """Writes samples/sample_nll.json: system -> base | ref -> nats a token, for each prompt."""
  path = run.workdir.samples / SAMPLE_NLL_FILE
  later = ("dpr", *(n for n in run.config.baseline.names if n in REINFORCED))
  names = ("sft", *(later if run.config.dpr.steps else ()))
  done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  if all(name in done for name in names):
    return
  prompts = heldout_prompts(run).tokens
  responses = {
      name: [
          np.asarray(r["token_ids"], np.int32)
          for r in read_lines(system_file(run.workdir.samples, name))
          if r["mode"] == "sampled"
      ]
      for name in names
  }
  rows = [r for name in names for r in responses[name]]
  out: dict[str, dict[str, list[float]]] = {name: {} for name in names}
  for judge in ("base", "ref"):
    logps = reference_response_logps(
        run.model,
        run.load(judge),
        [*prompts] * len(names),
        rows,
        ensemble=run.ensemble,
        mesh=run.mesh,
        batch_size=run.config.eval.batch_size,
        chunk_size=run.chunk_size(run.config.eval.batch_size),
    )
    nats = [-float(x.astype(np.float64).mean()) for x in logps]  # A response has a token at least.
    for i, name in enumerate(names):
      out[name][judge] = nats[i * len(prompts) : (i + 1) * len(prompts)]
  write_json(path, out)
