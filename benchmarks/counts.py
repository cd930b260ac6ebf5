"""Arithmetic and traffic of a decoder, counted by hand: the floors that times are held against.

A multiply-add is two operations. Only matrix products count: a model's norms, rope and softmax
are a few per cent. Recomputation (remat, chunked logits) does not count: it is our choice, not
the task's.
"""

from dpr_jax.models import ModelConfig


def layer_weights(cfg: ModelConfig) -> int:
  """Weights of the matrix products of all layers."""
  q, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
  return cfg.num_layers * cfg.hidden_size * (2 * q + 2 * kv + 3 * cfg.mlp_size)


def head_weights(cfg: ModelConfig) -> int:
  return cfg.hidden_size * cfg.vocab_size


def seen(cfg: ModelConfig, first: int, last: int) -> int:
  """Keys that the tokens at positions first..last - 1 look at, summed over layers."""
  total = 0
  for i in range(cfg.num_layers):
    window = cfg.window_of(cfg.layer_pattern[i % len(cfg.layer_pattern)]) or last
    total += sum(min(t + 1, window) for t in range(first, last))
  return total


def forward_flops(cfg: ModelConfig, rows: int, length: int, scored: int, first: int = 0) -> int:
  """Of rows of tokens at positions first..first + length - 1.

  Args:
    scored: columns of a row that go through the head.
  """
  attention = 4 * cfg.num_heads * cfg.head_dim * seen(cfg, first, first + length)
  row = 2 * layer_weights(cfg) * length + 2 * head_weights(cfg) * scored + attention
  return rows * row


def train_flops(cfg: ModelConfig, rows: int, length: int, scored: int) -> int:
  """Forward, gradient of activations, gradient of weights; adapters train without the last."""
  return (2 if cfg.lora.rank else 3) * forward_flops(cfg, rows, length, scored)


def decode_bytes(cfg: ModelConfig, rows: int, prompt: int, new: int, itemsize: int) -> float:
  """Read from memory in one decoding step, on average: all weights once, each row's cache."""
  weights = (layer_weights(cfg) + head_weights(cfg)) * itemsize
  keys = seen(cfg, prompt, prompt + new) / max(new, 1)
  return weights + rows * 2 * keys * cfg.num_kv_heads * cfg.head_dim * itemsize
