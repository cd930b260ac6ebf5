"""Stage `evaluate`: every system on the held-out prompts; samples/ of the workdir."""

import json
from collections.abc import Sequence

import numpy as np

from dpr_jax.data.loader import Prompts
from dpr_jax.data.templates import encode_response
from dpr_jax.evals import systems as systems_lib
from dpr_jax.evals.corruption import CORRUPTION_FILE, corrupt_responses, corruption_records
from dpr_jax.evals.responses import compilations
from dpr_jax.evals.results import NLL_FILE
from dpr_jax.evals.scoring import reference_response_logps, score_record, score_responses
from dpr_jax.evals.systems import System, evaluate_system, system_file
from dpr_jax.sharding import barrier
from dpr_jax.stages.context import Run
from dpr_jax.workdir import read_lines, write_json, write_lines


def trained_systems(run: Run) -> list[System]:
  later = (*run.config.baseline.names, "dpr") if run.config.dpr.steps else ()
  refs = run.ref_names  # An ensemble answers with the geometric mean of its members.
  ref = System("ref", refs, (1.0 / len(refs),) * len(refs))
  return [System("base", ("base",)), ref, *(System(name, (name,)) for name in ("sft", *later))]


def heldout_prompts(run: Run) -> Prompts:
  """The held-out prompts that are evaluated: `eval.num_prompts` after `eval.skip_prompts`."""
  section, held = run.config.eval, run.data.heldout
  end = section.skip_prompts + section.num_prompts if section.num_prompts else None
  chosen = slice(section.skip_prompts, end)
  return held._replace(tokens=held.tokens[chosen], demos=held.demos[chosen])


def evaluated_systems(run: Run, only: Sequence[str] | None = None) -> list[System]:
  """Trained systems and controls, all of them or those named in `only`."""
  section = run.config.eval
  controls = systems_lib.controls(
      section.controls,
      run.contrastive_alpha,
      section.low_temperature,
      run.ref_names,
      section.candidates,
  )
  return [s for s in trained_systems(run) + controls if only is None or s.name in only]


def heldout_responses(run: Run, prompts: Prompts) -> list[np.ndarray]:
  """The demonstrated responses to `prompts`, token ids, int32 [T_i]."""
  template = run.config.data.template
  return [
      encode_response(d.response, d.prompt, run.tokenizer, template, ended=d.ended)
      for d in prompts.demos
  ]


def fitting(prompts: Prompts, responses: Sequence[np.ndarray], length: int) -> list[int]:
  """Indices of responses that have a likelihood as a whole: within `length` with their prompts."""
  return [
      i for i, (p, r) in enumerate(zip(prompts.tokens, responses)) if len(p) + len(r) <= length
  ]


