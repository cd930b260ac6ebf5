"""How likely demonstrated responses are."""

import dataclasses
import math

import numpy as np

from dpr_jax.evaluation.benchmarks.base import Benchmark
from dpr_jax.evaluation.metrics import Column


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity(Benchmark):
  """Negative log-likelihood of the responses of a file, EOS included."""

  kind = "perplexity"
  title = "perplexity"
  likelihood = True
  scores = {
      "nll": Column("NLL per response", "nats", better=-1),
      "nll_per_token": Column("NLL per token", "nats", better=-1),
      "perplexity": Column("Perplexity per token", "", better=-1),
  }

  def score_logps(self, demo, logps):
    nll = -float(np.asarray(logps, np.float64).sum())
    per_token = nll / len(logps)
    return {"nll": nll, "nll_per_token": per_token, "perplexity": math.exp(per_token)}
