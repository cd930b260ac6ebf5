"""Qwen2.5 7B.

python -m dpr_jax.main --config=configs/qwen25_7b.py --workdir=DIR \
    --config.model.pretrained=FOLDER --config.data.demos=FILE
"""

from model_shapes import QWEN25_7B, debugged, large


def get_config(arg: str = ""):
  """arg: "" or "debug", a short run of a tiny random model on the built-in tasks."""
  config = large("weights/Qwen2.5-7B", QWEN25_7B)
  return debugged(config, arg, "configs/qwen25_7b.py")
