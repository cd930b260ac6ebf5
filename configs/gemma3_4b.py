"""Gemma 3 4B, text only.

python -m dpr_jax.main --config=configs/gemma3_4b.py --workdir=DIR \
    --config.model.pretrained=FOLDER --config.data.demos=FILE
"""

from model_shapes import GEMMA3_4B, debugged, large


def get_config(arg: str = ""):
  """arg: "" or "debug", a short run of a tiny random model on the built-in tasks."""
  config = large("weights/gemma-3-4b-pt", GEMMA3_4B)
  return debugged(config, arg, "configs/gemma3_4b.py")
