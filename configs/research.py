"""Does DPR help where demonstrations are wrong, or SFT stopped early? On the built-in tasks.

    python -m dpr_jax.main --config=configs/research.py:corrupt=0.2,sft=middle \
        --workdir=runs/research/corrupt_middle --config.seeds=5

Everything is compared on the same prompts: DPR, other methods on its budget, and baselines that
need no training.
"""

from dpr_jax.config import debug_config, default_config
from dpr_jax.config.files import parse_arg
from dpr_jax.data.long_tasks import LONG_TASKS
from dpr_jax.errors import UserError
from dpr_jax.evaluation.metrics import MinorityStyle
from dpr_jax.references.midrun import Midrun

# Three tasks with one right answer, three with many. The others copy letters of the whole alphabet,
# which a decoder of this size has not learned within those steps.
TASKS = {
    "short": ("sort", "reverse", "count", "shuffle", "word", "range"),
    "long": tuple(task.name for task in LONG_TASKS),
}
STEPS = {  # of SFT; each with its whole schedule.
    "short": {"early": 300, "middle": 500, "late": 900},
    "long": {"early": 600, "middle": 1000, "late": 1800},
}


def get_config(arg: str = ""):
  """arg: e.g. "corrupt=0.2,sft=middle"; "debug" is a short run of a tiny model.

  corrupt: share of demonstrations with a wrong answer, 0 (clean) to 0.3 in the study.
  sft: early | middle | late, where SFT stops.
  tasks: short | long, the answers.
  kind: how they are wrong, config.data.corruption.
  minority: share of demonstrations with a right answer in a rare style.
  """
  args = parse_arg(
      "configs/research.py", arg, corrupt=0.0, sft="late", tasks="short", kind="answer",
      minority=0.0, debug=False,
  )
  for name, known in (("tasks", TASKS), ("sft", STEPS["short"])):
    if args[name] not in known:
      raise UserError(f"configs/research.py: {name}={args[name]} is not one of {', '.join(known)}")
  config = default_config()
  config.model.remat = "none"
  shape = config.model.shape
  shape.hidden_size, shape.mlp_size, shape.num_layers = 128, 256, 2
  shape.num_heads = shape.num_kv_heads = 4
  config.data.corrupt, config.data.corruption = args.corrupt, args.kind
  config.data.minority, config.data.tasks = args.minority, TASKS[args.tasks]
  if args.minority:
    config.eval.metrics.minority_style = MinorityStyle()
  config.data.prompt_length = 24  # The longest prompt of the tasks has 22 tokens,
  config.data.holdout = config.eval.num_prompts = 512
  config.sft.steps, config.sft.milestones = STEPS[args.tasks][args.sft], (0.1, 0.5)
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
  if args.tasks == "long":
    # Smaller steps, more of them, and a longer memory of the second moment: copying is learned
    # late, and all else depends on it.
    config.sft.batch_size = 16
    config.sft.optimizer.b2, config.sft.optimizer.warmup_steps = 0.99, 100
  if args.debug:
    debug_config(config)
  if args.tasks == "long":
    config.data.prompt_length, config.data.row_length = 44, 128  # A prompt has 43 at most,
    config.budget.max_new_tokens = config.eval.max_new_tokens = 64  # and an answer 60.
  return config
