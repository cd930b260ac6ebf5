"""Dense token rewards of given responses: log pi_sft - log pi_ref, token by token.

    python -m dpr_jax.score --sft=CKPT --ref=CKPT --input=IN.jsonl --output=OUT.jsonl

Reads lines {"prompt": str, "response": str} or {"messages": [...]} that end with the
assistant, and adds to each "tokens", "token_rewards", "logp_sft", "logp_ref" (over the
response tokens, EOS included) and "reward", their sum. The order of lines is kept. A line with
"hit_eos": false (see dpr_jax.generate) was cut off: its response has no EOS.
"""

import argparse
import pathlib
from collections.abc import Sequence

from dpr_jax import cli
from dpr_jax.errors import UserError


def parser() -> argparse.ArgumentParser:
  out = argparse.ArgumentParser("dpr_jax.score", description=__doc__.splitlines()[0])
  out.add_argument("--sft", required=True, help="CKPT of pi_sft")
  out.add_argument("--ref", required=True, help="CKPT of pi_ref, of the same architecture")
  out.add_argument("--input", required=True, help="JSONL, JSON or Parquet")
  out.add_argument("--output", required=True, help="JSONL to write; must not exist")
  out.add_argument("--html", default="", help="also write the tokens as a heatmap page")
  out.add_argument("--batch_size", type=cli.positive, default=8, help="responses scored at a time")
  out.add_argument("--max_length", type=int, default=0,
                   help="tokens of prompt and response; 0: the model's")
  cli.add_model_flags(out)
  return out


def main(argv: Sequence[str]) -> None:
  args = parser().parse_args(argv)
  output = cli.new_file("--output", args.output)
  html = cli.new_file("--html", args.html) if args.html else None
  from dpr_jax.data.formats import iter_records, read_demos

  demos = read_demos(args.input).demos  # One a record: an empty response is an error here.
  lines = [record for record, _ in iter_records(args.input)]
  import jax

  from dpr_jax.data.templates import encode_response, render_prompt
  from dpr_jax.evals.scoring import score_record, score_responses

  with cli.model_mesh(args) as (mesh, dtype):
    sft, ref = cli.load_pair(args.sft, args.ref, mesh, dtype)
    tokenizer, template = sft.tokenizer, args.template or sft.template
    limit = args.max_length or sft.model.cfg.max_length
    prompts, responses = [], []
    for demo in demos:
      prompts.append(render_prompt(demo.prompt, tokenizer, template, demo.source))
      responses.append(
          encode_response(
              demo.response, demo.prompt, tokenizer, template, demo.source, demo.ended
          )
      )
      length = len(prompts[-1]) + len(responses[-1])
      if length > limit:
        raise UserError(f"{demo.source}: {length} tokens exceed --max_length={limit}")
    with cli.bar("score", 2 * len(demos), "response") as progress:
      scores = score_responses(
          sft.model,
          sft.variables,
          ref.variables,
          prompts,
          responses,
          mesh=mesh,
          batch_size=args.batch_size,
          on_batch=progress.update,
      )
  records = [
      {**line, **score_record(tokenizer, r, s)}
      for line, r, s in zip(lines, responses, scores, strict=True)
  ]
  from dpr_jax.workdir import write_lines

  write_lines(output, records)
  if html is not None and jax.process_index() == 0:
    from dpr_jax.report.heatmap import write_heatmap

    write_heatmap(records, pathlib.Path(html), f"Token rewards: {args.sft} against {args.ref}")


if __name__ == "__main__":
  cli.run_door(main)
