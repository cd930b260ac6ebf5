"""How good the reference of a run is, measured on training prompts; and which one is selected.

sft was trained on these demonstrations, so the figures flatter it, all candidates alike; prompts
that are reported are never looked at.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dpr_jax.data.templates import encode_response
from dpr_jax.errors import UserError
from dpr_jax.evaluation.auc import auc
from dpr_jax.evaluation.corruption import corrupt_responses
from dpr_jax.evaluation.scoring import fitting


def reward_statistics(rewards: Sequence[np.ndarray]) -> dict[str, float]:
  """Of token rewards [T_i] of responses sampled from sft.

  Returns:
    kl: KL(sft || ref), the mean summed reward, nats per response; kl_se: its standard error;
    reward_mean, reward_std: nats, over tokens; snr: their ratio (0 where the rewards are constant).
  """
  totals = np.asarray([r.astype(np.float64).sum() for r in rewards])
  tokens = np.concatenate(rewards).astype(np.float64)
  mean, std = float(tokens.mean()), float(tokens.std())
  error = float(totals.std(ddof=1) / np.sqrt(len(totals))) if len(totals) > 1 else float("nan")
  return {
      "kl": float(totals.mean()),
      "kl_se": error,
      "reward_mean": mean,
      "reward_std": std,
      "snr": mean / std if std > 0 else 0.0,
  }


def measure_reference(run: Any) -> None:
  """Writes reference.json: what was measured of each candidate, and which is chosen."""
  if not run.config.eval.reference_prompts or run.workdir.reference_file.exists():
    return
  kind, candidates = run.config.reference, _measure(run)
  record = {"candidates": candidates}
  try:
    chosen = kind.choose(candidates)
  except ValueError as e:
    raise UserError(f"config.reference: {e}") from None
  if chosen is not None:
    record["chosen"] = int(chosen)
  run.workdir.write(run.workdir.reference_file, record)
  if jax.process_index() == 0:
    for i, c in enumerate(candidates):
      mark = ", chosen" if i == record.get("chosen") else ""
      print(
          f"{c['text']}: KL(sft || ref) {c['kl']:.3f} +- {c['kl_se']:.3f} nats per response, mean "
          f"/ std of token rewards {c['snr']:.3f}, AUC of corrupted tokens {c['auc']:.3f}{mark}",
          file=sys.stderr,
      )


def _measure(run: Any) -> list[dict[str, Any]]:
  config, data = run.config, run.data.prompts
  rng = np.random.default_rng([config.seed, 0x5EF])
  n = min(config.eval.reference_prompts, len(data.tokens))
  chosen = np.sort(rng.choice(len(data.tokens), n, replace=False))
  prompts, demos = [data.tokens[i] for i in chosen], [data.demos[i] for i in chosen]
  right = [encode_response(d.response, d.prompt, run.tokenizer, ended=d.ended) for d in demos]
  fits = fitting(prompts, right, run.model.cfg.max_length)
  corrupted = corrupt_responses(
      [demos[i] for i in fits], [right[i] for i in fits], run.tokenizer, run.stop_ids,
      run.benchmark,
  )
  sft, scorer = run.sft(), run.scorer
  sampled = run.responder.respond((sft,), prompts, run.rng("reference"))
  rows = (
      [*prompts, *(prompts[fits[c.index]] for c in corrupted)],
      [*(s.tokens for s in sampled), *(c.tokens for c in corrupted)],
  )
  under_sft = scorer.logps(sft, *rows)
  out = []
  for candidate in config.reference.candidates(run):
    ref = candidate(run, run.dtype)
    rewards = [
        a - b for a, b in zip(under_sft, scorer.reference_logps(ref, *rows), strict=True)
    ]
    wrong = [float(r[c.position]) for r, c in zip(rewards[n:], corrupted)]
    before = [r[: c.position] for r, c in zip(rewards[n:], corrupted)]
    area = auc(np.asarray(wrong), np.concatenate([np.zeros(0), *before]))
    out.append({"text": candidate.describe(), **reward_statistics(rewards[:n]), "auc": area})
  return out
