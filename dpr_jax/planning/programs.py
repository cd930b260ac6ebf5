"""The programs of a run, from shapes alone: SFT's, and those of the methods that it compares.

They are the very functions that train. No weights, no data and no tokenizer are needed: the model's
shape comes from config.model.shape.
"""


import jax

from dpr_jax.config import RunConfig
from dpr_jax.errors import UserError
from dpr_jax.methods.programs import Program, RolloutWork, Shapes, TrainWork
from dpr_jax.methods.sft import sft_programs
from dpr_jax.models import ModelConfig, Transformer
from dpr_jax.run import check_lengths, check_mesh, computed
from dpr_jax.sharding import MESH_AXES


def planned_model(config: RunConfig) -> ModelConfig:
  """The shape of the config's model, computed as on an accelerator.

  Raises:
    UserError: the config has no shape, or asks for longer rows than the model takes.
  """
  section = config.model
  if not section.shape.vocab_size:
    raise UserError("config.model.shape.vocab_size=0 is that of the byte-level tokenizer; a plan "
                    "needs the number, for example --config.model.shape.vocab_size=272")
  dtype = "bfloat16" if section.dtype == "auto" else section.dtype
  cfg = computed(section, section.shape, dtype)
  check_lengths(config, cfg.max_length)
  return cfg


def make_programs(config: RunConfig, cfg: ModelConfig, mesh: jax.sharding.Mesh) -> list[Program]:
  """The programs of `config` on `mesh`, whose devices may exist only for the compiler.

  Call it while no such mesh is set: it makes a key, which would be computed there.

  Raises:
    UserError: a batch that the mesh does not divide; names the field.
  """
  check_mesh(config, mesh)
  shapes = Shapes(config, Transformer(cfg), mesh)
  return [
      *sft_programs(shapes),
      *(p for name, m in config.compared().items() for p in m.programs(shapes, name)),
  ]


def planned_works(config: RunConfig, cfg: ModelConfig) -> list[TrainWork | RolloutWork]:
  """The work of each program, which is the same on every mesh."""
  mesh = jax.sharding.AbstractMesh((1, 1, 1), MESH_AXES)
  return [program.work for program in make_programs(config, cfg, mesh)]
