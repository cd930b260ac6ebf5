"""How likely demonstrated responses are."""

import dataclasses
import math

import numpy as np

from dpr_jax.evaluation.benchmarks.base import Benchmark
from dpr_jax.evaluation.benchmarks.exact import differs
from dpr_jax.evaluation.metrics import Column
from dpr_jax.evaluation.statistics import ratio_interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity(Benchmark):
  """Negative log-likelihood of the responses of a file, EOS included.

  `perplexity` is the mean over responses of each one's own; `corpus_perplexity`, the usual figure,
  is exp(NLL of all responses / tokens of all responses).
  """

  kind = "perplexity"
  title = "perplexity"
  likelihood = True
  scores = {
      "nll": Column("NLL per response", "nats", better=-1),
      "nll_per_token": Column("NLL per token", "nats", better=-1),
      "perplexity": Column("Perplexity per response", "", better=-1),
  }
  summaries = {
      "corpus_perplexity": Column("Perplexity of all responses", "", better=-1, main=True)
  }

  def score_logps(self, demo, logps):
    nll = -float(np.asarray(logps, np.float64).sum())
    per_token = nll / len(logps)
    return {"nll": nll, "nll_per_token": per_token, "perplexity": math.exp(per_token)}

  def is_wrong(self, demo, text):
    return differs(demo, text)

  def summarize(self, records):
    nll = np.array([r["scores"]["nll"] for r in records])
    tokens = np.array([r["length"] for r in records], np.float64)
    found = ratio_interval(nll, tokens)
    low, high = (math.exp(x) for x in found["ci95"])
    return {
        "corpus_perplexity": {"mean": math.exp(found["mean"]), "ci95": [low, high], "n": found["n"]}
    }
