"""A checkpoint as a Hugging Face folder, for transformers and every other reader of it.

    python -m dpr_jax.export --model=CKPT --output=HF_DIR [--dtype=bfloat16] [--adapter]

A LoRA stage is merged into its base; --adapter writes the adapter alone, in PEFT's format.
"""

from collections.abc import Sequence

from absl import flags

from dpr_jax import cli
from dpr_jax.cli import models as models_cli
from dpr_jax.errors import UserError


def define(values: flags.FlagValues) -> None:
  flags.DEFINE_string("model", None, "CKPT.", flag_values=values)
  flags.DEFINE_string("output", None, "Folder to write; must not exist or be empty.",
                      flag_values=values)
  flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the weights.",
                    flag_values=values)
  flags.DEFINE_bool("adapter", False, "Of a LoRA stage: only the adapter, for PEFT.",
                    flag_values=values)


@cli.readable
def main(argv: Sequence[str]) -> None:
  args = cli.parse_flags(
      argv, entry_point="dpr_jax.export", doc=__doc__, define=define,
      required={"model": "runs/smoke/dpr", "output": "HF_DIR"},
  )
  output = models_cli.new_folder("--output", args.output)
  import dataclasses

  import jax

  from dpr_jax import sharding, weights
  from dpr_jax.loading import load_checkpoint
  from dpr_jax.models.lora import LoRA, merge
  from dpr_jax.paths import Mirror
  from dpr_jax.weights.peft import save_adapter

  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    # In float32 also where bfloat16 is stored: an adapter is merged before anything is rounded.
    loaded = load_checkpoint(args.model, mesh, "float32")
    cfg = loaded.model.cfg
    if args.adapter and loaded.keep_layers:
      raise UserError(f"--adapter: {args.model} adapts {loaded.keep_layers} of the layers of "
                      f"{loaded.base}, which PEFT would load whole; export without --adapter")
    with Mirror(output) as folder:
      if args.adapter:
        save_adapter(folder, cfg, loaded.variables.get("lora"), base=loaded.base)
        return
      weights.save_pretrained(
          folder,
          dataclasses.replace(cfg, lora=LoRA()),
          merge(loaded.variables, cfg.lora)["params"],
          tokenizer=loaded.tokenizer,
          generation_config={**loaded.generation_config, "eos_token_id": list(loaded.stop_ids)},
          dtype=args.dtype,
      )


if __name__ == "__main__":
  cli.run_entry_point(main, kept="nothing was written")
