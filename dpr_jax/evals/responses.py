"""Responses of one or several models to a list of prompts, batch by batch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dpr_jax import sharding
from dpr_jax.data.batches import PromptBatch
from dpr_jax.data.loader import pad_prompts
from dpr_jax.rollout.sampler import Sampling, generate

_generate = jax.jit(
    generate,
    static_argnums=0,
    static_argnames=("max_new_tokens", "stop_ids", "sampling", "weights"),
)
_POLICY_ITSELF = Sampling()


@dataclasses.dataclass(frozen=True)
class Response:
  """What a model answered."""

  tokens: np.ndarray  # int32 [T], the EOS included where there is one.
  hit_eos: bool  # False: cut off at max_new_tokens.
  logp: float  # of the whole response under the sampled distribution's logits, nats.


def respond(
    model: Any,
    members: Sequence[Any],
    prompts: Sequence[np.ndarray],
    rng: jax.Array,
    *,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    prompt_length: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    sampling: Sampling = _POLICY_ITSELF,
    weights: Sequence[float] = (1.0,),
    on_batch: Callable[[int], None] = lambda n: None,
) -> list[Response]:
  """One response a prompt, in the order of `prompts`; the same in every process.

  Args:
    members, weights, sampling, max_new_tokens, stop_ids: see `rollout.sampler.generate`.
    prompts: token ids, int32 [P_i] each, at most `prompt_length`.
    batch_size: rows decoded at a time; the last batch is filled with empty rows.
    on_batch: called with the number of prompts just answered.
  """
  sharding.check_batch(mesh, eval__batch_size=batch_size)
  out = []
  for start in range(0, len(prompts), batch_size):
    chunk = list(prompts[start : start + batch_size])
    filler = [np.zeros((0,), np.int32)] * (batch_size - len(chunk))
    batch: PromptBatch = pad_prompts(chunk + filler, prompt_length)
    sample = sharding.to_host(
        _generate(
            model,
            tuple(members),
            sharding.place(batch, mesh),
            jax.random.fold_in(rng, start // batch_size),
            max_new_tokens=max_new_tokens,
            stop_ids=tuple(stop_ids),
            sampling=sampling,
            weights=tuple(weights),
        )
    )
    for i in range(len(chunk)):
      length = int(sample.lengths[i])
      tokens = sample.tokens[i, prompt_length : prompt_length + length]
      out.append(Response(tokens, bool(sample.hit_eos[i]), float(sample.logp[i].sum())))
    on_batch(len(chunk))
  return out


def response_text(tokenizer: Any, response: Response, stop_ids: Sequence[int]) -> str:
  """The text of a response, without the token that ended it."""
  tokens = [int(t) for t in response.tokens]
  if response.hit_eos and tokens and tokens[-1] in stop_ids:
    tokens = tokens[:-1]
  return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
