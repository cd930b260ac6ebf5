"""What work costs: all that a plan counts for each kind of `Program.work`.

FLOPs and bytes are lower bounds by formula (`flops`, `bytes_moved`). `estimate` is coarse: it
orders meshes before anything is compiled. It counts the embedding and the head as gathered like any
weight, though less may move.
"""

from dpr_jax.methods.programs import RolloutWork, TrainWork
from dpr_jax.models import ModelConfig
from dpr_jax.planning import bytes_moved, flops
from dpr_jax.planning.topologies import Topology

Work = TrainWork | RolloutWork
Shape = tuple[int, int, int]  # data, fsdp, tensor.


def total_flops(work: Work, cfg: ModelConfig) -> int:
  """Of all devices together."""
  if isinstance(work, TrainWork):
    return flops.train(cfg, work.rows, work.tokens, work.logits, teachers=work.teachers)
  return flops.rollout(cfg, work)


def hbm_bytes(work: Work, cfg: ModelConfig, shape: Shape, state_bytes: float) -> float:
  """Of one device.

  Args:
    state_bytes: arguments and results of the program.
  """
  data, fsdp, tensor = shape
  if isinstance(work, TrainWork):
    return bytes_moved.train(cfg, tensor, work.rows / (data * fsdp), work, state_bytes)
  return bytes_moved.rollout(cfg, tensor, work.decoded / (data * fsdp), work)


def loop_trips(work: Work) -> int:
  """How often a loop runs that may end early, if no response does; 1 where there is none."""
  return 1 if isinstance(work, TrainWork) else work.steps


def minimum_received(work: Work, cfg: ModelConfig, shape: Shape) -> dict[str, float] | None:
  """`bytes_moved.minimum_received`, where the formula holds."""
  data, fsdp, tensor = shape
  if isinstance(work, RolloutWork) or work.teachers or cfg.lora.rank or data > 1 or tensor > 1:
    return None
  rows = work.rows / (work.accumulation * fsdp)
  return bytes_moved.minimum_received(
      cfg, fsdp, work.accumulation, rows * work.tokens, rows * work.logits
  )


def estimate(
    work: Work, cfg: ModelConfig, topology: Topology, shape: Shape
) -> tuple[float, float]:
  """(peak memory of a device in bytes, what is resident included; seconds), from sizes alone."""
  split = shape[1] * shape[2]
  params, lora = cfg.num_params, cfg.lora.rank > 0
  trained = flops.adapter_params(cfg) if lora else params
  resident = 2 * params / split if lora else 0  # The base that all adapters share.
  # In float32 the variables and two moments; in the compute dtype the other models.
  resident += (12 + 2 * work.held) * trained / split
  model = _estimate_training if isinstance(work, TrainWork) else _estimate_rollout
  memory, seconds = model(work, cfg, topology, shape, trained / split)
  return resident + memory, seconds


def _estimate_training(work, cfg, topology, shape, trained):
  (data, fsdp, tensor), chip = shape, topology.chip
  gathered = bytes_moved.weights(cfg, tensor)
  micro = work.rows / work.accumulation / (data * fsdp)
  memory = 2 * micro * work.tokens * cfg.hidden_size * cfg.num_layers  # Inputs of the layers.
  memory += _logits_bytes(cfg, tensor, micro, work.logits, 1 + work.teachers)
  states = work.teachers * work.rows / (data * fsdp) * work.logits
  memory += 2 * states * cfg.hidden_size
  memory += 2 * micro * work.tokens * (4 * cfg.mlp_size + 6 * cfg.num_heads * cfg.head_dim) / tensor
  memory += 4 * trained + gathered / cfg.num_layers  # Gradients, and a layer.
  memory += 4 * trained * work.ema
  lora = cfg.lora.rank > 0
  moved = (2 if lora else 3) * work.accumulation * gathered * (fsdp - 1) / fsdp
  moved += 0 if lora else 2 * gathered / fsdp * (data > 1)
  reduced = (6 if cfg.remat == "full" else 4) * cfg.num_layers * 2 * (tensor - 1) / tensor
  moved += reduced * work.accumulation * micro * work.tokens * cfg.hidden_size * 2
  seconds = total_flops(work, cfg) / topology.size / chip.flops
  return memory, max(seconds, moved / chip.ici_bandwidth)


def _estimate_rollout(work, cfg, topology, shape, trained):
  (data, fsdp, tensor), chip = shape, topology.chip
  gathered, length = bytes_moved.weights(cfg, tensor), work.prompt + work.new
  rows, decoded = work.rows / (data * fsdp), work.decoded / (data * fsdp)
  prompts = rows / work.samples
  memory = gathered + bytes_moved.cache_bytes(cfg, tensor, decoded, length)
  if decoded < rows:  # The prompts that wait have a cache of their own.
    memory += bytes_moved.cache_bytes(cfg, tensor, prompts, work.prompt)
  memory += _logits_bytes(cfg, tensor, rows, work.new, work.logits_models)
  memory += 2 * work.kept_states * rows * work.new * cfg.hidden_size
  # Weights once for decoding, and once for each model that scores.
  moved = ((1 + work.scored) * (fsdp - 1) / fsdp) * gathered
  tokens = prompts * work.prompt + decoded * work.steps + work.scored * rows * length
  moved += (3 * cfg.num_layers * 2 * (tensor - 1) / tensor) * (2 * cfg.hidden_size * tokens)
  seconds = total_flops(work, cfg) / topology.size / chip.flops
  hbm = hbm_bytes(work, cfg, shape, 0.0) / chip.hbm_bandwidth
  return memory, max(seconds, hbm + moved / chip.ici_bandwidth)


def _logits_bytes(
    cfg: ModelConfig, tensor: int, rows: float, columns: int, models: int = 1
) -> float:
  """Logits that live at a time: a chunk of columns of so many models, or all of them."""
  whole = models * columns * 3 * 4 * rows * cfg.vocab_size / tensor
  return min(cfg.logits_budget * 2**30, whole)
