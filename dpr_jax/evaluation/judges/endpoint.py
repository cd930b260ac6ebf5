"""A judge behind an OpenAI-compatible chat endpoint."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import email.utils
import functools
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from dpr_jax import fingerprints
from dpr_jax.config.fields import setting
from dpr_jax.errors import UserError
from dpr_jax.evaluation.judges.base import Judge

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_REFUSED = (400, 413, 422)  # This question alone, or each: then nothing is ever answered.
_MAX_BYTES = 1 << 24
_REFUSALS = 8  # without one answer, after which the request itself must be wrong.


class _Later(Exception):
  """No answer this time.

  Args:
    seconds: after which the endpoint wants to be asked again.
  """

  def __init__(self, why: str, seconds: float = 0.0):
    super().__init__(why)
    self.seconds = seconds


class _SamePlace(urllib.request.HTTPRedirectHandler):
  """Follows no redirect: the key would go along."""

  def redirect_request(self, *args):
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint(Judge):
  """Asks POST URL/chat/completions; the key comes from an environment variable alone."""

  kind = "endpoint"
  url: str = setting("", "up to the version, as in http://localhost:8000/v1")
  model: str = setting("", "its name at the endpoint")
  key_variable: str = setting("OPENAI_API_KEY", "environment variable that holds the key")
  request: str = setting(
      "", 'JSON, changes of the request: {"max_completion_tokens": 900, "temperature": null}; null '
      "leaves a field out"
  )
  concurrency: int = setting(8, "requests at a time", low=1, high=256)
  timeout: float = setting(120.0, "seconds that one request may take", above=0)
  deadline: float = setting(900.0, "seconds that one question may take with its retries", above=0)
  attempts: int = setting(10, "requests for one question at most", low=1)
  backoff: float = setting(1.0, "seconds before the second request; doubled each time", above=0)

  def check(self, config):
    parts = urllib.parse.urlsplit(self.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
      raise ValueError(f"url={self.url!r} must be an address such as http://localhost:8000/v1")
    if parts.username or parts.query or parts.fragment:
      raise ValueError("url must hold no user, query or fragment; a key goes into the environment "
                       f"variable {self.key_variable}")
    if not self.model:
      raise ValueError("model is missing; the name that the endpoint gives its model")
    with contextlib.suppress(ValueError):
      if isinstance(json.loads(self.request or "{}"), dict):
        return
    raise ValueError(f"request={self.request!r} must be a JSON object")

  def _body(self, question) -> dict[str, Any]:
    body = {"model": self.model, "messages": list(question.messages), "temperature": 0.0,
            "max_tokens": question.max_tokens}
    if question.top_logprobs:
      body |= {"logprobs": True, "top_logprobs": question.top_logprobs}
    body |= json.loads(self.request or "{}")
    return {name: value for name, value in body.items() if value is not None}

  def key(self, question):
    return fingerprints.of_bytes(json.dumps(self._body(question), sort_keys=True).encode())

  # --- HTTP --------------------------------------------------------------------------------------

  @property
  def _key(self) -> str:
    key = os.environ.get(self.key_variable, "").strip()
    if not (key.isascii() and key.isprintable()):
      raise UserError(f"the environment variable {self.key_variable} must hold printable ASCII")
    return key

  @functools.cached_property
  def _opener(self) -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_SamePlace)

  def _call(self, path: str, body: Any, timeout: float) -> bytes:
    """Raises HTTPError, OSError or HTTPException."""
    headers = {"Content-Type": "application/json"}
    if self._key:
      headers["Authorization"] = f"Bearer {self._key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{self.url.rstrip('/')}/{path}", data, headers)
    end, read = time.monotonic() + timeout, bytearray()
    with self._opener.open(request, timeout=timeout) as response:
      while chunk := response.read1(1 << 16):
        read += chunk
        if time.monotonic() > end or len(read) > _MAX_BYTES:
          raise TimeoutError(f"no whole reply within {timeout:g} s")
    # One that repeats what it was sent must not bring the key into a file.
    return bytes(read).replace(self._key.encode() or b"\0", b"[key]")

  def _error(self, error: urllib.error.HTTPError) -> str:
    """What an endpoint says of an error, in a line without the key."""
    with contextlib.suppress(OSError, http.client.HTTPException):
      said = error.read(2000).decode(errors="replace")
      said = said.replace(self._key, "[key]") if self._key else said
      return f"{error.code} {error.reason}: {' '.join(said.split())[:300]}"
    return f"{error.code} {error.reason}"

  def _refuse_key(self) -> UserError:
    has = "is not accepted" if self._key else "is not set"
    return UserError(f"--judge_url={self.url} wants a key, and the environment variable "
                     f"{self.key_variable} {has}; set it to a key of that endpoint")

  def prepare(self, tokenizer=None):
    try:
      self._call("models", None, min(self.timeout, 20.0))
    except urllib.error.HTTPError as e:
      if e.code in (401, 403):
        raise self._refuse_key() from None
    except (OSError, http.client.HTTPException) as e:
      raise UserError(f"--judge_url={self.url} does not answer: {getattr(e, 'reason', e)}"
                      ) from None

  # --- Questions ---------------------------------------------------------------------------------

  def _attempt(self, body: Any, timeout: float) -> dict[str, Any]:
    """A reply; {"refused"} for a question that the endpoint does not take."""
    try:
      return _parsed(self._call("chat/completions", body, timeout))
    except urllib.error.HTTPError as e:
      if e.code in (401, 403):
        raise self._refuse_key() from None
      said = self._error(e)
      if e.code in _REFUSED:
        return {"text": "", "refused": said}
      if e.code in _AGAIN:
        raise _Later(said, _retry_after(e.headers.get("Retry-After"))) from None
      raise UserError(f"--judge_url={self.url}, model {self.model}: {said}") from None
    except (OSError, http.client.HTTPException) as e:
      raise _Later(f"{type(e).__name__}: {getattr(e, 'reason', e)}") from None

  def _checked(self, question, reply: dict[str, Any]) -> dict[str, Any]:
    if question.top_logprobs and reply["text"] and "logprobs" not in reply:
      raise UserError(f"--judge_url={self.url} gives no logprobs; with --benchmark.logprobs=false "
                      "the verdict that it writes counts")
    return reply

  def _reply(self, question, halt: threading.Event) -> dict[str, Any]:
    body, end = self._body(question), time.monotonic() + self.deadline
    for attempt in range(1, self.attempts + 1):
      try:
        left = max(1e-3, end - time.monotonic())
        return self._checked(question, self._attempt(body, min(self.timeout, left)))
      except _Later as e:
        pause = self.backoff * min(64, 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
        pause, why = max(pause, e.seconds), str(e)
      if halt.is_set() or time.monotonic() + pause > end or attempt == self.attempts:
        break
      halt.wait(pause)
    raise UserError(f"--judge_url={self.url}: no answer after {attempt} requests within "
                    f"--judge.deadline={self.deadline:g} s ({why}); the replies so far are kept, "
                    "and the same command goes on")

  def replies(self, questions, setting):
    halt, failed, refused = threading.Event(), None, []
    todo, running, answered = collections.deque(range(len(questions))), {}, not setting.fresh
    with concurrent.futures.ThreadPoolExecutor(self.concurrency) as pool:
      try:
        while True:
          if failed or setting.stopping():
            todo.clear()
            halt.set()
          while todo and len(running) < self.concurrency:
            i = todo.popleft()
            running[pool.submit(self._reply, questions[i], halt)] = i
          if not running:
            break
          done, _ = concurrent.futures.wait(
              running, 0.2, return_when=concurrent.futures.FIRST_COMPLETED
          )
          for future in done:
            i = running.pop(future)
            try:
              reply = future.result()
            except UserError as e:
              failed = failed or e
              continue
            if "refused" in reply and not answered:
              refused.append((i, reply))
              continue
            answered = True
            yield i, reply
          if answered:
            yield from refused
            refused.clear()
          elif len(refused) >= _REFUSALS or (refused and not todo and not running):
            failed = failed or UserError(
                f"--judge_url={self.url} refuses every question ({refused[0][1]['refused']}); "
                "--judge.request changes what it is sent"
            )
      finally:
        halt.set()
    if failed and not setting.stopping():
      raise failed


def _retry_after(value: str | None) -> float:
  """Seconds of a Retry-After header, which holds them or a date."""
  with contextlib.suppress(TypeError, ValueError):
    return max(0.0, float(value))
  with contextlib.suppress(TypeError, ValueError):
    left = email.utils.parsedate_to_datetime(value) - datetime.datetime.now(datetime.UTC)
    return max(0.0, left.total_seconds())
  return 0.0


def _parsed(data: bytes) -> dict[str, Any]:
  """A reply of the chat API; raises _Later where it is none."""
  try:
    record = json.loads(data)
    choice = record["choices"][0]
    reply = {"text": choice["message"].get("content") or ""}
    if not isinstance(reply["text"], str):
      raise TypeError
    content = (choice.get("logprobs") or {}).get("content")
    if content:
      top = content[0].get("top_logprobs") or content[:1]
      reply["logprobs"] = {t["token"]: float(t["logprob"]) for t in top}
    usage = record.get("usage") or {}
    for ours, theirs in (("tokens_in", "prompt_tokens"), ("tokens_out", "completion_tokens")):
      if isinstance(usage.get(theirs), int):
        reply[ours] = usage[theirs]
    return reply
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
    raise _Later(f"a malformed reply: {data[:80]!r}") from None
