"""The reward that an SFT model holds, as a judge of whole responses."""

import dataclasses
import functools

import numpy as np

from dpr_jax.config.fields import setting
from dpr_jax.data.templates import encode_response, render_prompt
from dpr_jax.errors import UserError
from dpr_jax.evaluation.judges.base import Judge
from dpr_jax.evaluation.scoring import Scorer, fitting
from dpr_jax.loading import fingerprint_checkpoint, load_checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogRatio(Judge):
  """log pi_sft(y | x) - log pi_ref(y | x), nats per response; without `ref` log pi_sft(y | x)."""

  kind = "log_ratio"
  rewards = everywhere = True
  sft: str = setting("", "CKPT")
  ref: str = setting("", "CKPT with the same tokenizer; '' for the likelihood under sft alone")

  def __post_init__(self):
    if not self.sft:
      raise ValueError("sft is missing; a CKPT such as runs/smoke/sft")

  @functools.cached_property
  def _files(self):
    return [fingerprint_checkpoint(ckpt) for ckpt in (self.sft, self.ref) if ckpt]

  def identity(self):
    return [self.kind, *self._files]

  def prepare(self):
    self.identity()  # Raises where nothing is there.

  def replies(self, questions, setting):
    sft = load_checkpoint(self.sft, setting.mesh, setting.dtype)
    ref = self.ref and load_checkpoint(self.ref, setting.mesh, setting.dtype, beside=sft)
    for other, what in ((ref and ref.tokenizer, f"--judge.ref={self.ref}"),
                        (setting.tokenizer, "the model whose responses it judges")):
      if other and other.get_vocab() != sft.tokenizer.get_vocab():
        raise UserError(f"--judge.sft={self.sft} and {what} have different vocabularies; their "
                        "tokens must be the same")
    how = sft.tokenizer, setting.template or sft.template
    prompts = [render_prompt(q.messages[:-1], *how) for q in questions]
    responses = [
        encode_response(q.messages[-1], q.messages[:-1], *how) if q.token_ids is None else
        np.asarray(q.token_ids, np.int32) for q in questions
    ]
    models = [sft, ref] if ref else [sft]
    fits = fitting(prompts, responses, min(m.model.cfg.max_length for m in models))
    yield from ((i, {"reward": None}) for i in sorted({*range(len(questions))} - {*fits}))
    unit = 64 * setting.batch_size
    for start in range(0, len(fits), unit):
      if setting.stopping():
        return
      chosen = fits[start : start + unit]
      totals = [
          [logp.astype(np.float64).sum() for logp in Scorer(
              m.model, setting.mesh, setting.batch_size
          ).logps(m.variables, [prompts[i] for i in chosen], [responses[i] for i in chosen])]
          for m in models
      ]
      for row, i in enumerate(chosen):
        yield i, {"reward": float(totals[0][row] - (totals[1][row] if ref else 0.0))}
