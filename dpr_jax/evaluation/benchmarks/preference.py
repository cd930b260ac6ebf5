"""Which of two responses people prefer, told by the reward that an SFT model holds."""

import dataclasses

import numpy as np

from dpr_jax.config.fields import setting
from dpr_jax.data.preferences import read_pairs
from dpr_jax.errors import UserError, naming
from dpr_jax.evaluation.benchmarks.base import Benchmark
from dpr_jax.evaluation.metrics import Column
from dpr_jax.evaluation.token_scores import LABELS, REDUCE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(Benchmark):
  """Pairwise accuracy: how often the chosen response has the higher score; ties count half.

  --model is pi_sft. The longer response, and a random one, are there to be compared with.
  """

  kind = "preference"
  title = "preference data"
  own_requests = True
  scores = {
      **{f"{name}_{how}": Column(f"{label}, {how}", "%", better=1)
         for name, label in LABELS.items() for how in REDUCE},
      "length": Column("the longer one", "%", better=1),
      "random": Column("random", "%", better=1),
  }
  ref: str = setting("", "CKPT of pi_ref, with the tokenizer of --model")
  seed: int = setting(0, "of the random score", low=0)

  def read(self, path, limit=0):
    """The chosen conversations; `meta` has the rejected one, and what is wrong with the pair."""
    return [
        dataclasses.replace(p.chosen, meta={"rejected": p.rejected, "problem": p.problem})
        for p in read_pairs(path, limit)
    ]

  def score_pair(self, index, chosen, rejected):
    """The scores of both responses of a pair.

    Args:
      index: of the pair.
      chosen, rejected: their `TokenScores`.
    """
    return [
        {**found.of_response(), "length": float(len(found.logp_sft)), "random": float(luck)}
        for found, luck in zip(
            (chosen, rejected), np.random.default_rng([self.seed, index]).random(2)
        )
    ]

  def run(self, data, limit, **how):
    from dpr_jax.evaluation.preference_run import PreferenceRun
    from dpr_jax.loading import load_checkpoint

    if not self.ref:
      raise UserError("--benchmark.ref is missing: the CKPT of pi_ref, such as runs/smoke/sft@0.5")
    sft = how["loaded"]
    with naming("--benchmark.ref"):
      ref = load_checkpoint(self.ref, how["mesh"], sft.model.cfg.dtype, beside=sft)
    if ref.tokenizer.get_vocab() != sft.tokenizer.get_vocab():
      raise UserError(f"--benchmark.ref={self.ref} and --model have different vocabularies; token "
                      "rewards need the same tokens")
    return PreferenceRun(self, ref=ref, **how)
