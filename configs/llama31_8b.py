"""Llama 3.1 8B.

python -m dpr_jax.main --config=configs/llama31_8b.py --workdir=DIR \
    --config.model.pretrained=FOLDER --config.data.demos=FILE
"""

from model_shapes import LLAMA31_8B, debugged, large


def get_config(arg: str = ""):
  """arg: "" or "debug", a short run of a tiny random model on the built-in tasks."""
  config = large("weights/Llama-3.1-8B", LLAMA31_8B)
  return debugged(config, arg, "configs/llama31_8b.py")
