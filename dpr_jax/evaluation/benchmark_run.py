"""One model evaluated on a benchmark: a folder that is filled block by block.

    config.json      settings and contents that decide the responses
    responses.jsonl  one line per prompt and sample, in the order of the data
    results.json     means and intervals; a function of responses.jsonl
    judged.jsonl     scores of each response, where a judge gave them

The random key of a response depends on the seed, its prompt and its number alone, and the lines of
a block are appended as a whole. So an evaluation that was interrupted anywhere resumes, yields the
same files, byte for byte, and samples no response twice.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dpr_jax import fingerprints, lock, signals
from dpr_jax.config.fields import kind_of
from dpr_jax.data.demos import Demo, Message
from dpr_jax.data.limits import check_length
from dpr_jax.data.templates import encode_response, render_prompt
from dpr_jax.errors import Stopped, UserError
from dpr_jax.evaluation.benchmarks.base import Benchmark
from dpr_jax.evaluation.metrics import Column, ResponseMetric, score_response
from dpr_jax.evaluation.responses import Responder, Response, prompt_seeds, response_text
from dpr_jax.evaluation.scoring import Scorer
from dpr_jax.evaluation.statistics import interval
from dpr_jax.keys import root_key
from dpr_jax.loading import LoadedModel
from dpr_jax.paths import absolute, append, in_bucket, refusal, write_atomically
from dpr_jax.rollout import Sampling
from dpr_jax.sharding import barrier
from dpr_jax.workdir import read_lines, versions, write_json

_log = logging.getLogger(__name__)

BATCHES = 4  # of a block: what `Responder` answers with one program, refilling its slots.


class EvaluationFolder:
  """The files of one evaluation. Process 0 writes them."""

  def __init__(self, path: str | os.PathLike):
    self.path = absolute(path)
    self.config_file = self.path / "config.json"
    self.responses_file = self.path / "responses.jsonl"
    self.results_file = self.path / "results.json"
    self.judged_file = self.path / "judged.jsonl"

  def _record(self) -> dict[str, Any] | None:
    try:
      record = json.loads(self.config_file.read_text(encoding="utf-8"))
      return record if {"settings", "contents"} <= set(record) else None
    except (OSError, ValueError, RecursionError):
      return None

  def check(self) -> None:
    """Raises UserError where the folder holds something else, or cannot be made."""
    place = next(p for p in (self.path, *self.path.parents) if in_bucket(p) or p.exists())
    if not in_bucket(place) and not (place.is_dir() and os.access(place, os.W_OK)):
      raise UserError(f"--output={self.path} cannot be written: {place} is "
                      f"{'read-only' if place.is_dir() else 'a file'}")
    if self.path.exists() and self._record() is None:
      ours = self.config_file.name + ".tmp"
      names = [p.name for p in self.path.iterdir() if not p.name.startswith(lock.FILE)]
      foreign = sorted(name for name in names if name != ours)
      if foreign:
        raise UserError(f"--output={self.path} holds files but no config.json of an evaluation "
                        f"({foreign[0]}, ...); name a new folder")

  def claim(self, settings: Mapping[str, Any], contents: Mapping[str, Any]) -> None:
    """Writes config.json, or compares with the existing one. Call `check` first.

    Args:
      settings: flag -> value.
      contents: flag -> fingerprint of what it names.

    Raises:
      UserError: the evaluation there has other settings; names the first flag that differs.
    """
    barrier("claim")  # No process is still checking a folder that the first one writes to.
    old = self._record()
    if old is None:
      try:
        write_json(self.config_file,
                   {"settings": settings, "contents": contents, "versions": versions()})
      except OSError as e:
        raise UserError(f"--output={self.path} cannot be written: {refusal(e)}") from None
      return
    new = json.loads(json.dumps({"settings": settings, "contents": contents}))
    for part, words in (("settings", "another"), ("contents", "other contents of")):
      for flag in dict.fromkeys([*new[part], *old[part]]):
        a, b = old[part].get(flag), new[part].get(flag)
        if a != b:
          raise UserError(
              f"--output={self.path} belongs to an evaluation with {words} --{flag} ({a!r} there, "
              f"{b!r} here); use a new folder, or the same value as there"
          )

  def resume(self, blocks: Sequence[Sequence[tuple[int, int]]]) -> int:
    """How many blocks responses.jsonl holds; an unfinished one at its end is dropped.

    From a line on that was edited or damaged the file is kept under another name, and the blocks
    are asked for again.

    Args:
      blocks: (index, sample) of each line of each block.

    Raises:
      UserError: a line is not the one that belongs there; names file and line.
    """
    data = self.responses_file.read_bytes() if self.responses_file.exists() else b""
    lines = data.split(b"\n")[:-1]  # What follows the last newline is a torn line.
    ends = list(itertools.accumulate(len(block) for block in blocks))
    done = sum(end <= len(lines) for end in ends)
    kept = lines[: ends[done - 1]] if done else []
    damaged = 0
    for number, (line, place) in enumerate(zip(kept, itertools.chain(*blocks)), start=1):
      try:
        record = json.loads(line)
      except (ValueError, RecursionError):
        record = None
      if not fingerprints.is_whole(record):
        damaged, done = number, sum(end < number for end in ends)
        kept = lines[: ends[done - 1]] if done else []
        break
      if (record.get("index"), record.get("sample")) != place:
        raise UserError(f"{self.responses_file}:{number}: not the response {place[1]} to prompt "
                        f"{place[0]} that belongs there; delete the file to start again")
    barrier("resume")  # All have read it.
    size = sum(len(line) + 1 for line in kept)
    if jax.process_index() == 0 and size < len(data):
      if damaged:
        copy = fingerprints.set_aside(self.responses_file, copy=True)
        _log.warning("%s:%d: not what was written; the file is kept as %s, and the responses from "
                     "that block on are made again", self.responses_file, damaged, copy.name)
      write_atomically(self.responses_file, data[:size])
    return done

  def append(self, records: Sequence[Mapping[str, Any]]) -> None:
    """Adds the lines of a block, each with a checksum: one write, on disk when it returns."""
    if jax.process_index():
      return
    dump = lambda r: json.dumps(fingerprints.seal(r), ensure_ascii=False, allow_nan=False)
    lines = "".join(dump(r) + "\n" for r in records)
    try:
      append(self.responses_file, lines.encode())
    except OSError as e:
      raise UserError(f"{self.responses_file}: cannot be written: {refusal(e)}") from None


@dataclasses.dataclass(frozen=True)
class BenchmarkRun:
  """A benchmark, a model, and how the model answers the benchmark."""

  benchmark: Benchmark
  metrics: Mapping[str, ResponseMetric]
  loaded: LoadedModel
  mesh: jax.sharding.Mesh
  template: str
  demos: Sequence[Demo]
  batch_size: int
  seed: int
  # Of a benchmark that generates:
  sampling: Sampling = Sampling(temperature=0)
  samples: int = 1
  max_new_tokens: int = 0
  stop_strings: tuple[str, ...] = ()

  @functools.cached_property
  def prompts(self) -> list[np.ndarray]:
    """Token ids, int32 [P_i]."""
    tokenizer, asked = self.loaded.tokenizer, self.benchmark.prompt
    for i, demo in enumerate(self.demos):
      where = demo.source or f"prompt {i + 1}"
      check_length(asked(demo), tokenizer, self.loaded.model.cfg.max_length, where)
    return [self._render(asked(d), d) for d in self.demos]

  @functools.cached_property
  def _seeds(self) -> np.ndarray:
    return prompt_seeds(self.prompts)

  @functools.cached_property
  def demonstrated(self) -> list[np.ndarray]:
    """Token ids of the demonstrated responses, int32 [T_i]."""
    tokenizer, asked = self.loaded.tokenizer, self.benchmark.prompt
    return [
        encode_response(d.messages[-1], asked(d), tokenizer, self.template, d.source, d.ended)
        for d in self.demos
    ]

  def check(self) -> None:
    """Raises UserError for no prompts, one that the model has no room for, or a bad stop string."""
    if not self.demos:
      raise UserError(f"--benchmark={kind_of(self.benchmark)}: its `read` returned no examples; it "
                      "must return one at least")
    limit, likelihood = self.loaded.model.cfg.max_length, self.benchmark.likelihood
    for i, (demo, prompt) in enumerate(zip(self.demos, self.prompts, strict=True)):
      new = len(self.demonstrated[i]) if likelihood else self.max_new_tokens
      if len(prompt) + new > limit:
        what = f"a response of {new}" if likelihood else f"--max_new_tokens={new}"
        raise UserError(f"{demo.source or f'prompt {i + 1}'}: a prompt of {len(prompt)} tokens and "
                        f"{what} exceed the {limit} that the model was made for")
    if self._later_room > limit - self.max_new_tokens:
      raise UserError(f"--max_new_tokens={self.max_new_tokens}: several turns with responses of "
                      f"this length exceed the {limit} tokens that the model was made for")
    if self.stop_strings:
      _ = self._first.stops  # Made here, where nothing is written yet.

  @functools.cached_property
  def _later_room(self) -> int:
    """Tokens of the longest prompt of a later turn, after responses of `max_new_tokens`."""
    lengths = [0]
    for demo in () if self.benchmark.likelihood else self.demos:
      talk = list(self.benchmark.prompt(demo))
      for before, asked in enumerate(self.benchmark.later_turns(demo), start=1):
        talk += _turn("", asked)
        lengths.append(len(self._render(talk, demo)) + before * self.max_new_tokens)
    return max(lengths)

  def _render(self, talk: Sequence[Message], demo: Demo) -> np.ndarray:
    return render_prompt(talk, self.loaded.tokenizer, self.template, demo.source)

  def fingerprint(self) -> str:
    """Of all prompts and expected answers, as the model sees them."""
    parts = [self.prompts, self.demonstrated if self.benchmark.likelihood else []]
    return digest([[d.answer for d in self.demos], *([x.tolist() for x in p] for p in parts)])

  @property
  def blocks(self) -> list[range]:
    """Indices of the prompts of each block; on every mesh the same."""
    size = BATCHES * -(-self.batch_size // self.samples)
    n = len(self.demos)
    return [range(i, min(i + size, n)) for i in range(0, n, size)]

  def lines(self, block: range) -> list[tuple[int, int]]:
    """(index, sample) of each line of a block."""
    return list(itertools.product(block, range(self.samples)))

  def _responder(self, longest: int) -> Responder:
    return Responder(
        self.loaded.model, self.mesh, self.batch_size, -(-longest // 32) * 32, self.max_new_tokens,
        self.loaded.stop_ids, self.stop_strings, self.loaded.tokenizer,
    )

  @functools.cached_property
  def _first(self) -> Responder:
    return self._responder(max(map(len, self.prompts)))

  @functools.cached_property
  def _later(self) -> Responder:
    return self._responder(self._later_room)

  def answer(self, number: int, on_batch: Callable[[int], None]) -> list[dict[str, Any]]:
    """The lines of a block."""
    block = self.blocks[number]
    prompts = [self.prompts[i] for i in block]
    variables = self.loaded.variables
    if self.benchmark.likelihood:
      scorer = Scorer(self.loaded.model, self.mesh, self.batch_size, on_batch)
      responses = [self.demonstrated[i] for i in block]
      out = []
      for i, logp in zip(block, scorer.logps(variables, prompts, responses), strict=True):
        demo = self.demos[i]
        scores = self.benchmark.score_logps(demo, logp)
        out.append(
            self._line(i, 0, self.demonstrated[i], demo.response, demo.ended, scores,
                       logps=[round(float(x), 6) for x in logp])
        )
      return out
    responses = self._first.respond(
        (variables,), prompts, root_key(self.seed, "benchmark"), sampling=self.sampling,
        samples_per_prompt=self.samples, seeds=self._seeds[block.start : block.stop],
        on_batch=on_batch,
    )
    out = []
    for (i, sample), response in zip(self.lines(block), responses, strict=True):
      text = self._text(response)
      scores = self.benchmark.score(self.demos[i], text)
      out.append(self._line(i, sample, response.tokens, text, response.hit_eos, scores))
    self._continue(out)
    return out

  def _continue(self, records: Sequence[dict[str, Any]]) -> None:
    """Adds `turns` to records whose conversations go on: the responses to their later turns."""
    demos = [self.demos[record["index"]] for record in records]
    asked = [self.benchmark.later_turns(demo) for demo in demos]
    talks = [[*self.benchmark.prompt(d)] for d in demos]
    said = [record["response"] for record in records]
    for turn in range(max(map(len, asked))):
      rows = [row for row, turns in enumerate(asked) if turn < len(turns)]
      prompts = []
      for row in rows:
        talks[row] += _turn(said[row], asked[row][turn])
        prompts.append(self._fitting(talks[row], demos[row]))
      # Whatever its neighbours are, as for the first turn.
      seeds = [self._seeds[records[row]["index"]] + np.uint32([0, records[row]["sample"]])
               for row in rows]
      responses = self._later.respond(
          (self.loaded.variables,), prompts, root_key(self.seed, f"turn {turn + 2}"),
          sampling=self.sampling, seeds=np.stack(seeds),
      )
      for row, response in zip(rows, responses, strict=True):
        said[row] = self._text(response)
        records[row].setdefault("turns", []).append({
            "prompt": asked[row][turn], "response": said[row],
            "token_ids": [int(t) for t in response.tokens], "length": len(response.tokens),
            "hit_eos": response.hit_eos,
        })

  def _fitting(self, talk: list[Message], demo: Demo) -> np.ndarray:
    """A prompt after a response; text can take more tokens than were sampled: it is cut then."""
    prompt = self._render(talk, demo)
    while (over := len(prompt) - self._later_room) > 0 and talk[-2]["content"]:
      talk[-2] = {**talk[-2], "content": talk[-2]["content"][:-over]}
      prompt = self._render(talk, demo)
    return prompt

  def _text(self, response: Response) -> str:
    return response_text(
        self.loaded.tokenizer, response.tokens, response.hit_eos, self.loaded.stop_ids,
        self.stop_strings,
    )

  def _line(self, index, sample, tokens, text, hit_eos, scores, **more) -> dict[str, Any]:
    demo = self.demos[index]
    line = {
        "index": index, "sample": sample, "prompt": demo.prompt[-1]["content"],
        "answer": demo.answer, "groups": list(self.benchmark.groups(demo)), "response": text,
        "token_ids": [int(t) for t in tokens], "length": len(tokens), "hit_eos": bool(hit_eos),
        **more,
    }
    where = demo.source or f"prompt {index + 1}"
    return score_response(line, scores, self.benchmark.scores, self.metrics, where)

  def results(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of results.json: n, metrics and columns.

    A score is averaged over the samples of each prompt first; intervals are over prompts.
    """
    columns = dict(self.benchmark.scores)
    columns |= {name: metric.column() for name, metric in self.metrics.items()}
    values = {
        name: np.reshape([r["scores"][name] for r in records], (-1, self.samples))
        for name in columns
    }
    per_prompt = {name: v.mean(axis=1) for name, v in values.items()}
    if "accuracy" in values:
      groups = [r["groups"] for r in records[:: self.samples]]
      names = sorted({g for of_prompt in groups for g in of_prompt})
      for group in names if len(names) > 1 else ():
        chosen = [group in of_prompt for of_prompt in groups]
        columns[f"accuracy/{group}"] = columns["accuracy"].of_group(group)
        per_prompt[f"accuracy/{group}"] = per_prompt["accuracy"][chosen]
      if np.isin(values["accuracy"], (0, 1)).all():
        for k in _ks(self.samples):
          columns[f"pass@{k}"] = Column(f"Pass@{k}", "%", better=1)
          per_prompt[f"pass@{k}"] = pass_at(k, values["accuracy"])
    metrics = {name: interval([v]) for name, v in per_prompt.items()}
    metrics |= self.benchmark.summarize(records)
    columns |= self.benchmark.summaries
    for name in metrics:
      figure, _, group = name.partition("/")
      columns.setdefault(name, columns[figure].of_group(group))
    described = {name: vars(columns[name]) for name in metrics}
    return {"n": len(self.demos), "metrics": metrics, "columns": described}


