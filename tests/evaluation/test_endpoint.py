"""A judge behind HTTP: what is asked again, what ends it, and that the key stays where it is."""

import dataclasses
import json
import threading
import time
from email.utils import format_datetime

import pytest

from dpr_jax.errors import UserError
from dpr_jax.evaluation.judges.base import Question, Setting
from dpr_jax.evaluation.judges.endpoint import Endpoint, _parsed, _retry_after

KEY = "sk-secret-0123"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
  monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def questions(n, **fields):
  return [Question("ab", ({"role": "user", "content": f"q{i}"},), 9, **fields) for i in range(n)]


def make(endpoint, **fields):
  fast = {"model": "judge", "backoff": 0.01, "timeout": 5.0, "deadline": 10.0}
  return Endpoint(url=endpoint.url, **{**fast, **fields})


def ask(judge, asked, stopping=lambda: False, fresh=True):
  return dict(judge.replies(asked, Setting(stopping, fresh)))


def text_of(body):
  return body["messages"][-1]["content"]


def test_each_question_gets_its_reply_and_its_tokens(chat_endpoint):
  endpoint = chat_endpoint(lambda body, number: f"re {text_of(body)}")
  judge = make(endpoint, concurrency=4)
  judge.prepare()
  found = ask(judge, questions(20))
  assert found == {
      i: {"text": f"re q{i}", "tokens_in": 100, "tokens_out": 7} for i in range(20)
  }
  assert sorted(map(text_of, endpoint.asked)) == sorted(f"q{i}" for i in range(20))
  assert endpoint.asked[0] | {"messages": []} == {
      "model": "judge", "messages": [], "temperature": 0.0, "max_tokens": 9}
  assert "Authorization" not in endpoint.headers[0]


def test_the_request_can_be_changed_and_is_part_of_the_key(chat_endpoint):
  endpoint = chat_endpoint(lambda body, number: "x")
  plain = make(endpoint)
  judge = make(endpoint, request='{"max_tokens": null, "temperature": null, "seed": 3}')
  (question,) = questions(1, top_logprobs=5)
  with pytest.raises(UserError, match="gives no logprobs"):
    ask(judge, [question])
  assert endpoint.asked[0] == {
      "model": "judge", "messages": [{"role": "user", "content": "q0"}], "logprobs": True,
      "top_logprobs": 5, "seed": 3}
  keys = {plain.key(question), judge.key(question), make(endpoint, model="other").key(question),
          plain.key(dataclasses.replace(question, max_tokens=8))}
  assert len(keys) == 4
  assert plain.key(dataclasses.replace(question, part="ba")) == plain.key(question)


def test_as_many_as_asked_for_are_under_way(chat_endpoint):
  barrier = threading.Barrier(5)

  def reply(body, number):
    barrier.wait(timeout=5)  # Breaks unless five come together.
    return "x"

  assert len(ask(make(chat_endpoint(reply), concurrency=5), questions(10))) == 10


@pytest.mark.parametrize("failure", [
    (500, {}), (503, b"<html>"), (429, {}), (408, {}), (200, b"{not JSON"), (200, {"choices": []}),
    (200, {"choices": [{"message": {"content": 3}}]}), (200, [1]),
    (200, b"{}", {"Content-Length": 100}),  # Ends before its end.
], ids=str)
def test_what_fails_once_is_asked_again(chat_endpoint, failure):
  endpoint = chat_endpoint(lambda body, number: failure if number == 0 else "good")
  assert ask(make(endpoint, timeout=0.5), questions(1))[0]["text"] == "good"
  assert len(endpoint.asked) == 2


def test_retry_after_is_honoured(chat_endpoint):
  times = []

  def reply(body, number):
    times.append(time.monotonic())
    return (429, {}, {"Retry-After": "1"}) if number == 0 else "good"

  ask(make(chat_endpoint(reply)), questions(1))
  assert 1 <= times[1] - times[0] < 3
  import datetime

  later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)
  assert 28 < _retry_after(format_datetime(later, usegmt=True)) <= 30
  assert _retry_after(None) == _retry_after("soon") == _retry_after("-5") == 0


def test_a_wait_beyond_the_deadline_ends_at_once_and_keeps_the_other_replies(chat_endpoint):
  endpoint = chat_endpoint(
      lambda body, number: (429, {}, {"Retry-After": "99"}) if text_of(body) == "q1" else "good"
  )
  found, start = {}, time.monotonic()
  with pytest.raises(UserError, match=r"no answer after 1 requests .*deadline=10 s \(429") as error:
    for i, reply in make(endpoint, concurrency=3).replies(
        questions(3), Setting(lambda: False)):
      found[i] = reply["text"]
  assert found == {0: "good", 2: "good"} and time.monotonic() - start < 5
  assert "the same command goes on" in str(error.value)


