"""Responses of one or several models to a list of prompts, batch by batch."""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dpr_jax import sharding
from dpr_jax.data.batches import PromptBatch
from dpr_jax.data.loader import pad_prompts, prompt_width
from dpr_jax.evaluation.scoring import Scorer
from dpr_jax.keys import vectorizable
from dpr_jax.rollout.sampler import generate
from dpr_jax.rollout.sampling import ON_POLICY, Sampling
from dpr_jax.rollout.stop_strings import build_stop_strings


def _answer(model, members, prompts, seeds_Gx2, rng, samples_per_prompt, **how):
  rng, samples_N = vectorizable(rng), np.arange(samples_per_prompt, dtype=np.int32)

  def keys_of(words_2):
    key = jax.random.fold_in(jax.random.fold_in(rng, words_2[0]), words_2[1])
    return jax.vmap(lambda sample: jax.random.fold_in(key, sample))(samples_N)

  keys_B = jax.vmap(keys_of)(seeds_Gx2).reshape(-1)
  return generate(model, members, prompts, keys_B, samples_per_prompt=samples_per_prompt, **how)


_generate = jax.jit(
    _answer,
    static_argnums=0,
    static_argnames=(
        "max_new_tokens", "stop_ids", "sampling", "weights", "samples_per_prompt", "slots"
    ),
)
_WAVE = 4  # batches of prompts that one program answers, refilling its slots.


def prompt_seeds(prompts: Sequence[np.ndarray]) -> np.ndarray:
  """What tells prompts apart in the random keys, uint32 [G, 2]: their tokens, whatever is beside.

  Of equal prompts each has its own, by their order.
  """
  before, out = collections.Counter(), []
  for prompt in prompts:
    tokens = np.asarray(prompt, "<i4").tobytes()
    number = before[tokens].to_bytes(8, "little")
    before[tokens] += 1
    digest = hashlib.blake2b(number + tokens, digest_size=8).digest()
    out.append(np.frombuffer(digest, "<u4"))
  return np.asarray(out, np.uint32).reshape(-1, 2)


@dataclasses.dataclass(frozen=True)
class Response:
  """What a model answered."""

  tokens: np.ndarray  # int32 [T], with the token that ended the response, if one did.
  hit_eos: bool  # Ended by a stop id or a stop string; False: truncated at max_new_tokens.
  logp: float  # of the whole response under the sampled distribution's logits, nats.


@dataclasses.dataclass(frozen=True)
class Responder:
  """Answers prompts, batch by batch; the same in every process."""

  model: Any
  mesh: jax.sharding.Mesh
  # Rows decoded at a time. A row whose response has ended makes room for the next one; prompts of
  # similar length are answered together.
  batch_size: int
  prompt_length: int  # tokens of the longest prompt.
  max_new_tokens: int
  stop_ids: tuple[int, ...]
  stop_strings: tuple[str, ...] = ()  # that end a response as well; see `rollout.stop_strings`.
  tokenizer: Any = None  # of the model; only stop strings need it.

  def __post_init__(self):
    sharding.check_rows(self.mesh, "batch_size", self.batch_size)

  @functools.cached_property
  def stops(self) -> Any:
    """The stop strings as the decode loop takes them; None if there are none.

    Raises:
      UserError: a stop string that can never be used, or a tokenizer whose text is unknown.
    """
    stops = build_stop_strings(self.tokenizer, self.model.cfg.vocab_size, self.stop_strings)
    return stops and jax.device_put(stops, sharding.replicated(self.mesh))

  @property
  def scorer(self) -> Scorer:
    """Scores with the same model."""
    return Scorer(self.model, self.mesh, self.batch_size)

  def respond(
      self,
      members: Sequence[Any],
      prompts: Sequence[np.ndarray],
      rng: jax.Array,
      *,
      sampling: Sampling = ON_POLICY,
      weights: Sequence[float] = (1.0,),
      samples_per_prompt: int = 1,
      seeds: np.ndarray | None = None,
      on_batch: Callable[[int], None] = lambda n: None,
  ) -> list[Response]:
    """Responses in the order of `prompts`, those of one prompt adjacent.

    A sampled response depends on its prompt and its number alone, but for rounding: not on the
    other prompts, the batch size or the mesh.

    Args:
      members, weights, sampling: see `rollout.sampler.generate`.
      prompts: token ids, int32 [P_i] each.
      samples_per_prompt: responses per prompt, which share its prefill.
      seeds: `prompt_seeds`, where these prompts are part of more.
      on_batch: called with the number of responses just given.
    """
    n, ways = samples_per_prompt, self.mesh.shape["data"] * self.mesh.shape["fsdp"]
    out: list[Response | None] = [None] * (len(prompts) * n)
    seeds_Gx2 = prompt_seeds(prompts) if seeds is None else seeds
    # The longest first: a memory error comes at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    unit = -(-self.batch_size // (n * ways)) * ways  # prompts that fill the slots once.
    wave = _WAVE * unit
    # Systems that differ in their temperature alone share a program.
    fixed = dataclasses.replace(sampling, temperature=float(sampling.temperature > 0))
    for start in range(0, len(prompts), wave):
      chosen = order[start : start + wave]
      width = prompt_width(len(prompts[chosen[0]]), self.prompt_length)
      filler = [np.zeros((0,), np.int32)] * (-len(chosen) % unit)
      batch: PromptBatch = pad_prompts([prompts[i] for i in chosen] + filler, width)
      padding = ((0, len(filler)), (0, 0))
      sample = sharding.to_host(
          _generate(
              self.model,
              tuple(members),
              sharding.place(batch, self.mesh),
              np.pad(seeds_Gx2[chosen], padding),
              rng,
              max_new_tokens=self.max_new_tokens,
              stop_ids=tuple(self.stop_ids),
              sampling=fixed,
              temperature=np.float32(sampling.temperature),
              weights=tuple(weights),
              samples_per_prompt=n,
              slots=self.batch_size,
              stop_strings=self.stops,
          )
      )
      for row, i in enumerate(i * n + j for i in chosen for j in range(n)):
        length = int(sample.lengths[row])
        tokens = sample.tokens[row, width : width + length]
        out[i] = Response(tokens, bool(sample.hit_eos[row]), float(sample.logp[row].sum()))
      on_batch(len(chosen) * n)
    return out


def compilations() -> int:
  """How many programs `respond` has compiled in this process."""
  return _generate._cache_size()


def response_text(
    tokenizer: Any,
    tokens: Sequence[int],
    hit_eos: bool,
    stop_ids: Sequence[int],
    stop_strings: Sequence[str] = (),
) -> str:
  """The text of a response, up to what ended it.

  Args:
    tokens: its token ids, with the stop id if one ended it.
    hit_eos: whether the response ended; False if it was truncated.
    stop_ids: the last token is left out if it is one of these.
    stop_strings: the text is cut before the earliest occurrence of any of them.
  """
  tokens = [int(t) for t in tokens]
  if hit_eos and tokens and tokens[-1] in stop_ids:
    tokens = tokens[:-1]
  text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
  found = [text.find(string) for string in stop_strings]
  return text[: min((at for at in found if at >= 0), default=None)]
