"""Operations and bytes moved of a task, counted by hand: the limits that times are compared with.

The operations are those of `dpr_jax.planning.flops`, where a multiply-add is two and only matrix
products count, but for what is computed again (remat, chunked logits): that is our choice, not
the task's.
"""

from dpr_jax.models import ModelConfig
from dpr_jax.planning import flops


def head_weights(cfg: ModelConfig) -> int:
  return cfg.hidden_size * cfg.vocab_size


def seen(cfg: ModelConfig, first: int, last: int) -> int:
  """Keys that the tokens at positions first..last - 1 look at, summed over layers."""
  return flops.attention(cfg, last - first, past=first) // (4 * cfg.num_heads * cfg.head_dim)


def forward_flops(cfg: ModelConfig, rows: int, length: int, scored: int, first: int = 0) -> int:
  """Of rows of tokens at positions first..first + length - 1.

  Args:
    scored: columns of a row that go through the head.
  """
  return flops.forward(cfg, rows, length, past=first, logits=scored)


def train_flops(cfg: ModelConfig, rows: int, length: int, scored: int) -> int:
  """Forward, gradient of activations, gradient of weights; adapters train without the last."""
  return (2 if cfg.lora.rank else 3) * forward_flops(cfg, rows, length, scored)


def decode_bytes(cfg: ModelConfig, rows: int, prompt: int, new: int, itemsize: int) -> float:
  """Read from memory in one decoding step, on average: all weights once, each row's cache."""
  weights = (flops.layer_params(cfg) + head_weights(cfg)) * itemsize
  keys = seen(cfg, prompt, prompt + new) / max(new, 1)
  return weights + rows * 2 * keys * cfg.num_kv_heads * cfg.head_dim * itemsize
