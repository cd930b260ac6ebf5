r"""Responses of a model to a file of prompts.

    python -m dpr_jax.generate --model=CKPT --input=PROMPTS.jsonl --output=OUT.jsonl

Reads lines {"prompt": str} or {"messages": [...]} (a closing assistant turn is left out) and
adds "response", "length" (tokens, EOS included) and "hit_eos", false where --max_new_tokens cut
the response off. With --samples=N each line appears N times, in the order of the prompts.

--stop=STRING, which may be repeated, ends a response as soon as its text contains STRING, for
example --stop=$'\n\nQuestion:' after a few-shot prompt. "response" is the text before the string,
and "hit_eos" is true; "length" still counts the tokens of the string.
"""

import argparse
from collections.abc import Sequence

from dpr_jax import cli
from dpr_jax.errors import UserError


def parser() -> argparse.ArgumentParser:
  out = argparse.ArgumentParser("dpr_jax.generate", description=__doc__.splitlines()[0])
  out.add_argument("--model", required=True, help="CKPT")
  out.add_argument("--input", required=True, help="JSONL, JSON or Parquet")
  out.add_argument("--output", required=True, help="JSONL to write; must not exist")
  out.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
  out.add_argument("--top_k", type=int, default=0, help="0 keeps all tokens")
  out.add_argument("--top_p", type=float, default=1.0)
  out.add_argument("--max_new_tokens", type=cli.positive, default=256)
  out.add_argument("--stop", action="append", default=[], metavar="STRING",
                   help="end a response at this text, which is left out; may be repeated")
  out.add_argument("--samples", type=cli.positive, default=1, help="responses per prompt")
  out.add_argument("--batch_size", type=cli.positive, default=8, help="prompts decoded at a time")
  out.add_argument("--seed", type=int, default=0)
  cli.add_model_flags(out)
  return out


def main(argv: Sequence[str]) -> None:
  args = parser().parse_args(argv)
  output = cli.new_file("--output", args.output)
  from dpr_jax.data.formats import read_prompts

  items = read_prompts(args.input)
  import jax

  from dpr_jax.data.templates import render_prompt
  from dpr_jax.evals.responses import respond, response_text
  from dpr_jax.loading import load_checkpoint
  from dpr_jax.rollout.sampling import Sampling
  from dpr_jax.rollout.stop_strings import check_stop_strings
  from dpr_jax.workdir import write_lines

  try:
    check_stop_strings(args.stop)
  except UserError as e:
    raise UserError(f"--stop: {e}") from None
  try:
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
  except ValueError as e:
    raise UserError(f"--temperature, --top_k, --top_p: {e}") from None
  with cli.model_mesh(args) as (mesh, dtype):
    loaded = load_checkpoint(args.model, mesh, dtype)
    template = args.template or loaded.template
    where = [f"{args.input}: prompt {i + 1}" for i in range(len(items))]
    prompts = [
        render_prompt(messages, loaded.tokenizer, template, w)
        for (messages, _), w in zip(items, where, strict=True)
    ]
    longest = max(len(p) for p in prompts)
    if longest + args.max_new_tokens > loaded.model.cfg.max_length:
      at = max(range(len(prompts)), key=lambda i: len(prompts[i]))
      raise UserError(
          f"{where[at]}: {longest} tokens and --max_new_tokens={args.max_new_tokens} exceed the "
          f"{loaded.model.cfg.max_length} that the model was made for"
      )
    with cli.bar("generate", len(prompts) * args.samples, "response") as progress:
      responses = respond(
          loaded.model,
          (loaded.variables,),
          prompts,
          jax.random.key(args.seed),
          mesh=mesh,
          batch_size=args.batch_size,
          prompt_length=-(-longest // 32) * 32,
          max_new_tokens=args.max_new_tokens,
          stop_ids=loaded.stop_ids,
          sampling=sampling,
          samples_per_prompt=args.samples,
          stop_strings=args.stop,
          tokenizer=loaded.tokenizer,
          on_batch=progress.update,
      )
  records = []
  for i, response in enumerate(responses):
    text = response_text(
        loaded.tokenizer, response.tokens, response.hit_eos, loaded.stop_ids, args.stop
    )
    records.append({
        **items[i // args.samples][1],
        "response": text,
        "length": len(response.tokens),
        "hit_eos": response.hit_eos,
    })
  write_lines(output, records)


if __name__ == "__main__":
  cli.run_door(main)
