"""Analytic FLOPs: two for each multiplication and addition of a matmul, nothing else counted.

Counted as executed: what `remat` and the chunked head compute again is included, as the chip must
do it. Attention counts the pairs that a token may see (half of the square, or a window): kernels
that compute masked pairs too do more, so all is a lower bound.
"""

import dataclasses

from dpr_jax.methods.programs import RolloutWork
from dpr_jax.models.config import ModelConfig


def layer_params(cfg: ModelConfig) -> int:
  """Multiplications per token of all projections of all layers, adapters included."""
  q, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
  d, f, r = cfg.hidden_size, cfg.mlp_size, cfg.lora.rank
  shapes = {"query": (d, q), "key": (d, kv), "value": (d, kv), "out": (q, d),
            "gate": (d, f), "up": (d, f), "down": (f, d)}
  total = sum(a * b for a, b in shapes.values())
  if r:
    total += sum(r * (a + b) for name, (a, b) in shapes.items() if name in cfg.lora.targets)
  return cfg.num_layers * total


def pairs(queries: int, past: int = 0, window: int = 0, full: bool = False) -> int:
  """(query, key) pairs per row of `queries` tokens after `past` ones; `full`: with masked ones."""
  if full:
    return queries * (past + queries)
  seen = range(past + 1, past + queries + 1)
  return sum(min(n, window) for n in seen) if window else queries * past + sum(range(queries + 1))


def attention(cfg: ModelConfig, queries: int, past: int = 0, full: bool = False) -> int:
  """FLOPs per row of all layers: q.k and p.v."""
  kinds = cfg.layer_kinds
  of_kind = {kind: pairs(queries, past, cfg.window_of(kind), full) for kind in set(kinds)}
  return 4 * cfg.num_heads * cfg.head_dim * sum(of_kind[kind] for kind in kinds)


def head(cfg: ModelConfig, tokens: int) -> int:
  """FLOPs of the logits of `tokens` tokens."""
  return 2 * tokens * cfg.vocab_size * cfg.hidden_size


def forward(
    cfg: ModelConfig, rows: int, tokens: int, past: int = 0, logits: int = 0, full: bool = False
) -> int:
  """One pass over `tokens` tokens per row after `past` ones, with `logits` columns of logits."""
  layers = 2 * rows * tokens * layer_params(cfg) + rows * attention(cfg, tokens, past, full)
  return layers + head(cfg, rows * logits)


def train(
    cfg: ModelConfig, rows: int, tokens: int, logits: int, full: bool = False, teachers: int = 0
) -> int:
  """One step of forward and backward, with what is computed again.

  A backward pass costs two forward passes, one for the inputs and one for the weights; under LoRA
  the weights of the base have none. The head is always computed again (see models/logprobs.py),
  the layers with remat=full, but for what nothing needs: the matmul that ends a scanned pattern.
  The heads of `teachers` run forward and again.
  """
  mul = rows * tokens * layer_params(cfg)
  attend = rows * attention(cfg, tokens, 0, full)
  again = {"none": 0, "dots": 0, "full": 1}[cfg.remat]
  trained = 2 * mul if not cfg.lora.rank else 2 * rows * tokens * adapter_params(cfg)
  if again and not cfg.sandwich_norm:
    last = cfg.mlp_size + (cfg.lora.rank if "down" in cfg.lora.targets else 0)
    steps = sum(repeats for _, repeats in cfg.groups)
    trained -= 2 * rows * tokens * steps * last * cfg.hidden_size
  layers = 2 * mul * (2 + again) + trained + attend * (3 + (cfg.remat != "none"))
  return layers + head(cfg, rows * logits) * ((4 if not cfg.lora.rank else 3) + 2 * teachers)


def adapter_params(cfg: ModelConfig) -> int:
  plain = dataclasses.replace(cfg, lora=dataclasses.replace(cfg.lora, rank=0))
  return layer_params(cfg) - layer_params(plain)


def rollout(cfg: ModelConfig, work: RolloutWork) -> int:
  """Prefill of each prompt, decode of all `new` tokens, and scoring."""
  prefill = forward(cfg, work.rows // work.samples, work.prompt)
  fed = work.new - 1
  rows = -(-work.rows // work.decoded) * work.decoded  # What the last ones leave idle computes too.
  decode = forward(cfg, rows, fed, past=work.prompt, logits=fed) + head(cfg, rows)
  scoring = forward(cfg, work.rows, work.prompt + work.new, logits=work.new)
  return prefill + decode + work.scored * scoring
