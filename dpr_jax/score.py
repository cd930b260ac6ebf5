"""Dense token rewards of given responses: log pi_sft - log pi_ref, token by token.

    python -m dpr_jax.score --sft=CKPT --ref=CKPT --input=IN.jsonl --output=OUT.jsonl

Reads lines {"prompt": str, "response": str}, {"messages": [...]} that end with the assistant, or of
any other format in docs/data.md, and adds to each "tokens", "token_rewards", "logp_sft", "logp_ref"
(over the response tokens, EOS included), "endogenous", the endogenous reward of each, and "reward",
the sum of "token_rewards". The order of lines is kept. Of lines that dpr_jax.generate wrote,
"response" is the answer, and may be empty. A line with "hit_eos": false was cut off: its response
has no EOS. A line with "token_ids" is scored on exactly those.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from dpr_jax import cli, distributed, signals
from dpr_jax.cli import models as models_cli
from dpr_jax.errors import UserError


def define(values: flags.FlagValues) -> None:
  flags.DEFINE_string("sft", None, "CKPT of pi_sft.", flag_values=values)
  flags.DEFINE_string("ref", None, "CKPT of pi_ref, of the same architecture.", flag_values=values)
  flags.DEFINE_string("input", None, "JSONL, JSON, Parquet or Arrow.", flag_values=values)
  flags.DEFINE_string("output", None, "JSONL to write; must not exist.", flag_values=values)
  flags.DEFINE_string("html", "", "Also write the tokens as a heatmap page.", flag_values=values)
  flags.DEFINE_integer("max_length", 0, "Tokens of prompt and response; 0: the model's.",
                       flag_values=values)
  models_cli.define_model_flags(values, "Responses scored")


def _given_ids(line: Mapping[str, Any], vocab_size: int, where: str) -> list[int] | None:
  """"token_ids" of a line, None without.

  Raises:
    UserError: they are no ids of the model.
  """
  ids = line.get("token_ids")
  if ids is None:
    return None
  known = isinstance(ids, list) and ids and all(
      isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in ids
  )
  if not known:
    raise UserError(f"{where}: field 'token_ids' must be a list of token ids below {vocab_size}")
  return ids


@cli.readable
def main(argv: Sequence[str]) -> None:
  distributed.initialize()
  values = cli.parse_flags(
      argv, entry_point="dpr_jax.score", doc=__doc__, define=define,
      required={"sft": "runs/smoke/sft", "ref": "runs/smoke/sft@0.5", "input": "IN.jsonl",
                "output": "OUT.jsonl"},
  )
  output = models_cli.new_file("--output", values.output)
  html = models_cli.new_file("--html", values.html, output) if values.html else None
  from dpr_jax.data.formats import read_demos
  from dpr_jax.data.records import iter_records

  demos = read_demos(values.input, extra_fields=("*",)).demos  # One per record.
  lines = [record for record, _ in iter_records(values.input)]
  import jax
  import numpy as np

  from dpr_jax.data.limits import check_length
  from dpr_jax.data.templates import encode_response, render_prompt
  from dpr_jax.evaluation.scoring import Scorer, score_record
  from dpr_jax.references.base import Reference

  with models_cli.model_mesh(values) as (mesh, dtype):
    sft, ref = models_cli.load_pair(values.sft, values.ref, mesh, dtype)
    tokenizer, template = sft.tokenizer, values.template or sft.template
    limit = values.max_length or sft.model.cfg.max_length
    prompts, responses = [], []
    for demo, line in zip(demos, lines, strict=True):
      check_length(demo.messages, tokenizer, limit, demo.source)
      prompts.append(render_prompt(demo.prompt, tokenizer, template, demo.source))
      ids = _given_ids(line, sft.model.cfg.vocab_size, demo.source)
      responses.append(
          np.asarray(ids, np.int32) if ids else encode_response(
              demo.messages[-1], demo.prompt, tokenizer, template, demo.source, demo.ended
          )
      )
      length = len(prompts[-1]) + len(responses[-1])
      if length > limit:
        raise UserError(f"{demo.source}: {length} tokens exceed --max_length={limit}")
    with models_cli.bar("score", 2 * len(demos), "response") as progress:
      scorer = Scorer(sft.model, mesh, values.batch_size, signals.stoppable(progress.update))
      scores = scorer.score(sft.variables, Reference.of(ref.variables), prompts, responses)
  records = [
      {**line, **score_record(tokenizer, r, s)}
      for line, r, s in zip(lines, responses, scores, strict=True)
  ]
  from dpr_jax.workdir import write_lines

  write_lines(output, records)
  if html is not None and jax.process_index() == 0:
    from dpr_jax.report.heatmap import write_heatmap

    write_heatmap(records, html, f"Token rewards: {values.sft} against {values.ref}")


if __name__ == "__main__":
  cli.run_entry_point(main, kept="nothing was written")
