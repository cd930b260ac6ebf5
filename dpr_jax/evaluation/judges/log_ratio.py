"""The reward that an SFT model holds, as a judge of whole responses."""

import dataclasses
import functools

import numpy as np

from dpr_jax.config.fields import setting
from dpr_jax.data.templates import encode_response, render_prompt
from dpr_jax.errors import UserError
from dpr_jax.evaluation.judges.base import Judge
from dpr_jax.evaluation.scoring import Scorer, fitting
from dpr_jax.loading import describe_checkpoint, fingerprint_checkpoint, load_checkpoint
from dpr_jax.models.variables import abstract_variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogRatio(Judge):
  """log pi_sft(y | x) - log pi_ref(y | x), nats per response; without `ref` log pi_sft(y | x)."""

  kind = "log_ratio"
  rewards = everywhere = True
  sft: str = setting("", "CKPT")
  ref: str = setting("", "CKPT with the same tokenizer; '' for the likelihood under sft alone")

  def check(self, config):
    if not self.sft:
      raise ValueError("sft is missing; a CKPT such as runs/smoke/sft")

  @property
  def _models(self):
    return {"sft": self.sft, **({"ref": self.ref} if self.ref else {})}

  @functools.cached_property
  def _files(self):
    found = {name: fingerprint_checkpoint(ckpt) for name, ckpt in self._models.items()}
    return {f"{name}/{file}": value for name, files in found.items()
            for file, value in files.items()}

  def identity(self):
    return self._files

  def prepare(self, tokenizer=None):
    described = {name: describe_checkpoint(ckpt)[1] for name, ckpt in self._models.items()}
    self._check_vocabularies(described["sft"], described.get("ref"), tokenizer)

  def _check_vocabularies(self, sft, ref, writer):
    for other, what in ((ref, f"ref={self.ref}"), (writer, "the model whose responses it judges")):
      if other and other.get_vocab() != sft.get_vocab():
        raise UserError(f"log_ratio: sft={self.sft} and {what} have different vocabularies; their "
                        "tokens must be the same")

  def held(self, mesh, dtype):
    configs = (describe_checkpoint(ckpt)[0] for ckpt in self._models.values())
    return [abstract_variables(cfg, mesh, dtype) for cfg in configs]

  def open(self, setting):
    sft = load_checkpoint(self.sft, setting.mesh, setting.dtype)
    ref = self.ref and load_checkpoint(self.ref, setting.mesh, setting.dtype, beside=sft)
    self._check_vocabularies(sft.tokenizer, ref and ref.tokenizer, setting.tokenizer)
    # As the model that is judged was prompted: the vocabularies are the same, templates may not be.
    how = setting.tokenizer or sft.tokenizer, setting.template or sft.template
    models = [sft, ref] if ref else [sft]
    length = min(m.model.cfg.max_length for m in models)

    def replies(questions):
      prompts = [render_prompt(q.messages[:-1], *how) for q in questions]
      responses = [
          encode_response(q.messages[-1], q.messages[:-1], *how) if q.token_ids is None else
          np.asarray(q.token_ids, np.int32) for q in questions
      ]
      fits = fitting(prompts, responses, length)
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

    return replies
