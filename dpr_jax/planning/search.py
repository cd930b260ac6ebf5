"""Which meshes are worth compiling: a coarse estimate of memory and time of every candidate.

The estimate only orders the candidates and drops hopeless ones; what a plan reports comes from the
compiled programs. It counts the tables as gathered like any weight, though less may move
(`models/embedding.py`).
"""

import dataclasses
import math
from collections.abc import Iterator

from dpr_jax.config import RunConfig
from dpr_jax.models import ModelConfig
from dpr_jax.planning import flops, traffic
from dpr_jax.planning.programs import scored_models
from dpr_jax.planning.topologies import Topology
from dpr_jax.rewards.references import reference_members
from dpr_jax.stages.steps import ema_decay

Shape = tuple[int, int, int]  # data, fsdp, tensor.


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Of one mesh, before anything is compiled."""

  shape: Shape
  peak_bytes: float  # a device, of the largest program with what is resident beside it.
  seconds: float  # of one SFT step and one DPR step.


def candidates(config: RunConfig, cfg: ModelConfig, devices: int) -> Iterator[Shape]:
  """Meshes that divide the devices, the heads and the rows of both stages.

  More than one replica (data > 1) is tried only where fsdp is at least 8: below, splitting
  parameters further costs less than copying them.
  """
  dpr = config.dpr
  slots = dpr.slots if 0 < dpr.slots < dpr.batch_size else 0  # gcd(n, 0) is n.
  rows = math.gcd(
      config.sft.batch_size // config.sft.accumulation,
      dpr.batch_size // dpr.accumulation,
      dpr.batch_size // dpr.samples_per_prompt,
      slots,
  )
  for tensor in range(1, devices + 1):
    if devices % tensor or cfg.num_heads % tensor or cfg.mlp_size % tensor:
      continue
    ways = devices // tensor
    if rows % ways:
      continue
    for data in range(1, ways + 1):
      if ways % data == 0 and (data == 1 or ways // data >= 8):
        yield data, ways // data, tensor


def estimate(config: RunConfig, cfg: ModelConfig, topology: Topology, shape: Shape) -> Estimate:
  """Peak memory and time of `shape`, from sizes alone."""
  data, fsdp, tensor = shape
  chip, params = topology.chip, cfg.num_params
  lora = cfg.lora.rank > 0
  split = fsdp * tensor
  trained = flops.adapter_params(cfg) if lora else params
  base = 2 * params / split if lora else 0
  state, moments = 4 * trained / split, 8 * trained / split
  # sft and ref, beside the base that all adapters share under LoRA.
  held = 2 * (1 + len(reference_members(config))) * trained / split
  gathered = 2 * params / tensor

  def logits_bytes(rows: float, columns: int) -> float:
    column = 3 * 4 * rows * cfg.vocab_size / tensor
    chunk = config.model.chunk_size * column or config.model.logits_budget * 2**30
    return min(chunk, columns * column)

  def training(rows: int, accumulation: int, tokens: int, logits: int) -> tuple[float, float]:
    micro = rows / accumulation / (data * fsdp)
    saved = 2 * micro * tokens * cfg.hidden_size * cfg.num_layers
    work = logits_bytes(micro, logits)
    work += 2 * micro * tokens * (4 * cfg.mlp_size + 6 * cfg.num_heads * cfg.head_dim) / tensor
    grads = 4 * trained / split + (2 * params / cfg.num_layers / tensor)
    memory = base + state + moments + saved + work + grads
    seconds = flops.train(cfg, rows, tokens, logits) / topology.size / chip.flops
    passes = 2 if lora else 3
    moved = passes * accumulation * gathered * (fsdp - 1) / fsdp
    moved += 0 if lora else 2 * 2 * params / split * (data > 1)
    ways = 2 * (tensor - 1) / tensor
    reduced = 6 if cfg.remat == "full" else 4
    moved += reduced * cfg.num_layers * accumulation * micro * tokens * cfg.hidden_size * 2 * ways
    return memory, max(seconds, moved / chip.ici_bandwidth)

  sft, dpr, prompt = config.sft, config.dpr, config.data.prompt_length
  new, length = dpr.max_new_tokens, prompt + dpr.max_new_tokens
  sft_memory, sft_seconds = training(
      sft.batch_size, sft.accumulation, config.data.row_length, config.data.row_length
  )
  sft_memory += state if ema_decay(config) else 0
  update_memory, update_seconds = training(dpr.batch_size, dpr.accumulation, length, new)
  rows, scored = dpr.batch_size / (data * fsdp), scored_models(config)
  decoded = min(dpr.slots or dpr.batch_size, dpr.batch_size) / (data * fsdp)
  steps = flops.decode_steps(dpr.batch_size, new, dpr.slots)
  prompts = rows / dpr.samples_per_prompt
  cache = traffic.cache_bytes(cfg, tensor, decoded, length)
  if decoded < rows:  # The prompts that wait have a cache of their own.
    cache += traffic.cache_bytes(cfg, tensor, prompts, prompt)
  memory = base + state + moments + held + gathered + cache
  memory += logits_bytes(rows, new)
  # Weights once for decoding, and once for each model that scores.
  moved = ((1 + scored) * (fsdp - 1) / fsdp) * gathered
  tokens = prompts * prompt + decoded * steps + scored * rows * length
  moved += (3 * cfg.num_layers * 2 * (tensor - 1) / tensor) * (2 * cfg.hidden_size * tokens)
  seconds = max(
      flops.rollout(
          cfg, dpr.batch_size, prompt, new, dpr.samples_per_prompt, dpr.slots, scored
      ) / topology.size / chip.flops,
      traffic.rollout(cfg, tensor, decoded, prompt, new, steps, scored) / chip.hbm_bandwidth
      + moved / chip.ici_bandwidth,
  )
  return Estimate(
      shape,
      max(sft_memory, update_memory + held, memory),
      sft_seconds + update_seconds + seconds,
  )


def ranked(config: RunConfig, cfg: ModelConfig, topology: Topology) -> list[Estimate]:
  """All candidates, the fastest of those that seem to fit first, then the smallest of the rest."""
  room = topology.chip.hbm_bytes
  all_ = [
      estimate(config, cfg, topology, shape) for shape in candidates(config, cfg, topology.size)
  ]
  key = lambda e: (e.peak_bytes > room, e.seconds if e.peak_bytes <= room else e.peak_bytes)
  return sorted(all_, key=key)
