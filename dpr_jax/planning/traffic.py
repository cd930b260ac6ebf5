"""Bytes a device must move through its HBM, at the least: weights, state, saved activations, cache.

A lower bound by counting what cannot stay on the chip between two uses; what a compiler spills
beyond it is not counted.
"""

from dpr_jax.models.config import LOCAL, ModelConfig

WORD = 2  # bytes of the compute dtype, bfloat16.


def weights(cfg: ModelConfig, tensor: int) -> float:
  """Bytes of all weights in the compute dtype as a device uses them: split over tensor alone."""
  return WORD * cfg.num_params / tensor


def train(
    cfg: ModelConfig, tensor: int, rows: float, tokens: int, state_bytes: float, accumulation: int
) -> float:
  """A train step: state in and out, weights of each pass, layer inputs saved and read again.

  Args:
    rows: rows of the whole batch that one device holds.
    state_bytes: arguments and results of the step.
  """
  passes = 3 if cfg.remat == "full" else 2  # forward, again, backward.
  saved = 2 * WORD * rows * tokens * cfg.hidden_size * cfg.num_layers
  return state_bytes + accumulation * passes * weights(cfg, tensor) + saved


def cache_bytes(cfg: ModelConfig, tensor: int, rows: float, tokens: int) -> float:
  """Keys and values of `tokens` columns a row, or of a window: what a step of decoding reads."""
  kinds = [cfg.layer_pattern[i % len(cfg.layer_pattern)] for i in range(cfg.num_layers)]
  ways = tensor if cfg.num_kv_heads % tensor == 0 else 1
  slots = sum(min(tokens, cfg.window) if kind == LOCAL else tokens for kind in kinds)
  return 2 * WORD * rows * slots * cfg.num_kv_heads * cfg.head_dim / ways


def rollout(
    cfg: ModelConfig,
    tensor: int,
    rows: float,
    prompt: int,
    new: int,
    steps: int,
    scored: int = 2,
) -> float:
  """Weights for the prefill, each step of decoding and each scoring; the cache for each step.

  A step reads the whole cache, with room for `new` tokens, and masks what is not filled yet.

  Args:
    rows: that one device decodes at a time.
    steps: from `flops.decode_steps`.
    scored: models that score the responses.
  """
  step = weights(cfg, tensor) + cache_bytes(cfg, tensor, rows, prompt + new)
  return steps * step + (1 + scored) * weights(cfg, tensor)


def minimum_received(cfg: ModelConfig, fsdp: int, accumulation: int) -> dict[str, float]:
  """Bytes that one of `fsdp` devices must receive in a full train step on mesh (1, fsdp, 1).

  It holds 1/n of every weight, n = fsdp, and receives the other (n - 1)/n in the compute dtype:
  forward and backward for each micro-batch, but the input embedding, whose values the backward
  pass does not need, forward alone. Its gradients it receives once: its part from n - 1 others,
  added up on the way. What remat computes again needs no gather of its own: it uses the weights
  that the backward pass of that layer uses next.
  """
  share = WORD * (fsdp - 1) / fsdp
  embedding = 0 if cfg.tied_head else cfg.vocab_size * cfg.hidden_size
  return {
      "gathered_forward": accumulation * share * cfg.num_params,
      "gathered_backward": accumulation * share * (cfg.num_params - embedding),
      "gradients_reduced": share * cfg.num_params,
  }
