"""A model on a mesh as one of lm-evaluation-harness, which process 0 runs, twice.

The first time its requests are collected, with answers that mean nothing. All processes answer
them, block by block, as the prompts of any benchmark (`benchmark_run.fill`). The second time the
harness gets these answers, and scores them.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import lm_eval.evaluator
import numpy as np
from lm_eval import utils as lm_eval_utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from dpr_jax.agreement import agree
from dpr_jax.errors import UserError
from dpr_jax.evaluation.benchmark_run import BATCHES, BenchmarkRun, digest
from dpr_jax.evaluation.metrics import Column
from dpr_jax.evaluation.responses import Responder, prompt_seeds
from dpr_jax.evaluation.scoring import Scorer
from dpr_jax.evaluation.statistics import interval
from dpr_jax.keys import root_key
from dpr_jax.rollout import Sampling
from dpr_jax.sharding import broadcast

_BOOTSTRAP = 1000  # samples of standard errors that have no formula.


class Request(NamedTuple):
  """Token ids, and what is wanted of them: how likely a continuation is, or a response."""

  task: str
  doc: int
  context: Sequence[int]
  continuation: Sequence[int] = ()
  # Of a response: max_new_tokens, until (the strings that end it), temperature, top_k, top_p.
  generation: Mapping[str, Any] | None = None


class HarnessModel(TemplateLM):
  """What the harness asks: text becomes token ids, and answers come from a function.

  Texts become tokens, and are cut, as `HFLM` of the harness does it.

  Args:
    chat_template: Jinja, or None.
    max_length: of context and continuation, in tokens.
    answer: (logp, is_greedy) of a request, or a text if it has `generation`.
  """

  def __init__(self, tokenizer: Any, chat_template: str | None, max_length: int,
               answer: Callable[[Request], Any]):
    super().__init__()
    self.tokenizer, self.max_length, self._template = tokenizer, max_length, chat_template
    self._answer, self._asked = answer, []
    if self.prefix_token_id is None:
      raise UserError("--model: its tokenizer has neither a BOS nor an EOS token, which lm_eval "
                      "puts before a text without context")

  @property
  def eot_token_id(self):
    return self.tokenizer.eos_token_id

  @property
  def prefix_token_id(self):
    bos = self.tokenizer.bos_token_id
    return self.eot_token_id if bos is None else bos

  @property
  def tokenizer_name(self):
    return self.tokenizer.name_or_path.replace("/", "__")

  def apply_chat_template(self, chat_history, add_generation_prompt=True):
    if not self._template:
      raise UserError("--benchmark.chat: the tokenizer has no chat template; name one with "
                      "--template")
    return self.tokenizer.apply_chat_template(
        chat_history, chat_template=self._template, tokenize=False,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
    )

  def tok_encode(self, string, add_special_tokens=None, **kwargs):
    if add_special_tokens is None:
      add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
    return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

  def loglikelihood(self, requests, disable_tqdm=True):
    self._asked = requests
    return super().loglikelihood(requests, disable_tqdm=True)

  def _scored(self, request, context, continuation):
    room = self.max_length + 1 - len(continuation)  # The last token is never an input.
    if room < 1:
      raise UserError(f"--benchmark=lm_eval: a continuation of {request.task} has "
                      f"{len(continuation)} tokens; the model was made for {self.max_length}")
    return self._answer(
        Request(request.task_name, request.doc_id, context[-room:], continuation)
    )

  def _loglikelihood_tokens(self, requests, **kwargs):
    pairs = zip(self._asked, requests, strict=True)
    return [self._scored(request, *tokens) for request, (_, *tokens) in pairs]

  def loglikelihood_rolling(self, requests, disable_tqdm=True):
    out = []
    for request in requests:
      windows = lm_eval_utils.get_rolling_token_windows(
          self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
      )
      pairs = map(lm_eval_utils.make_disjoint_window, windows)
      out.append(sum(self._scored(request, *pair)[0] for pair in pairs))
    return out

  def generate_until(self, requests, disable_tqdm=True):
    out = []
    for request in requests:
      text, given = request.args
      how = dict(normalize_gen_kwargs(given))
      new, until = how.pop("max_gen_toks"), [x for x in how.pop("until") if x]
      sampled = how.pop("do_sample")
      if how.pop("num_beams", 1) != 1:
        raise UserError(f"--benchmark=lm_eval: {request.task_name} asks for num_beams="
                        f"{given['num_beams']}, which this package does not have")
      how = {"temperature": how.pop("temperature", float(sampled)), "top_k": how.pop("top_k", 0),
             "top_p": how.pop("top_p", 1.0), **how}
      if unknown := set(how) - {"temperature", "top_k", "top_p"}:
        raise UserError(f"--benchmark=lm_eval: generation_kwargs of {request.task_name} have "
                        f"{', '.join(sorted(unknown))}, which this package does not have")
      if new >= self.max_length:
        raise UserError(f"--benchmark=lm_eval: {request.task_name} wants max_gen_toks={new}; the "
                        f"model was made for {self.max_length} tokens with the prompt")
      context = self.tok_encode(text)[-(self.max_length - new):]
      how = {"max_new_tokens": new, "until": until, **how}
      found = self._answer(
          Request(request.task_name, request.doc_id, context, generation=how)
      )
      out.append(postprocess_generated_text(found, until, None))
    return out


def _figure(mean: float, error: Any, values: Sequence[Any], n: int) -> dict[str, Any]:
  """A figure of the harness with its interval: that of a mean, or of the harness's own error."""
  if values and all(isinstance(v, (int, float)) for v in values) and math.isclose(
      np.mean(values), mean, rel_tol=1e-9
  ):
    return {**interval([np.asarray(values, np.float64)]), "mean": float(mean)}
  half = 1.96 * error if isinstance(error, (int, float)) else math.nan
  return {"mean": float(mean), "ci95": [mean - half, mean + half], "n": n}


