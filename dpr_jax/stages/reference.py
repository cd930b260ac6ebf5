"""Stage `ref`: makes, measures and maybe chooses the reference; writes reference.json.

  ref/             the run of its own of `half_data`; the other kinds cost no training.
  reference.json   what was measured of the reference, or of each milestone if one is selected.
"""

import dataclasses
import sys
from typing import Any

import jax
import numpy as np

from dpr_jax.data.templates import encode_response
from dpr_jax.errors import UserError
from dpr_jax.evals.responses import respond
from dpr_jax.evals.scoring import reference_response_logps, response_logps
from dpr_jax.rewards import selection
from dpr_jax.rewards.references import (
    candidate_fractions,
    milestone_steps,
    reference_members,
    reference_steps,
)
from dpr_jax.stages.context import Run
from dpr_jax.stages.sft import fine_tune
from dpr_jax.workdir import write_json


def ref_stage(run: Run) -> None:
  if run.config.reference.kind == "half_data":
    _half_data(run)
  if run.config.reference.num_prompts and not run.workdir.reference_file.exists():
    record = _measure(run)
    write_json(run.workdir.reference_file, record)
    _log(record)


def _half_data(run: Run) -> None:
  fraction, rows = run.config.reference.fraction, run.data.rows
  n = max(1, round(fraction * len(rows)))  # Rows are in random order: any n are a sample.
  half = dataclasses.replace(
      rows,
      tokens=rows.tokens[:n],
      segment_ids=rows.segment_ids[:n],
      loss_mask=rows.loss_mask[:n],
  )
  fine_tune(run, "ref", half, reference_steps(fraction, run.config.sft.steps))


def _measure(run: Run) -> dict[str, Any]:
  """The table of candidates, and which is chosen."""
  config, section = run.config, run.config.reference
  rng = np.random.default_rng([config.seed, 0x5EF])
  prompts = run.data.prompts
  n = min(section.num_prompts, len(prompts.tokens))
  chosen = np.sort(rng.choice(len(prompts.tokens), n, replace=False))
  tokens = [prompts.tokens[i] for i in chosen]
  template, room = config.data.template, run.model.cfg.max_length
  demos = [
      encode_response(d.response, d.prompt, run.tokenizer, template, ended=d.ended)
      for d in (prompts.demos[i] for i in chosen)
  ]
  fits = [i for i in range(n) if len(tokens[i]) + len(demos[i]) <= room]
  corrupted, places = selection.corrupt([demos[i] for i in fits], rng)

  sft = run.load("sft")
  samples = respond(
      run.model,
      (sft,),
      tokens,
      run.rng("reference"),
      mesh=run.mesh,
      batch_size=config.eval.batch_size,
      prompt_length=config.data.prompt_length,
      max_new_tokens=config.dpr.max_new_tokens,
      stop_ids=run.stop_ids,
  )
  fitting = [tokens[i] for i in fits]
  rows = (
      [*tokens, *fitting, *fitting],
      [*(s.tokens for s in samples), *(demos[i] for i in fits), *corrupted],
  )
  scoring = {
      "mesh": run.mesh,
      "batch_size": config.eval.batch_size,
      "chunk_size": run.chunk_size(config.eval.batch_size),
  }
  logp_sft = response_logps(run.model, sft, *rows, **scoring)

  fractions = candidate_fractions(config) if section.select != "none" else [None]
  steps = milestone_steps(config.sft.milestones, config.sft.steps)
  candidates = []
  for fraction in fractions:
    members = reference_members(config, fraction)
    ref = run.member_variables(members, run.dtype)
    logp_ref = reference_response_logps(run.model, ref, *rows, ensemble=run.ensemble, **scoring)
    rewards = [a - b for a, b in zip(logp_sft, logp_ref, strict=True)]
    sampled, clean, bad = rewards[:n], rewards[n : n + len(fits)], rewards[n + len(fits) :]
    on = [i for i, place in enumerate(places) if place >= 0]
    found = selection.reward_statistics(sampled)
    found["auc"] = selection.auc(
        np.asarray([clean[i][places[i]] for i in on]), np.asarray([bad[i][places[i]] for i in on])
    )
    where = {"fraction": fraction, "step": steps[fraction]} if fraction is not None else {}
    parts = [f"{m.stage}@{m.step}" + ("" if m.part == "variables" else f" ({m.part})")
             for m in members]
    candidates.append({**where, "members": parts, **found})
  out = {"kind": section.kind, "select": section.select, "prompts": n, "candidates": candidates}
  if section.select != "none":
    try:
      best = selection.choose(candidates, section.select)
    except ValueError as e:
      raise UserError(f"config.reference.select={section.select}: {e}; use longer "
                      "demonstrations, more config.reference.num_prompts, or another criterion"
                      ) from None
    out["fraction"] = fractions[best]
  return out


def _log(record: dict[str, Any]) -> None:
  if jax.process_index():
    return
  for c in record["candidates"]:
    mark = ", chosen" if c.get("fraction") and c["fraction"] == record.get("fraction") else ""
    print(
        f"reference {', '.join(c['members'])}: KL(sft || ref) {c['kl']:.3f} +- {c['kl_se']:.3f} "
        f"nats a response, mean / std of token rewards {c['snr']:.3f}, AUC of corrupted tokens "
        f"{c['auc']:.3f}{mark}",
        file=sys.stderr,
    )