def _turn(response: str, asked: str) -> list[Message]:
  """A response and what the user says after it."""
  return [{"role": "assistant", "content": response}, {"role": "user", "content": asked}]


def digest(value: Any) -> str:
  """blake2b of a JSON value, 16 hex digits."""
  return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def _ks(samples: int) -> list[int]:
  """2, 4, 8, ... and the number of samples itself; pass@1 is the accuracy."""
  return sorted({*(2**i for i in range(1, samples.bit_length())), samples} - {1})


def pass_at(k: int, right: np.ndarray) -> np.ndarray:
  """The chance that one of k responses is right, without bias; of each prompt, [P].

  1 - C(n - c, k) / C(n, k) for c right ones of n (Chen et al., 2021, arXiv 2107.03374).

  Args:
    right: [P, n], 0 or 1.
  """
  n = right.shape[1]
  missed = [math.comb(n - int(c), k) / math.comb(n, k) for c in right.sum(axis=1)]
  return 1 - np.array(missed)


def fill(
    run: BenchmarkRun, folder: EvaluationFolder, bar: Callable[[int], Any]
) -> tuple[list[dict[str, Any]], int]:
  """Samples the responses that are still missing.

  Args:
    bar: of the number of responses that are missing -> a progress bar, as `tqdm`.

  Raises:
    Stopped: by a signal, after a block, which is saved.

  Returns:
    The lines of responses.jsonl, in process 0 (elsewhere none), and how many blocks were missing.
  """
  blocks = [run.lines(block) for block in run.blocks]
  done = folder.resume(blocks)
  with bar(sum(map(len, blocks[done:]))) as progress, signals.deferred():
    for number in range(done, len(blocks)):
      folder.append(run.answer(number, progress.update))
      if signum := signals.reached():
        lines = sum(map(len, blocks[: number + 1]))
        raise Stopped(signum, f"{folder.path}: {lines} of {sum(map(len, blocks))} responses are "
                      "saved")
  barrier("evaluate")
  records = [] if jax.process_index() else read_lines(folder.responses_file)
  return records, len(blocks) - done
