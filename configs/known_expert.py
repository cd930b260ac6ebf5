"""Demonstrations sampled from a model at hand: how close does a smaller student come to it?

The expert is SmolLM2-135M-Instruct, the student six of its thirty layers. No judge is needed: the
report has KL to the expert in both directions, and the expert's likelihood of every system.

    python -m dpr_jax.generate --model=PATH --input=PROMPTS --output=demos.jsonl \
        --max_new_tokens=16 --seed=0 --batch_size=64
    python -m dpr_jax.main --config=configs/known_expert.py --workdir=runs/known_expert \
        --config.model.pretrained=PATH --config.eval.expert=PATH --config.data.demos=demos.jsonl \
        --config.seeds=3

PATH as in configs/smollm2_135m.py; PROMPTS are lines {"prompt": str}. The budgets of tokens here
and in the first command are the same, so that a demonstration is cut off where a rollout would be.
"""

from model_shapes import debugged

from dpr_jax.config.files import other_config
from dpr_jax.references.midrun import Midrun


def get_config(arg: str = ""):
  """arg: "" or "debug", a short run of a tiny random model on the built-in tasks.

  Under debug there is no expert, unless one is given: a stage of another debug run will do.
  """
  config = other_config(__file__, "smollm2_135m.py")
  config.model.keep_layers = 6
  config.eval.expert = config.model.pretrained

  config.data.demos = "demos.jsonl"
  config.data.row_length, config.data.prompt_length = 64, 48
  config.data.overlong = config.data.overlong_prompt = "drop"
  config.data.on_empty = "drop"  # The expert may end at once.
  config.data.holdout = config.eval.num_prompts = 64

  # What one CPU core does for a seed in about twenty minutes, evaluation included.
  config.sft.steps, config.sft.batch_size, config.sft.milestones = 60, 16, (0.1, 0.5)
  config.sft.optimizer.learning_rate, config.sft.optimizer.warmup_steps = 3e-4, 5
  config.reference, config.eval.reference_prompts = Midrun(fraction=0.1), 16

  config.budget.steps, config.budget.batch_size = 12, 16
  config.budget.max_new_tokens = config.eval.max_new_tokens = 16
  config.budget.optimizer.learning_rate, config.budget.optimizer.warmup_steps = 2e-4, 2
  config.compare = (
      "low_temperature", "contrastive", "weight_extrapolation", "resampled", "continued_sft",
      "spin", "gsil", "sentence_level", "reward_to_go", "dpr",
  )
  config.methods.resampled.candidates = 4
  config.eval.batch_size, config.eval.corrupted_tokens, config.eval.heatmaps = 32, 64, 2
  config.checkpoint.every = 200
  return debugged(config, arg, "configs/known_expert.py")
