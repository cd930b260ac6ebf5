"""Responses of an evaluation judged, in one more file of its folder.

    judgments.jsonl  one line per question that a judge was asked: key, what it is about, reply

A reply is on disk before the next one is looked at. A question whose key is there is not asked
again: not by an evaluation that was interrupted, nor for two equal responses.
"""

import concurrent.futures
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from dpr_jax import fingerprints, signals
from dpr_jax.agreement import agree
from dpr_jax.config.fields import kind_of
from dpr_jax.config.values import to_json
from dpr_jax.data.demos import Demo, Message
from dpr_jax.errors import Stopped, UserError
from dpr_jax.evaluation.benchmarks.judged import JudgedBenchmark, JudgePrompt
from dpr_jax.evaluation.judges.base import Judge, Question, Setting
from dpr_jax.paths import Path, append, refusal, write_atomically
from dpr_jax.sharding import barrier, broadcast
from dpr_jax.workdir import read_lines

_LONG = 7 * 86400.0  # seconds that the other processes wait for the one that asks an endpoint.


def judge_responses(
    benchmark: JudgedBenchmark,
    judge: Judge,
    prompts: Mapping[str, JudgePrompt],
    demos: Sequence[Demo],
    folder: Any,
    bar: Callable[[int], Any],
    **where: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """The lines of responses.jsonl with `demo` and `replies` (part -> reply), and who judged them.

  Args:
    folder: the `EvaluationFolder`; all responses are there.
    bar: of a number of questions -> a progress bar.
    where: mesh, dtype and batch_size for a judge that is a model.

  Raises:
    Stopped: by a signal; what was under way is saved.
    UserError: the judge cannot go on; what it has said is saved.

  An endpoint is asked by process 0 alone, and other processes get no lines then.
  """
  ask = lambda: _ask(benchmark, judge, prompts, demos, folder, bar, where)
  if judge.everywhere:
    barrier("judge")  # All responses are written.
    records = ask()
  else:
    records = _alone(ask)
  words = {name: prompt._asdict() for name, prompt in prompts.items()}
  return records, {**to_json(judge), **({} if judge.rewards else {"prompts": words})}


def _alone(ask: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
  """What `ask` returns in process 0, for which the others wait; [] there."""
  if jax.process_index():
    # Not in the main thread, which would not notice a signal while it waits.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      return pool.submit(agree, list, seconds=_LONG).result()

  def unless_stopped():
    try:
      return ask()
    except Stopped as e:
      return e

  found = agree(unless_stopped, seconds=_LONG)
  if isinstance(found, Stopped):
    raise found
  return found


def _ask(benchmark, judge, prompts, demos, folder, bar, where) -> list[dict[str, Any]]:
  path = folder.path / "judgments.jsonl"
  records, asked = read_lines(folder.responses_file), {}
  for record in records:
    demo = record["demo"] = demos[record["index"]]
    about = (benchmark.conversations(demo, record) if judge.rewards else
             benchmark.questions(demo, record, prompts))
    record["replies"] = {question.part: judge.key(question) for question in about}
    for question in about:
      asked.setdefault(record["replies"][question.part], (question, record))
  known = _read(path)
  missing = [key for key in asked if key not in known]
  if judge.everywhere:
    barrier("judgments")  # All have read them.
  setting = Setting(stopping=lambda: signals.reached() is not None, fresh=not known, **where)
  with bar(len(missing)) as progress, signals.deferred():
    replies = judge.open(setting) if missing else iter
    for i, reply in replies([asked[key][0] for key in missing]):
      question, record = asked[missing[i]]
      about = {"index": record["index"], "sample": record["sample"], "part": question.part}
      _check(judge, reply)
      known[missing[i]] = {"key": missing[i], **about, **reply}
      _append(path, known[missing[i]])
      progress.update()
    left = sum(key not in known for key in missing)
    if left:
      signum = signals.reached()
      if signum is None:
        raise UserError(f"the judge left {left} of {len(missing)} questions without a reply")
      raise Stopped(signum, f"{folder.path}: {len(asked) - left} of {len(asked)} judgments are "
                    "saved")
  for record in records:
    record["replies"] = {part: known[key] for part, key in record["replies"].items()}
  return records


def open_rewards(judge: Judge, **where: Any) -> Callable[..., list[float | None]]:
  """A judge, loaded once -> rewards(prompts, texts, token_ids), as often as they are wanted.

  `rewards` takes prompts as messages, and the text and token ids of one response to each. It gives
  a float, or None for a response that cannot be scored; the same in every process, all of which
  must call it.

  Args:
    where: of `Setting`: also the tokenizer and template of the model that writes the responses.
  """
  begin = lambda: judge.open(Setting(stopping=lambda: False, **where))
  if judge.everywhere:
    replies = begin()
  else:  # An error of process 0 ends all of them.
    replies = agree(lambda: begin() if jax.process_index() == 0 else None, seconds=600.0)
  say = lambda text: {"role": "assistant", "content": text}

  def ask(questions: Sequence[Question]) -> list[float | None]:
    found = {}
    for i, reply in replies(questions):
      _check(judge, reply)
      found[i] = reply["reward"]
    if left := len(questions) - len(found):
      raise UserError(f"the judge left {left} of {len(questions)} responses without a reply")
    return [found[i] for i in range(len(questions))]

  def rewards(
      prompts: Sequence[Sequence[Message]], texts: Sequence[str], token_ids: Sequence[Any]
  ) -> list[float | None]:
    questions = [
        Question("", (*prompt, say(text)), token_ids=tuple(map(int, ids)))
        for prompt, text, ids in zip(prompts, texts, token_ids, strict=True)
    ]
    if judge.everywhere:
      return ask(questions)
    # An error of process 0 ends all of them.
    return broadcast(agree(lambda: ask(questions) if replies else None, seconds=_LONG))

  return rewards


def _check(judge: Judge, reply: Any) -> None:
  """Raises UserError where a judge, maybe a user's, does not reply as `Judge.replies` says."""
  name, good = ("reward", (int, float, type(None))) if judge.rewards else ("text", str)
  value = reply.get(name, ...) if isinstance(reply, Mapping) else ...
  if not isinstance(value, good) or (isinstance(value, float) and not math.isfinite(value)):
    raise UserError(f"--judge={kind_of(judge)}: the reply {reply!r:.200} must have a {name}"
                    f"{', a finite number or None' if judge.rewards else ''}")


def _read(path: Path) -> dict[str, dict[str, Any]]:
  """Key -> reply; a line that was torn at the end is cut off."""
  data = path.read_bytes() if path.exists() else b""
  whole = data[: data.rfind(b"\n") + 1]
  if len(whole) < len(data) and jax.process_index() == 0:
    write_atomically(path, whole)
  found = {}
  for number, line in enumerate(whole.splitlines(), start=1):
    try:
      record = json.loads(line)
      found[record["key"]] = record
      if not fingerprints.is_whole(record) or not ("text" in record or "reward" in record):
        raise KeyError
    except (ValueError, LookupError, TypeError):
      raise UserError(f"{path}:{number}: not a judgment; delete this line, and its question is "
                      "asked again") from None
  return found


def _append(path: Path, record: Mapping[str, Any]) -> None:
  if jax.process_index():
    return
  try:
    append(path, (json.dumps(fingerprints.seal(record), allow_nan=False) + "\n").encode())
  except OSError as e:
    raise UserError(f"{path}: cannot be written: {refusal(e)}") from None