def evaluate_stage(run: Run, only: Sequence[str] | None = None) -> None:
  """Every system on the held-out prompts, the likelihood and corruption of the demonstrations.

  Args:
    only: names of the systems to evaluate, and "corruption"; None takes all, and the heatmaps.
  """
  config, section = run.config, run.config.eval
  prompts = heldout_prompts(run)
  demonstrated = heldout_responses(run, prompts)
  fits = fitting(prompts, demonstrated, run.model.cfg.max_length)
  nll_file = run.workdir.samples / NLL_FILE
  nll = json.loads(nll_file.read_text()) if nll_file.exists() else {}
  verifier = run.data.verifier if section.verifier == "auto" else section.verifier
  trained = [system.name for system in trained_systems(run)]
  wanted = evaluated_systems(run, only)
  todo = [s for s in wanted if not system_file(run.workdir.samples, s.name).exists()]
  scoring = {
      "mesh": run.mesh,
      "batch_size": section.batch_size,
      "chunk_size": run.chunk_size(section.batch_size),
  }
  for system in todo:
    loaded = {name: run.load(name) for name in system.members}
    if system.name in trained:
      members = tuple(loaded.values())
      logps = reference_response_logps(
          run.model,
          members if len(members) > 1 else members[0],
          [prompts.tokens[i] for i in fits],
          [demonstrated[i] for i in fits],
          ensemble=run.ensemble,
          **scoring,
      )
      nll[system.name] = [-float(x.astype(np.float64).sum()) for x in logps]
      write_json(nll_file, nll)
    total = len(prompts.tokens) * len(system.modes) * system.candidates
    with run.bar(f"evaluate {system.name}", total, "response") as bar:
      records = evaluate_system(
          system,
          run.model,
          loaded.__getitem__,
          prompts,
          run.tokenizer,
          verifier=verifier,
          rng=run.rng("evaluate"),
          seed=config.seed,
          stop_ids=run.stop_ids,
          ensemble=run.ensemble,
          **scoring,
          prompt_length=config.data.prompt_length,
          max_new_tokens=section.max_new_tokens,
          on_batch=bar.update,
      )
    # Last, and whole: a system whose file exists is done.
    write_lines(system_file(run.workdir.samples, system.name), records)
  if todo:
    run.say(f"evaluate: {compilations()} programs of decoding were compiled")
  barrier("evaluate")
  if only is None or "corruption" in only:
    _write_corruption(run, prompts, demonstrated, fits, verifier, scoring)
  if only is None:
    _write_heatmaps(run, prompts, demonstrated, scoring)


def _write_corruption(run: Run, prompts, demonstrated, fits, verifier, scoring) -> None:
  """Token rewards of held-out demonstrations with one wrong token; the same for every seed."""
  path = run.workdir.samples / CORRUPTION_FILE
  chosen = fits[: run.config.eval.corrupted_tokens]
  if not chosen or path.exists():
    return
  demos = [prompts.demos[i] for i in chosen]
  right = [demonstrated[i] for i in chosen]
  corrupted = corrupt_responses(demos, right, run.tokenizer, run.stop_ids, verifier=verifier)
  asked = [prompts.tokens[chosen[c.index]] for c in corrupted]
  sft, ref = run.load("sft"), run.load("ref")
  scores = [
      score_responses(run.model, sft, ref, asked, responses, ensemble=run.ensemble, **scoring)
      for responses in ([c.tokens for c in corrupted], [right[c.index] for c in corrupted])
  ]
  write_lines(path, corruption_records(demos, corrupted, *scores, run.tokenizer))


def _write_heatmaps(run: Run, prompts, demonstrated, scoring) -> None:
  """Token rewards of some held-out demonstrations, and of the last policy's answers to them."""
  policy = "dpr" if run.config.dpr.steps else "sft"
  answers = read_lines(system_file(run.workdir.samples, policy))
  answers = [r for r in answers if r["mode"] == "sampled"]
  n = min(run.config.eval.heatmaps, len(prompts.demos))
  # (text, token ids) of each response; the sampled ids themselves, never the text encoded again.
  sources = {
      "heatmap_demos": [(d.response, t) for d, t in zip(prompts.demos[:n], demonstrated)],
      "heatmap_rollouts": [(a["response"], np.asarray(a["token_ids"])) for a in answers[:n]],
  }
  files = {name: run.workdir.samples / f"{name}.jsonl" for name in sources}
  if not n or all(path.exists() for path in files.values()):
    return
  sft, ref = run.load("sft"), run.load("ref")
  for name, items in sources.items():
    tokens = [t for _, t in items]
    scores = score_responses(
        run.model, sft, ref, prompts.tokens[:n], tokens, ensemble=run.ensemble, **scoring
    )
    records = [
        {"messages": list(d.prompt), "response": text, **score_record(run.tokenizer, t, s)}
        for d, (text, t), s in zip(prompts.demos[:n], items, scores, strict=True)
    ]
    if name == "heatmap_rollouts":
      for record, answer in zip(records, answers):
        record["correct"] = answer["correct"]
    write_lines(files[name], records)
