"""A local reward model: a sequence classifier that gives a conversation a number."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpr_jax import inputs, weights
from dpr_jax.config.fields import setting
from dpr_jax.data.chat_template import ChatTemplate
from dpr_jax.data.demos import Message
from dpr_jax.data.text_ids import encode
from dpr_jax.errors import UserError
from dpr_jax.evaluation.judges.base import Judge
from dpr_jax.evaluation.scoring import Scorer
from dpr_jax.models import Transformer
from dpr_jax.models.variables import abstract_variables
from dpr_jax.weights.hf import open_classifier, read_json

_CHUNK = 64  # batches between two looks at whether to stop.


@functools.partial(jax.jit, static_argnums=0)
def token_rewards(model, params, score_D, tokens_BxT, segment_ids_BxT):
  """What the head makes of the state of each token, float32 [B, T]."""
  hidden_BxTxD, _ = model.apply({"params": params}, tokens_BxT, None, segment_ids_BxT)
  return jnp.einsum("btd,d->bt", hidden_BxTxD.astype(jnp.float32), score_D,
                    precision=jax.lax.Precision.HIGHEST)


def conversation_ids(messages: Sequence[Message], tokenizer: Any) -> np.ndarray:
  """A whole conversation as its chat template has it, int32 [T]; a token spelled out is text."""
  template = ChatTemplate.of(tokenizer)
  return np.asarray(encode(template.render(template.protected(messages)), tokenizer), np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModel(Judge):
  """A Hugging Face folder of, for example, Qwen3ForSequenceClassification with one label.

  A conversation is rendered with the model's own chat template. As in transformers, its reward is
  read at the last token that is not the padding token of config.json.
  """

  kind = "reward_model"
  rewards = everywhere = True
  model: str = setting("", "Hugging Face folder")

  def check(self, config):
    if not self.model:
      raise ValueError("model is missing; a Hugging Face folder")

  def _config(self):
    folder = pathlib.Path(self.model).expanduser()
    if not folder.is_dir():
      raise UserError(f"reward model {self.model}: no such folder; name a Hugging Face folder (a "
                      "model at an endpoint needs its url, too)")
    return open_classifier(folder)[0]

  def prepare(self, tokenizer=None):
    self._config()

  @functools.cached_property
  def _files(self):
    return inputs.pretrained_files(self.model)

  def identity(self):
    return self._files

  def held(self, mesh, dtype):
    return abstract_variables(self._config(), mesh, dtype)

  def open(self, setting):
    cfg, params, score_D = weights.load_classifier(self.model, setting.dtype, setting.mesh)
    model = Transformer(dataclasses.replace(cfg, dtype=setting.dtype))
    tokenizer = weights.load_tokenizer(self.model)
    padding = read_json(pathlib.Path(self.model).expanduser() / "config.json").get("pad_token_id")
    score = functools.partial(token_rewards, model, params, jnp.asarray(score_D))
    scorer = Scorer(model, setting.mesh, setting.batch_size)

    def replies(questions):
      rows = [conversation_ids(q.messages, tokenizer) for q in questions]
      fits = [i for i, row in enumerate(rows) if 0 < len(row) <= cfg.max_length]
      yield from ((i, {"reward": None}) for i in sorted({*range(len(rows))} - {*fits}))
      # The longest first, as within a chunk.
      fits.sort(key=lambda i: -len(rows[i]))
      for start in range(0, len(fits), _CHUNK * setting.batch_size):
        if setting.stopping():
          return
        chosen = fits[start : start + _CHUNK * setting.batch_size]
        found = scorer.per_response(score, [rows[i][:0] for i in chosen], [rows[i] for i in chosen])
        for i, rewards_T in zip(chosen, found, strict=True):
          own = np.flatnonzero(rows[i] != padding) if padding is not None else ()
          last = own[-1] if len(own) else -1
          yield i, {"reward": float(rewards_T[last])}

    return replies
