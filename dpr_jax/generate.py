r"""Responses of a model to a file of prompts.

    python -m dpr_jax.generate --model=CKPT --input=PROMPTS.jsonl --output=OUT.jsonl

Reads lines {"prompt": str}, {"messages": [...]} or any other format of docs/data.md (a response
that the line has is left out of the prompt) and adds
"response", "length" (tokens, EOS included) and "hit_eos", false where --max_new_tokens cut the
response off. With --samples=N each line appears N times, in the order of the prompts.

--best_of=N samples N responses and keeps the one with the highest reward of a judge, "reward":
--judge_model=FOLDER, a local reward model; --judge=log_ratio --judge.sft=CKPT --judge.ref=CKPT, the
reward of DPR; without --judge.ref the likelihood under sft; or --judge=file.py:Class.

--stop=STRING, which may be repeated, ends a response as soon as its text contains STRING, for
example --stop=$'\n\nQuestion:' after a few-shot prompt. "response" is the text before the string,
and "hit_eos" is true; "length" still counts the tokens of the string.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from dpr_jax import cli, distributed, signals
from dpr_jax.cli import judges as judges_cli
from dpr_jax.cli import models as models_cli
from dpr_jax.cli.values import define_fields
from dpr_jax.errors import UserError, naming
from dpr_jax.keys import MAX_SEED


def define(values: flags.FlagValues) -> None:
  flags.DEFINE_string("model", None, "CKPT.", flag_values=values)
  flags.DEFINE_string("input", None, "JSONL, JSON, Parquet or Arrow.", flag_values=values)
  flags.DEFINE_string("output", None, "JSONL to write; must not exist.", flag_values=values)
  flags.DEFINE_float("temperature", 1.0, "0 is greedy.", flag_values=values)
  flags.DEFINE_integer("top_k", 0, "0 keeps all tokens.", flag_values=values)
  flags.DEFINE_float("top_p", 1.0, "1 keeps all tokens.", flag_values=values)
  flags.DEFINE_integer("max_new_tokens", 256, "Per response.", lower_bound=1, flag_values=values)
  flags.DEFINE_multi_string("stop", [], "Ends a response at this text, which is left out; may be "
                            "repeated.", flag_values=values)
  flags.DEFINE_integer("samples", 1, "Responses per prompt.", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("best_of", 1, "Samples of which a judge chooses each response.",
                       lower_bound=1, flag_values=values)
  judges_cli.define_judge_flags(values)
  flags.DEFINE_integer("seed", 0, "Of the sampling.", lower_bound=0, upper_bound=MAX_SEED,
                       flag_values=values)
  models_cli.define_model_flags(values, "Responses decoded")


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, Any]:
  """Command line -> (flags, the judge of --best_of or None)."""
  cls = judges_cli.judge_class(argv)

  def define_all(values):
    define(values)
    if cls:
      define_fields(values, "judge", cls)

  values = cli.parse_flags(
      argv, entry_point="dpr_jax.generate", doc=__doc__, define=define_all,
      required={"model": "runs/smoke/dpr", "input": "PROMPTS.jsonl", "output": "OUT.jsonl"},
  )
  if (values.best_of > 1) != bool(cls):
    raise UserError("--best_of=N, of at least 2, and a judge (--judge_model=FOLDER, "
                    "--judge=log_ratio) need each other")
  judge = judges_cli.make_judge(values, cls) if cls else None
  if judge and not judge.rewards:
    raise UserError("--judge: --best_of needs a judge that gives rewards, such as "
                    "--judge_model=FOLDER without --judge_url")
  if judge and (values.samples > 1 or not values.temperature):
    raise UserError("--best_of chooses among samples: leave --samples out, and set --temperature "
                    "above 0")
  return values, judge


@cli.readable
def main(argv: Sequence[str]) -> None:
  distributed.initialize()
  values, judge = parse(argv)
  output = models_cli.new_file("--output", values.output)
  from dpr_jax.data.formats import read_prompts

  items = read_prompts(values.input)
  if judge:
    judge.prepare()

  from dpr_jax.data.limits import check_length
  from dpr_jax.data.templates import render_prompt
  from dpr_jax.evaluation.judging import open_rewards
  from dpr_jax.evaluation.responses import Responder, response_text
  from dpr_jax.keys import make_key
  from dpr_jax.loading import load_checkpoint
  from dpr_jax.rollout import Sampling
  from dpr_jax.rollout.stop_strings import check_stop_strings
  from dpr_jax.workdir import write_lines

  with naming("--stop"):
    check_stop_strings(values.stop)
  with naming("--temperature, --top_k, --top_p"):
    sampling = Sampling(values.temperature, values.top_k, values.top_p)
  with models_cli.model_mesh(values) as (mesh, dtype):
    loaded = load_checkpoint(values.model, mesh, dtype)
    template = values.template or loaded.template
    where = [f"{values.input}: prompt {i + 1}" for i in range(len(items))]
    for (messages, _), w in zip(items, where, strict=True):
      check_length(messages, loaded.tokenizer, loaded.model.cfg.max_length, w)
    prompts = [
        render_prompt(messages, loaded.tokenizer, template, w)
        for (messages, _), w in zip(items, where, strict=True)
    ]
    longest = max(len(p) for p in prompts)
    if longest + values.max_new_tokens > loaded.model.cfg.max_length:
      at = max(range(len(prompts)), key=lambda i: len(prompts[i]))
      raise UserError(
          f"{where[at]}: {longest} tokens and --max_new_tokens={values.max_new_tokens} exceed the "
          f"{loaded.model.cfg.max_length} that the model was made for"
      )
    responder = Responder(
        loaded.model, mesh, values.batch_size, -(-longest // 32) * 32, values.max_new_tokens,
        loaded.stop_ids, tuple(values.stop), loaded.tokenizer,
    )
    count = values.samples * values.best_of
    with models_cli.bar("generate", len(prompts) * count, "response") as progress:
      responses = responder.respond(
          (loaded.variables,), prompts, make_key(values.seed), sampling=sampling,
          samples_per_prompt=count, on_batch=signals.stoppable(progress.update),
      )
    texts = [
        response_text(loaded.tokenizer, r.tokens, r.hit_eos, loaded.stop_ids, values.stop)
        for r in responses
    ]
    rewards = None
    if judge:
      loaded = dataclasses.replace(loaded, variables=None)  # Room for the judge's weights.
      rewards = open_rewards(
          judge, mesh=mesh, dtype=dtype, batch_size=values.batch_size, tokenizer=loaded.tokenizer,
          template=template,
      )([items[i // count][0] for i in range(len(texts))], texts, [r.tokens for r in responses])
  records = []
  for i, (response, text) in enumerate(zip(responses, texts, strict=True)):
    reward = {}
    if judge:
      group = rewards[i - i % count :][:count]
      if i % count != int(np.argmax([-np.inf if r is None else r for r in group])):
        continue
      reward = {"reward": group[i % count], "rewards": group}
    records.append({
        **items[i // count][1],
        "response": text,
        "token_ids": [int(t) for t in response.tokens],
        "length": len(response.tokens),
        "hit_eos": response.hit_eos,
        **reward,
    })
  write_lines(output, records)


if __name__ == "__main__":
  cli.run_entry_point(main, kept="nothing was written")
