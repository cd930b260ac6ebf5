"""Converts between config.json and `ModelConfig`.

Reading raises an error that names every field that may change the function of the weights and
that the decoder does not implement; only fields that `families.py` lists as irrelevant are
ignored. Writing reads its output back, so that a config that no family can represent is not
exported by mistake.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dpr_jax.errors import UserError
from dpr_jax.models.config import COMPUTATION, GLOBAL, LOCAL, ModelConfig, Rope, pattern_of
from dpr_jax.weights import families
from dpr_jax.weights.families import FAMILIES, Family, Fields

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
KINDS = {"full_attention": GLOBAL, "sliding_attention": LOCAL}
# rope_type -> its parameters, each with its field of `Rope`.
ROPE_FIELDS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_length",
    },
}
# Sizes in config.json -> fields of ModelConfig.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "mlp_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_length",
}
MAX_LAYERS = 10_000  # A larger number is damage, and its list of layers would exhaust the memory.


def _number(fields: Fields, name: str, where: str, kind: type = int, low: float = 0) -> Any:
  value = fields.get(name)
  wanted = "a positive whole number" if kind is int else "a number greater than 0"
  if value is None:
    raise UserError(f"{where}: {name} is missing; it must be {wanted}")
  good = isinstance(value, int | float) and not isinstance(value, bool) and low < value < 1e18
  if not good or (kind is int and value != int(value)):
    raise UserError(f"{where}: {name}={repr(value)[:50]} must be {wanted}")
  return kind(value)


def _flag(fields: Fields, name: str, where: str) -> bool:
  if not isinstance(fields[name], bool):
    raise UserError(f"{where}: {name}={fields[name]!r} must be true or false")
  return fields[name]


def _rope(params: Fields, theta: float, max_length: int, where: str) -> Rope:
  """Reads a Rope from a `rope_parameters` (or `rope_scaling`) object."""
  params = {"rope_theta": theta, "original_max_position_embeddings": max_length, **params}
  kind = params.get("rope_type", params.get("type", "default"))
  if kind not in ROPE_FIELDS:
    raise UserError(f"{where}: rope scaling rope_type={kind!r} is not implemented; known: "
                    f"{', '.join(ROPE_FIELDS)}")
  common = {"rope_theta", "rope_type", "type", "original_max_position_embeddings"}
  for name, value in params.items():
    unused = name == "partial_rotary_factor" and value in (None, 1)
    if name not in common and name not in ROPE_FIELDS[kind] and not unused:
      raise UserError(f"{where}: rope scaling {name}={value!r} is not implemented for "
                      f"rope_type={kind!r}")
  rope = Rope(_number(params, "rope_theta", where, float), "none" if kind == "default" else kind)
  for name, ours in ROPE_FIELDS[kind].items():
    value = _number(params, name, where, type(getattr(rope, ours)))
    rope = dataclasses.replace(rope, **{ours: value})
  if rope.high_freq_factor <= rope.low_freq_factor:
    raise UserError(f"{where}: rope scaling high_freq_factor={rope.high_freq_factor} must exceed "
                    f"low_freq_factor={rope.low_freq_factor}")
  return rope


def _ropes(family: Family, f: Fields, max_length: int, where: str) -> tuple[Rope, Rope | None]:
  """Returns (rope of global layers, rope of local layers or None if they share it).

  Reads `rope_parameters` of transformers 5 and the older `rope_theta`, `rope_scaling` and
  `rope_local_base_freq`. If a file has both, `rope_scaling` takes precedence, as in transformers.
  """
  for name in ("rope_parameters", "rope_scaling"):
    if not isinstance(f.get(name) or {}, Mapping):
      raise UserError(f"{where}: {name}={f[name]!r} must be an object or null")
  theta, scaling = f["rope_theta"], f.get("rope_scaling") or {}
  params = f.get("rope_parameters") or {}
  if family.local_theta is None:
    return _rope(scaling or params, theta, max_length, where), None
  for name in params:
    if name not in KINDS:
      raise UserError(f"{where}: rope_parameters has {name!r}; known: {', '.join(KINDS)}")
  full, sliding = params.get("full_attention") or {}, params.get("sliding_attention") or {}
  return (
      _rope({**full, **scaling}, theta, max_length, where),
      _rope(sliding, f[family.local_theta], max_length, where),
  )


def _refuse_unknown(family: Family, fields: Fields, where: str) -> None:
  known = families.IRRELEVANT | families.COMMON | {family.activation, *family.defaults}
  for name, value in fields.items():
    if name in known:
      continue
    if name not in families.NEUTRAL:
      if value is None or (value is False and name not in families.PARTS):
        continue  # A feature that is off.
      raise UserError(f"{where}: {name}={value!r} is not a known field of "
                      f"model_type={family.model_type!r} and could change what the model computes; "
                      "remove it if it is irrelevant")
    if value is not None and value not in families.NEUTRAL[name]:
      neutral = " or ".join([*(repr(v) for v in families.NEUTRAL[name]), "null"])
      raise UserError(f"{where}: {name}={value!r} is not implemented; it must be {neutral}")


def from_hf(fields: Fields, where: str = "config.json") -> ModelConfig:
  """Converts the fields of a config.json to a ModelConfig.

  Args:
    fields: the parsed file; of a multimodal config, only `text_config` is used.
    where: name of the file in error messages.

  Raises:
    UserError: the `model_type` is unknown, or a field is not implemented or has a bad value.
  """
  outer = fields.get("model_type")
  for family in FAMILIES.values():
    if outer is not None and family.multimodal == outer:
      fields, where = _text_config(fields, family, where), f"{where} text_config"
  family = families.family_named(fields.get("model_type"), where)
  _refuse_unknown(family, fields, where)
  f = {**families.LLAMA_DEFAULTS, **family.defaults}
  # null means the default, except for a window, where it means no window.
  f |= {k: v for k, v in fields.items() if v is not None or k == "sliding_window"}

  def size(name: str) -> int:
    return _number(f, name, where)

  heads, hidden = size("num_attention_heads"), size("hidden_size")
  layers = f["num_hidden_layers"] = size("num_hidden_layers")
  if layers > MAX_LAYERS:
    raise UserError(f"{where}: num_hidden_layers={layers} must be at most {MAX_LAYERS}")
  f.setdefault("num_key_value_heads", heads)
  if "head_dim" not in f:
    if hidden % heads:
      raise UserError(f"{where}: hidden_size={hidden} is not a multiple of "
                      f"num_attention_heads={heads}")
    f["head_dim"] = hidden // heads
  if size("head_dim") % 2:
    raise UserError(f"{where}: head_dim={f['head_dim']} must be even")
  activation = f.get(family.activation, "silu")
  if activation not in ACTIVATIONS:
    raise UserError(f"{where}: {family.activation}={activation!r} is not implemented; known: "
                    f"{', '.join(ACTIVATIONS)}")
  for name in ("sliding_window", "sliding_window_pattern", "_sliding_window_pattern"):
    if f.get(name) is not None:
      f[name] = size(name)
  window = f.get("sliding_window") or 0
  if "use_sliding_window" in f:
    window *= _flag(f, "use_sliding_window", where)
    _number(f, "max_window_layers", where, low=-1)
  kinds = _layer_kinds(family, f, window, where)
  rope, local_rope = _ropes(family, f, size("max_position_embeddings"), where)
  scalar = family.query_scalar and _number(f, family.query_scalar, where, float)
  shape = {
      **{ours: size(name) for name, ours in SIZES.items()},
      "activation": ACTIVATIONS[activation],
      "norm_eps": _number(f, "rms_norm_eps", where, float),
      "tied_head": _flag(f, "tie_word_embeddings", where),
      "query_scale": 0.0 if scalar in (None, f["head_dim"]) else scalar**-0.5,
      "layer_pattern": pattern_of(kinds),
      "window": window if LOCAL in kinds else 0,
      "rope": rope,
      "local_rope": local_rope if LOCAL in kinds else None,
  }
  try:
    return ModelConfig(**shape, **family.fixed(hidden))
  except ValueError as error:
    raise UserError(f"{where}: {error}") from None


def _text_config(fields: Fields, family: Family, where: str) -> Fields:
  """Returns the part of a multimodal config that describes its text model."""
  text = fields.get("text_config")
  if not isinstance(text, Mapping):
    raise UserError(f"{where}: text_config must be an object in a config of "
                    f"model_type={family.multimodal!r}")
  for name in ("quantization_config", "auto_map"):
    if fields.get(name) is not None:
      raise UserError(f"{where}: {name}={fields[name]!r} is not implemented; it must be null")
  tied = fields.get("tie_word_embeddings")
  return {"model_type": family.model_type, "tie_word_embeddings": tied, **text}


def _layer_kinds(family: Family, f: Fields, window: int, where: str) -> list[str]:
  layers, given = f["num_hidden_layers"], f.get("layer_types")
  kinds = [LOCAL if family.is_local(f, i) else GLOBAL for i in range(layers)]
  if given is None:
    return kinds
  if not isinstance(given, list) or len(given) != layers:
    raise UserError(f"{where}: layer_types must be a list of num_hidden_layers={layers} entries")
  for kind in given:
    if kind not in KINDS:
      raise UserError(f"{where}: layer_types has {kind!r}, which is not implemented; known: "
                      f"{', '.join(KINDS)}")
  if not family.mixes_layers and [KINDS[t] for t in given] != kinds:
    raise UserError(f"{where}: layer_types={given!r} is not implemented for "
                    f"model_type={family.model_type!r}")
  if "sliding_attention" in given and not window:
    raise UserError(f"{where}: layer_types has 'sliding_attention' but no sliding_window is in use")
  return [KINDS[t] for t in given]


def canonical(cfg: ModelConfig) -> ModelConfig:
  """Returns the same function, with the fields that do not affect it at fixed values."""
  pattern = pattern_of(cfg.layer_kinds)
  local = LOCAL in pattern
  same_rope = cfg.local_rope is None or cfg.local_rope == cfg.rope
  default_scale = math.isclose(cfg.query_scale or cfg.head_dim**-0.5, cfg.head_dim**-0.5)
  defaults = {f.name: f.default for f in dataclasses.fields(cfg)}
  return dataclasses.replace(
      cfg,
      layer_pattern=pattern,
      window=cfg.window if local else 0,
      local_rope=None if same_rope or not local else cfg.local_rope,
      query_scale=0.0 if default_scale else cfg.query_scale,
      **{name: defaults[name] for name in COMPUTATION},
  )


def family_of(cfg: ModelConfig) -> Family:
  """Returns the first family that matches `cfg`, else the closest one, which `to_hf` refuses."""
  cfg = canonical(cfg)
  return min(FAMILIES.values(), key=lambda family: family.differences(cfg))


def rope_to_hf(rope: Rope) -> dict[str, Any]:
  """Converts a Rope to a `rope_parameters` object."""
  kind = "default" if rope.scaling == "none" else rope.scaling
  parameters = {name: getattr(rope, ours) for name, ours in ROPE_FIELDS[kind].items()}
  return {"rope_type": kind, "rope_theta": rope.theta, **parameters}


def to_hf(cfg: ModelConfig, family: Family | None = None) -> dict[str, Any]:
  """Converts a ModelConfig to the fields of a config.json for transformers 4 and 5.

  Raises:
    UserError: no family, or not the given one, matches `cfg`.
  """
  family, wanted = family or family_of(cfg), canonical(cfg)
  types = [next(t for t, kind in KINDS.items() if kind == k) for k in wanted.layer_kinds]
  activation = next(name for name, ours in ACTIVATIONS.items() if ours == cfg.activation)
  rope, parameters = rope_to_hf(cfg.rope), rope_to_hf(cfg.rope)
  theta = rope.pop("rope_theta")
  if family.local_theta is not None:
    local = rope_to_hf(families.local_rope(wanted))
    parameters = {"full_attention": parameters, "sliding_attention": local}
  fields = {
      "architectures": [family.architecture],
      "model_type": family.model_type,
      **{name: getattr(cfg, ours) for name, ours in SIZES.items()},
      family.activation: activation,
      "rms_norm_eps": cfg.norm_eps,
      "tie_word_embeddings": cfg.tied_head,
      "attention_dropout": 0.0,
      "use_cache": True,
      "rope_theta": theta,
      "rope_scaling": None if cfg.rope.scaling == "none" else rope,
      "rope_parameters": parameters,
      **family.constants,
      **family.write(wanted, types),
  }
  _check_same(wanted, canonical(from_hf(fields)), family)
  return fields


def _check_same(wanted: ModelConfig, got: ModelConfig, family: Family) -> None:
  for field in dataclasses.fields(ModelConfig):
    a, b = getattr(wanted, field.name), getattr(got, field.name)
    if a != b and not (isinstance(a, float) and math.isclose(a, b, rel_tol=1e-9)):
      raise UserError(f"this model cannot be exported as family {family.model_type!r}: "
                      f"{field.name}={a!r}, but the family has {b!r}")
