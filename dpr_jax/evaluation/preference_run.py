"""Both responses of each pair of preference data, scored by two models."""

import collections
import dataclasses
import functools
import logging
from typing import Any

import numpy as np

from dpr_jax.data.limits import check_length
from dpr_jax.data.preferences import SAME
from dpr_jax.data.templates import encode_response, render_prompt
from dpr_jax.errors import UserError
from dpr_jax.evaluation.benchmark_run import BenchmarkRun, digest
from dpr_jax.evaluation.scoring import Scorer
from dpr_jax.evaluation.statistics import compare, share
from dpr_jax.evaluation.token_scores import TokenScores
from dpr_jax.loading import LoadedModel
from dpr_jax.training.integrity import fingerprint as fingerprint_arrays

_log = logging.getLogger(__name__)
_SHOWN = 5
_SIDES = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class PreferenceRun(BenchmarkRun):
  """Pairs in place of prompts; `benchmark` is a `Preference`, and `loaded` pi_sft."""

  ref: LoadedModel | None = None

  @functools.cached_property
  def pairs(self) -> list[tuple[np.ndarray, ...] | str]:
    """Token ids of prompt, chosen and rejected, int32; or why they are not scored."""
    return [self._encoded(demo) for demo in self.demos]

  def _encoded(self, demo):
    how = self.loaded.tokenizer, self.template
    limit = min(m.model.cfg.max_length for m in (self.loaded, self.ref))
    sides = demo, demo.meta["rejected"]
    too_long = f"longer than the {limit} tokens that the models were made for"
    if problem := demo.meta["problem"]:
      return problem
    try:
      for side in sides:
        check_length(side.messages, self.loaded.tokenizer, limit, demo.source)
    except UserError:
      return too_long
    prompt = render_prompt(demo.prompt, *how, demo.source)
    responses = [
        encode_response(d.messages[-1], d.prompt, *how, demo.source, d.ended) for d in sides
    ]
    if np.array_equal(*responses):  # By a template that trims, for example.
      return SAME
    return too_long if len(prompt) + max(map(len, responses)) > limit else (prompt, *responses)

  @property
  def skipped(self) -> dict[str, dict[str, Any]]:
    """Why pairs are not scored -> how many, and the first few."""
    found = collections.defaultdict(list)
    for demo, pair in zip(self.demos, self.pairs, strict=True):
      if isinstance(pair, str):
        found[pair].append(demo.source)
    return {why: {"count": len(at), "first": at[:_SHOWN]} for why, at in found.items()}

  def check(self):
    n, skipped = len(self.demos), self.skipped
    lines = [
        f"{what['count']} of {n} pairs are not scored: {why} ({', '.join(what['first'])})"
        for why, what in skipped.items()
    ]
    if lines and sum(what["count"] for what in skipped.values()) == n:
      raise UserError("; ".join(lines))
    for line in lines:
      _log.warning("%s", line)

  def fingerprint(self):
    ids = [p if isinstance(p, str) else [x.tolist() for x in p] for p in self.pairs]
    return digest([ids, fingerprint_arrays(self.ref.variables)])

  def answer(self, number, on_batch):
    block = self.blocks[number]
    chosen = [i for i in block if not isinstance(self.pairs[i], str)]
    prompts = [self.pairs[i][0] for i in chosen for _ in _SIDES]
    responses = [ids for i in chosen for ids in self.pairs[i][1:]]
    under_sft, under_ref = (
        Scorer(m.model, self.mesh, self.batch_size).values(m.variables, prompts, responses)
        for m in (self.loaded, self.ref)
    )
    found = iter([
        TokenScores(logp, ref, lse) for (logp, lse), (ref, _) in zip(under_sft, under_ref)
    ])
    out = []
    for i in block:
      demo, pair = self.demos[i], self.pairs[i]
      line = {"index": i, "sample": 0, "prompt": "".join(m["content"] for m in demo.prompt[-1:])}
      if isinstance(pair, str):
        line["skipped"] = pair
      else:
        scores = self.benchmark.score_pair(i, next(found), next(found))
        for side, d, ids, s in zip(_SIDES, (demo, demo.meta["rejected"]), pair[1:], scores):
          line[side] = {"response": d.response, "token_ids": ids.tolist(), "scores": s}
      out.append(line)
    on_batch(len(block))
    return out

  def results(self, records):
    scored = [[r[side]["scores"] for side in _SIDES] for r in records if "skipped" not in r]
    columns = self.benchmark.scores
    wins = {
        name: np.array([0.5 + 0.5 * np.sign(a[name] - b[name]) for a, b in scored])
        for name in columns
    }
    first, *others = columns
    return {
        "n": len(scored),
        "metrics": {name: share(values) for name, values in wins.items()},
        "columns": {name: vars(column) for name, column in columns.items()},
        "comparisons": [
            {"pair": [first, other], "metric": "accuracy", **compare([wins[first]], [wins[other]])}
            for other in others
        ],
        "skipped": self.skipped,
    }
