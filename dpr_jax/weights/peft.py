"""Writes LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

Source of the format: huggingface/peft, `LoraConfig` and the `lora_A`/`lora_B` tensors of
`get_peft_model_state_dict`.
"""

import os
import pathlib
from typing import Any

import jax
import numpy as np

from dpr_jax.errors import UserError
from dpr_jax.models import ModelConfig
from dpr_jax.sharding import to_host
from dpr_jax.weights.hf import write_json
from dpr_jax.weights.names import flatten, tensor_specs
from dpr_jax.weights.safetensors_file import write_safetensors

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(directory: str | os.PathLike, cfg: ModelConfig, lora: Any, base: str = "") -> None:
  """Writes the adapter alone, for `peft.PeftModel.from_pretrained(base_model, directory)`.

  In a multi-process run all processes must call this function; process 0 writes.

  Args:
    lora: the "lora" collection of `Transformer(cfg)`.
    base: name or path of the base model, recorded in adapter_config.json.

  Raises:
    UserError: `cfg` has no adapter.
  """
  if not cfg.lora.rank:
    raise UserError("this model has no adapter (cfg.lora.rank is 0); export the whole model")
  folder = pathlib.Path(directory).expanduser()
  leaves, tensors, modules = flatten(lora), {}, set()
  for spec in tensor_specs(cfg):
    factors = [leaves.get((*spec.path[:-1], k)) for k in ("a", "b")]
    if not spec.is_kernel or factors[0] is None:
      continue
    module = spec.name.removesuffix(".weight")
    modules.add(module.rpartition(".")[2])
    rank = cfg.lora.rank
    a, b = (to_host(x[spec.repeat]).astype(np.float32) for x in factors)
    # PEFT computes B A x and stores both factors as [out, in].
    prefix = f"base_model.model.{module}"
    tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, rank).T)
    tensors[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(b.reshape(rank, -1).T)
  writer = jax.process_index() == 0
  if writer:
    folder.mkdir(parents=True, exist_ok=True)
  entries = {name: (x.dtype, x.shape) for name, x in tensors.items()}
  write_safetensors(folder / ADAPTER, entries, tensors.__getitem__, write=writer)
  if not writer:
    return
  write_json(folder / CONFIG, {
      "peft_type": "LORA",
      "task_type": "CAUSAL_LM",
      "base_model_name_or_path": base,
      "r": cfg.lora.rank,
      "lora_alpha": cfg.lora.alpha,
      "lora_dropout": cfg.lora.dropout,
      "target_modules": sorted(modules),
      "bias": "none",
      "fan_in_fan_out": False,
      "inference_mode": True,
  })
