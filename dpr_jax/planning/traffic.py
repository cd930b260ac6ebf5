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
  """Keys and values of `tokens` tokens a row that a step of decoding reads."""
  kinds = [cfg.layer_pattern[i % len(cfg.layer_pattern)] for i in range(cfg.num_layers)]
  ways = tensor if cfg.num_kv_heads % tensor == 0 else 1
  slots = sum(min(tokens, cfg.window) if kind == LOCAL else tokens for kind in kinds)
  return 2 * WORD * rows * slots * cfg.num_kv_heads * cfg.head_dim / ways


def rollout(cfg: ModelConfig, tensor: int, rows: float, prompt: int, new: int) -> float:
  """Weights for the prefill, each token and two scorings; the cache so far for each token."""
  middle = prompt + new // 2
  decode = (new - 1) * (weights(cfg, tensor) + cache_bytes(cfg, tensor, rows, middle))
  return decode + 3 * weights(cfg, tensor)