@dataclasses.dataclass(frozen=True)
class HarnessRun(BenchmarkRun):
  """Requests of the harness in place of prompts; `benchmark` is an `LMEval`."""

  data: str = ""
  limit: int = 0

  def _run_harness(self, answer: Callable[[Request], Any], bootstrap: int = 0) -> Any:
    """Results of the harness, with what `answer` says."""
    tokenizer = self.loaded.tokenizer
    template = tokenizer.chat_template
    if self.template:
      with open(self.template, encoding="utf-8") as file:
        template = file.read()
    chat = self.benchmark.chat
    return lm_eval.evaluator.evaluate(
        lm=HarnessModel(tokenizer, template, self.loaded.model.cfg.max_length, answer),
        task_dict=self.benchmark.load(self.data), limit=self.limit or None,
        bootstrap_iters=bootstrap, apply_chat_template=chat, fewshot_as_multiturn=chat,
    )

  @functools.cached_property
  def requests(self) -> list[Request]:
    """What the harness asks, the same in every process."""
    asked = []

    def collect() -> None:
      def answer(request):
        asked.append(request)
        return "" if request.generation else (0.0, False)

      if jax.process_index() == 0:
        self._run_harness(answer)

    agree(collect, seconds=3600)
    return [Request(*request) for request in broadcast(asked)]

  @functools.cached_property
  def _seeds(self) -> np.ndarray:
    return prompt_seeds([np.asarray(request.context, np.int32) for request in self.requests])

  def check(self):
    if not self.requests:
      raise UserError(f"--benchmark=lm_eval:{','.join(self.benchmark.tasks)} asks nothing")
    for block in self.blocks:
      if self.requests[block.start].generation:
        _ = self._responder_of(block).stops  # Made here, where nothing is written yet.

  def fingerprint(self):
    return digest([self.requests, [repr(demo.meta["doc"]) for demo in self.demos]])

  @functools.cached_property
  def blocks(self) -> list[range]:
    """Indices of requests that are of one kind."""
    blocks, end = [], 0
    for _, same in itertools.groupby(self.requests, key=lambda request: request.generation):
      start, end = end, end + len(list(same))
      size = BATCHES * self.batch_size
      blocks += [range(i, min(i + size, end)) for i in range(start, end, size)]
    return blocks

  @functools.cached_property
  def _responders(self) -> dict[str, Responder]:
    return {}

  def _responder_of(self, block: range) -> Responder:
    how = self.requests[block.start].generation
    if (key := digest(how)) not in self._responders:
      longest = max(len(r.context) for r in self.requests if r.generation == how)
      self._responders[key] = Responder(
          self.loaded.model, self.mesh, self.batch_size, -(-longest // 32) * 32,
          how["max_new_tokens"], self.loaded.stop_ids, tuple(how["until"]), self.loaded.tokenizer,
      )
    return self._responders[key]

  def answer(self, number, on_batch):
    block, variables = self.blocks[number], self.loaded.variables
    requests = [self.requests[i] for i in block]
    contexts, continuations = (
        [np.asarray(x, np.int32) for x in part]
        for part in zip(*((r.context, r.continuation) for r in requests))
    )
    how = requests[0].generation
    if how is None:
      scorer = Scorer(self.loaded.model, self.mesh, self.batch_size, on_batch)
      found = [
          {"logp": float(logp.astype(np.float64).sum()), "is_greedy": bool(greedy.all())}
          for logp, greedy in scorer.greedy_logps(variables, contexts, continuations)
      ]
    else:
      responses = self._responder_of(block).respond(
          (variables,), contexts, root_key(self.seed, "benchmark"), on_batch=on_batch,
          sampling=Sampling(how["temperature"], how["top_k"], how["top_p"]),
          seeds=self._seeds[block.start : block.stop],
      )
      found = [
          {"response": self._text(r), "token_ids": r.tokens.tolist(), "length": len(r.tokens),
           "hit_eos": r.hit_eos}
          for r in responses
      ]
    return [
        {"index": i, "sample": 0, "task": request.task, "doc": request.doc, **line}
        for i, request, line in zip(block, requests, found, strict=True)
    ]

  def _text(self, response) -> str:
    tokens = response.tokens.tolist()
    if response.hit_eos and tokens[-1] in self.loaded.stop_ids:
      tokens = tokens[:-1]
    return self.loaded.tokenizer.decode(tokens, skip_special_tokens=True)

  def results(self, records):
    given = zip(self.requests, records, strict=True)

    def answer(request):
      expected, line = next(given)
      if digest(request) != digest(expected):  # As JSON: what was sent has lists for tuples.
        raise RuntimeError(f"the harness asks {request.task} something else the second time")
      return line["response"] if request.generation else (line["logp"], line["is_greedy"])

    found = self._run_harness(answer, _BOOTSTRAP)
    metrics, columns = {}, {}
    for task, figures in {**found["results"], **found.get("groups", {})}.items():
      for key, mean in figures.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(mean, (int, float)):
          continue
        values = [s.get(metric) for s in found["samples"].get(task, ()) if s["filter"] == filtered]
        name = f"{task}/{metric}" + (f",{filtered}" if filtered != "none" else "")
        better = {True: 1, False: -1}.get(found["higher_is_better"].get(task, {}).get(metric), 0)
        metrics[name] = _figure(mean, figures.get(f"{metric}_stderr,{filtered}"), values,
                                figures["sample_len"])
        columns[name] = vars(Column(name, better=better))
    return {"n": len(self.demos), "metrics": metrics, "columns": columns}
