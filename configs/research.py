"""Does DPR help where demonstrations are wrong, or SFT stopped early? On the built-in tasks.

    python -m dpr_jax.main --config=configs/research.py:corrupt=0.2,sft=middle \
        --workdir=runs/research/corrupt_middle --config.seeds=5

Everything is compared on the same prompts: DPR, other methods on its budget, and baselines that
need no training.
"""

from dpr_jax.config import debug_config, default_config
from dpr_jax.config.files import parse_arg
from dpr_jax.errors import UserError
from dpr_jax.references.midrun import Midrun

STEPS = {"early": 300, "middle": 500, "late": 900}  # of SFT; each with its whole schedule.
# Three tasks with one right answer, three with many. The others copy letters of the whole alphabet,
# which a decoder of this size has not learned within those steps.
TASKS = ("sort", "reverse", "count", "shuffle", "word", "range")


def get_config(arg: str = ""):
  """arg: e.g. "corrupt=0.2,sft=middle"; "debug" is a short run of a tiny model.

  corrupt: share of demonstrations with a wrong answer, 0 (clean) to 0.3 in the study.
  sft: early | middle | late, where SFT stops.
  """
  args = parse_arg("configs/research.py", arg, corrupt=0.0, sft="late", debug=False)
  if args.sft not in STEPS:
    raise UserError(f"configs/research.py: sft={args.sft} is not one of {', '.join(STEPS)}")
  config = default_config()
  config.model.remat = "none"
  shape = config.model.shape
  shape.hidden_size, shape.mlp_size, shape.num_layers = 128, 256, 2
  shape.num_heads = shape.num_kv_heads = 4
  config.data.corrupt, config.data.tasks = args.corrupt, TASKS
  config.data.prompt_length = 24  # The longest prompt of the tasks has 22 tokens,
  config.data.holdout = config.eval.num_prompts = 512
  config.sft.steps, config.sft.milestones = STEPS[args.sft], (0.1, 0.5)
  config.sft.optimizer.learning_rate = 3e-3  # 5e-3 and more learn less at this size.
  config.reference = Midrun(fraction=0.1)
  config.budget.max_new_tokens = config.eval.max_new_tokens = 12  # and the longest answer 7.
  config.budget.optimizer.learning_rate = 7e-4
  config.compare = (
      "low_temperature", "contrastive", "weight_extrapolation", "resampled", "continued_sft",
      "spin", "gsil", "sentence_level", "reward_to_go", "dpr",
  )
  config.eval.batch_size = 128
  config.checkpoint.every = 1000  # A stage takes a minute.
  return debug_config(config) if args.debug else config