def test_one_that_is_too_slow_is_not_waited_for(chat_endpoint):
  def reply(body, number):
    time.sleep(1.5 if number == 0 else 0)
    return "good"

  endpoint = chat_endpoint(reply)
  assert ask(make(endpoint, timeout=0.3), questions(1))[0]["text"] == "good"
  slow = chat_endpoint(lambda body, number: time.sleep(1.0) or "late")
  with pytest.raises(UserError, match="no answer after 2 requests .*timed out"):
    ask(make(slow, timeout=0.1, attempts=2), questions(1))


def test_nobody_there_is_said_before_anything_is_asked(chat_endpoint):
  endpoint = chat_endpoint(lambda body, number: "x")
  gone = Endpoint(url="http://127.0.0.1:9/v1", model="judge")
  with pytest.raises(UserError, match=r"^--judge_url=http://127.0.0.1:9/v1 does not answer: "):
    gone.prepare()
  endpoint.models = 404, {}  # Not every server lists its models.
  make(endpoint).prepare()


def test_the_key_comes_from_the_environment_and_is_named_never_shown(chat_endpoint, monkeypatch):
  def reply(body, number):
    return f"your key is {KEY}"

  endpoint = chat_endpoint(reply)
  endpoint.models = 401, {}
  judge = make(endpoint, key_variable="MY_KEY")
  with pytest.raises(UserError, match="the environment variable MY_KEY is not set"):
    judge.prepare()
  monkeypatch.setenv("MY_KEY", f" {KEY}\n")
  with pytest.raises(UserError, match="the environment variable MY_KEY is not accepted"):
    judge.prepare()
  assert ask(judge, questions(1))[0]["text"] == "your key is [key]"
  assert endpoint.headers[-1]["Authorization"] == f"Bearer {KEY}"
  refusing = make(chat_endpoint(lambda body, n: (418, f"who is {KEY}?".encode())),
                  key_variable="MY_KEY")
  with pytest.raises(UserError, match=r"418 .*who is \[key\]") as error:
    ask(refusing, questions(1))
  assert KEY not in str(error.value) and KEY not in repr(judge) and KEY not in str(judge.identity())
  monkeypatch.setenv("MY_KEY", "two\nlines")
  with pytest.raises(UserError, match="MY_KEY must hold printable ASCII"):
    judge.prepare()


def test_a_redirect_is_not_followed(chat_endpoint, monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  other = chat_endpoint(lambda body, number: "x")
  endpoint = chat_endpoint(lambda body, number: (307, {}, {"Location": other.url}))
  with pytest.raises(UserError, match="307"):
    ask(make(endpoint), questions(1))
  assert not other.asked and not other.headers


def test_a_refused_question_is_kept_and_all_refused_is_an_error(chat_endpoint):
  refuse = 400, {"error": {"message": "too long"}}
  endpoint = chat_endpoint(lambda body, n: refuse if text_of(body) in ("q0", "q3") else "good")
  found = ask(make(endpoint), questions(5))
  assert [i for i in range(5) if "refused" in found[i]] == [0, 3] and found[0]["text"] == ""
  assert "too long" in found[0]["refused"]
  nothing = chat_endpoint(lambda body, number: refuse)
  for n in (1, 50):
    with pytest.raises(UserError, match="refuses every question .400 Bad Request.*too long"):
      ask(make(nothing, concurrency=2), questions(n))
  assert len(nothing.asked) < 15
  assert "refused" in ask(make(nothing), questions(1), fresh=False)[0]


def test_logprobs_are_those_of_the_first_token(chat_endpoint):
  top = [{"token": "m", "logprob": -0.5}, {"token": "M", "logprob": -1.5}]
  body = {"choices": [{"message": {"content": "m"},
                       "logprobs": {"content": [{"token": "m", "logprob": -0.5,
                                                 "top_logprobs": top}]}}]}
  assert _parsed(json.dumps(body).encode()) == {"text": "m", "logprobs": {"m": -0.5, "M": -1.5}}


def test_a_stop_waits_for_what_is_under_way_and_asks_no_more(chat_endpoint):
  stop = threading.Event()

  def reply(body, number):
    if number >= 3:
      stop.set()
      time.sleep(0.3)
    return "good"

  endpoint = chat_endpoint(reply)
  found = ask(make(endpoint, concurrency=2), questions(30), stop.is_set)
  assert 4 <= len(found) == len(endpoint.asked) <= 6


@pytest.mark.parametrize(("fields", "message"), [
    ({"url": "ftp://x/v1"}, "must be an address"), ({"url": "localhost:8000"}, "must be an addr"),
    ({"url": "http://user:pw@x/v1"}, "no user, query or fragment"),
    ({"url": "http://x/v1?key=1"}, "no user, query"), ({"model": ""}, "model is missing"),
    ({"request": "[1]"}, "JSON object"), ({"request": "{"}, "JSON object"),
])
def test_fields_are_checked(fields, message):
  with pytest.raises(ValueError, match=message):
    Endpoint(**{"url": "http://x/v1", "model": "judge", **fields}).check(None)
