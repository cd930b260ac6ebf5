"""Bytes that each device must move through its HBM: weights, state, saved activations, cache.

A lower bound that counts what cannot stay on the chip between two uses; what a compiler spills
beyond it is not counted.
"""

import numpy as np

from dpr_jax.methods.programs import RolloutWork, TrainWork
from dpr_jax.models.config import LOCAL, ModelConfig

WORD = 2  # bytes of the compute dtype, bfloat16.


def weights(cfg: ModelConfig, tensor: int) -> float:
  """Bytes per device of all weights in the compute dtype when used: split over tensor alone."""
  return WORD * cfg.num_params / tensor


def train(
    cfg: ModelConfig, tensor: int, rows: float, work: TrainWork, state_bytes: float
) -> float:
  """A train step: state in and out, weights of each pass, layer inputs saved and read again.

  Args:
    rows: rows of the whole batch that one device holds.
    state_bytes: arguments and results of the step.
  """
  passes = 3 if cfg.remat == "full" else 2  # forward, again, backward.
  saved = 2 * WORD * rows * work.tokens * cfg.hidden_size * cfg.num_layers
  # Of the teachers the heads are read, forward and again; their states are in `state_bytes`.
  heads = 2 * work.teachers * WORD * cfg.vocab_size * cfg.hidden_size / tensor
  return state_bytes + work.accumulation * (passes * weights(cfg, tensor) + heads) + saved


def cache_bytes(cfg: ModelConfig, tensor: int, rows: float, tokens: int) -> float:
  """Keys and values of `tokens` columns per row, or of a window: what a decoding step reads."""
  ways = tensor if cfg.num_kv_heads % tensor == 0 else 1
  slots = sum(min(tokens, cfg.window) if kind == LOCAL else tokens for kind in cfg.layer_kinds)
  return 2 * WORD * rows * slots * cfg.num_kv_heads * cfg.head_dim / ways


def rollout(cfg: ModelConfig, tensor: int, rows: float, work: RolloutWork) -> float:
  """Weights for the prefill, each step of decoding and each scoring; the cache for each step.

  A step reads the whole cache, with room for `new` tokens, and masks what is not filled yet.

  Args:
    rows: that one device decodes at a time.
  """
  step = weights(cfg, tensor) + cache_bytes(cfg, tensor, rows, work.prompt + work.new)
  return work.steps * step + (1 + work.scored) * weights(cfg, tensor)


def minimum_received(
    cfg: ModelConfig, fsdp: int, accumulation: int, tokens: float, logits: float
) -> dict[str, float]:
  """Least bytes for one of `fsdp` devices to receive in a full train step on mesh (1, fsdp, 1).

  A device holds 1/n of every weight, n = fsdp. Of the layers it receives the other (n - 1)/n in the
  compute dtype, forward and backward for each micro-batch, and of their gradients its part from
  n - 1 others once, added up on the way. What remat computes again needs no gather of its own: it
  uses the weights that the backward pass of that layer uses next. Of the embedding, whose values
  the backward pass does not need, and of the head it receives either the weights or activations,
  whichever is less (see `models/embedding.py`). The least of these ways; not a proof that
  there is no other.

  Args:
    tokens, logits: of a micro-batch on one device: how many there are, and of how many the logits
      are computed.
  """
  n, share, a = fsdp, (fsdp - 1) / fsdp, accumulation
  column = WORD * cfg.hidden_size  # Bytes of the activations of one token.

  def weights(params: int, backward: bool = True) -> np.ndarray:
    """Gathered forward, gathered backward, gradients reduced."""
    return WORD * share * params * np.array([a, a * backward, 1.0])

  embedding = cfg.vocab_size * cfg.hidden_size
  # All activations, again backward, all their cotangents.
  head = a * (n - 1) * logits * column * np.ones(3)
  rows = a * share * tokens * column * np.array([1.0, 0.0, 1.0])  # Exchanged for columns, and back.
  least = lambda *ways: min(ways, key=lambda x: x.sum())
  embedded = weights(embedding, backward=False)
  if cfg.tied_head:
    total = weights(cfg.num_params - embedding)
    total += least(weights(embedding), head + rows, head + embedded)
  else:
    total = weights(cfg.num_params - 2 * embedding)
    total += least(weights(embedding), head) + least(embedded, rows)
  names = ("gathered_forward", "gathered_backward", "gradients_reduced")
  return dict(zip(names, map(float, total)))
