"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

An adapter is written alone, for PEFT, and read into the weights of its base.

Source of the format: huggingface/peft, `LoraConfig` and the `lora_A`/`lora_B` tensors of
`get_peft_model_state_dict`.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dpr_jax.errors import UserError
from dpr_jax.models import ModelConfig
from dpr_jax.sharding import to_host
from dpr_jax.weights.hf import INDEX, SINGLE, read_json, write_json
from dpr_jax.weights.names import flatten, tensor_specs
from dpr_jax.weights.placement import Source
from dpr_jax.weights.safetensors_file import SafetensorsFile, write_safetensors

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
# Fields of adapter_config.json that are read, and those that change nothing once it is trained.
_READ = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora")
_IRRELEVANT = frozenset("""
    task_type inference_mode revision auto_mapping peft_version target_modules exclude_modules
    lora_dropout layers_pattern layers_to_transform megatron_core qalora_group_size runtime_config
    corda_config eva_config loftq_config ensure_weight_tying
    """.split())
_NEUTRAL = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva")}


class Adapter:
  """What a folder of PEFT adds to the tensors of its base: W + scale B A."""

  def __init__(self, folder: pathlib.Path):
    """Reads adapter_config.json.

    Raises:
      UserError: it is no LoRA adapter, has a field that is not implemented, or no base to be found.
    """
    path = folder / CONFIG
    fields, self._folder, self.where = read_json(path), folder, str(folder)
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
      raise UserError(f"{folder}: holds a model and a PEFT adapter ({CONFIG}); keep one of them")
    if fields.get("peft_type") != "LORA":
      raise UserError(f"{path}: peft_type={fields.get('peft_type')!r} is not implemented; known: "
                      "LORA")
    for name, value in fields.items():
      if name in _READ or name in _IRRELEVANT or value in (None, False, [], {}, ""):
        continue
      if value not in _NEUTRAL.get(name, ()):
        raise UserError(f"{path}: {name}={value!r} is not implemented; merge the adapter with peft")
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float)):
      raise UserError(f"{path}: r={rank!r} and lora_alpha={alpha!r} must be numbers")
    self._rank = rank
    self._scale = alpha / (rank**0.5 if fields.get("use_rslora") else rank)
    base = fields.get("base_model_name_or_path")
    places = [pathlib.Path(base).expanduser(), folder / base] if base else []
    is_model = lambda p: (p / "config.json").is_file() or (p.is_file() and p.suffix == ".gguf")
    self.base = next(filter(is_model, places), None)
    if self.base is not None and (self.base / CONFIG).is_file():
      raise UserError(f"{path}: base_model_name_or_path={base!r} is an adapter itself; merge that "
                      "one into its base with peft")
    if self.base is None:
      raise UserError(f"{path}: base_model_name_or_path={base!r} is no model folder or .gguf file "
                      "on this machine; write the path of the base there")

  def of(self, source: Source, names: Mapping[str, str]) -> Source:
    """The tensors of the base with the adapter merged in.

    Args:
      names: of the tensors, in Hugging Face folders -> in `source`.
    """
    return _Adapted(source, self._factors(source, names), self._scale)

  def _factors(
      self, source: Source, names: Mapping[str, str]
  ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    path = self._folder / ADAPTER
    if not path.is_file():
      raise UserError(f"{path} does not exist; only adapters in safetensors are read")
    file, found = SafetensorsFile(path), {}
    for name, shape in file.shapes.items():
      module, _, factor = name.replace(".default.", ".").rpartition(".lora_")
      target = names.get(module.removeprefix(_PREFIX) + ".weight")
      if factor not in ("A.weight", "B.weight") or target is None:
        raise UserError(f"{path}: tensor {name!r} has no place in the base; merge the adapter with "
                        "peft")
      out, into = source.shapes[target]
      want = (self._rank, into) if factor[0] == "A" else (out, self._rank)
      if shape != want:
        raise UserError(f"{path}: tensor {name!r} has shape {list(shape)}, but the base and r "
                        f"need {list(want)}")
      found.setdefault(target, {})[factor[0]] = file.read(name, 0, shape[0]).astype(np.float32)
    for target, factors in found.items():
      if len(factors) == 1:
        raise UserError(f"{path}: of {target!r} there is only lora_{next(iter(factors))}")
    return {target: (factors["A"], factors["B"]) for target, factors in found.items()}


class _Adapted:
  """A `Source` whose tensors have an adapter merged in, in float32."""

  def __init__(self, source: Source, factors, scale: float):
    self.where, self.shapes, self.dtype = source.where, source.shapes, source.dtype
    self._source, self._factors, self._scale = source, factors, scale

  def read(self, name: str, start: int, stop: int) -> np.ndarray:
    rows = self._source.read(name, start, stop)
    if name not in self._factors:
      return rows
    a_rxI, b_Oxr = self._factors[name]
    return rows.astype(np.float32) + self._scale * (b_Oxr[start:stop] @ a_rxI)


def is_adapter(folder: pathlib.Path) -> bool:
  return (folder / CONFIG).is_file()


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
    prefix = _PREFIX + module
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
