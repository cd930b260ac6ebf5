"""A system is a way to answer: one trained model, or several whose logits are combined."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dpr_jax.evaluation.metrics import MODES
from dpr_jax.evaluation.responses import Responder, Response
from dpr_jax.rollout.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class System:
  """How a system answers: logits = sum_i weights[i] * logits of the i-th of `load()`."""

  name: str
  load: Callable[[], tuple[Any, ...]]  # variables of its models, in the compute dtype.
  weights: tuple[float, ...] = (1.0,)
  temperature: float = 1.0  # of the sampled mode.
  modes: tuple[str, ...] = MODES
  candidates: int = 1  # responses that each answer is chosen from.

  @property
  def single(self) -> bool:
    """Whether it is one model, or ref: what has a likelihood of its own."""
    return self.name == "ref" or self.weights == (1.0,) and self.temperature == 1.0

  @property
  def on_frontier(self) -> bool:
    """Whether its temperature may vary; a system that only changes it lies on another's curve."""
    return "greedy" in self.modes and self.temperature == 1.0

  @property
  def is_distribution(self) -> bool:
    """Whether its next-token distribution is known: a KL to it can be measured."""
    return "sampled" in self.modes and self.temperature > 0

  def respond(
      self,
      members: tuple[Any, ...],
      responder: Responder,
      prompts: Sequence[np.ndarray],
      rng: jax.Array,
      *,
      temperature: float,
      seed: int,
      samples_per_prompt: int = 1,
      on_batch: Callable[[int], None] = lambda n: None,
  ) -> tuple[list[Response], list[dict[str, float]]]:
    """Responses to prompts, and what else is known of each.

    Args:
      members: what `load` gave.
      seed: of what is not sampled from the models.
    """
    del seed
    responses = responder.respond(
        members, prompts, rng, weights=self.weights, sampling=Sampling(temperature=temperature),
        samples_per_prompt=samples_per_prompt, on_batch=on_batch,
    )
    return responses, [{} for _ in responses]
