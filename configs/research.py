"""Does DPR help where demonstrations are wrong, or SFT stopped early? On the built-in tasks.

    python -m dpr_jax.main --config=configs/research.py:corrupt=0.2,sft=middle \
        --workdir=runs/research/corrupt_middle --config.seeds=5

Everything is compared with everything on the same prompts: DPR, trained baselines on its budget,
and controls that need no training.
"""

from dpr_jax.config import CONTROLS, default_config, shrink
from dpr_jax.config_args import parse_arg
from dpr_jax.errors import UserError

STEPS = {"early": 300, "middle": 500, "late": 900}  # of SFT; each with its whole schedule.
# Three tasks with one right answer, three with many. The others copy letters of the whole alphabet,
# which a decoder of this size has not learned within those steps.
TASKS = ("sort", "reverse", "count", "shuffle", "word", "range")


def get_config(arg: str = ""):
  """arg: e.g. "corrupt=0.2,sft=middle"; "debug" is the same way in seconds.

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
  config.reference.fraction = 0.1
  config.dpr.steps, config.dpr.batch_size = 100, 64
  config.dpr.max_new_tokens = config.eval.max_new_tokens = 12  # and the longest answer 7.
  config.dpr.beta = 1.0
  config.dpr.optimizer.learning_rate = 7e-4
  config.baseline.names = (
      "continued_sft", "spin", "gsil", "sentence_level", "reward_to_go"
  )
  config.eval.controls = CONTROLS
  config.eval.batch_size = 128
  config.checkpoint.every = 1000  # A stage takes a minute.
  return shrink(config) if args.debug else config
