"""A checkpoint as a Hugging Face folder, for transformers and every other reader of it.

    python -m dpr_jax.export --model=CKPT --output=HF_DIR [--dtype=bfloat16]
"""

import argparse
from collections.abc import Sequence

from dpr_jax import cli


def parser() -> argparse.ArgumentParser:
  out = argparse.ArgumentParser("dpr_jax.export", description=__doc__.splitlines()[0])
  out.add_argument("--model", required=True, help="CKPT")
  out.add_argument("--output", required=True, help="folder to write; must not exist or be empty")
  out.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  return out


def main(argv: Sequence[str]) -> None:
  args = parser().parse_args(argv)
  output = cli.new_folder("--output", args.output)
  import jax

  from dpr_jax import sharding, weights
  from dpr_jax.loading import load_checkpoint

  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    loaded = load_checkpoint(args.model, mesh, args.dtype)
    weights.save_pretrained(
        output,
        loaded.model.cfg,
        loaded.variables["params"],
        tokenizer=loaded.tokenizer,
        generation_config={"eos_token_id": list(loaded.stop_ids)},
        dtype=args.dtype,
    )


if __name__ == "__main__":
  cli.run_door(main)
