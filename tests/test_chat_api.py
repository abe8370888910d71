"""The client of chat APIs: nothing is asked twice, lost or told, whatever the server does."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from fake_chat_api import FakeChatAPI, always, content_of, serving, troubled

from prefopt.errors import PrefoptError
from prefopt.eval.judging import usage_line
from prefopt.reward_models import chat_api, chat_response
from prefopt.reward_models.chat_api import ChatAPI, ChatRequest

KEY = "sk-proj-7f3b9a52c81e4d06"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_api, "_FIRST_WAIT", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def server() -> Iterator[FakeChatAPI]:
    with serving() as fake:
        yield fake


@pytest.fixture
def make(server: FakeChatAPI, tmp_path: Path) -> Callable[..., ChatAPI]:
    """A client of the server with its cache in the test's folder."""

    def make(**settings: Any) -> ChatAPI:
        values = {"base_url": server.url, "cache": tmp_path / "cache.jsonl"} | settings
        return ChatAPI("judge", **values)

    return make


def questions(count: int, **settings: Any) -> list[ChatRequest]:
    values = {"max_tokens": 1, "top_logprobs": 5} | settings
    return [
        ChatRequest([{"role": "user", "content": f"question {i}"}], **values) for i in range(count)
    ]


def lines(path: Path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_text().splitlines()]


def test_every_question_is_answered_once_by_a_server_in_trouble(
    server: FakeChatAPI, make: Callable[..., ChatAPI], tmp_path: Path
) -> None:
    calm = make(cache=tmp_path / "calm.jsonl").ask(questions(80))
    server.requests.clear(), server.answered.clear()
    server.manners = troubled
    api, told = make(), []
    answers = api.ask(questions(80), lambda i, answer: told.append((i, answer)))
    assert answers == calm
    assert sorted(i for i, _ in told) == [*range(80)]
    assert all(answers[i] == answer for i, answer in told)
    assert set(server.answered.values()) == {1}
    assert len(server.answered) == len(set(lines(tmp_path / "cache.jsonl"))) == 80
    assert len(lines(tmp_path / "cache.jsonl")) == api.usage.asked == 80
    assert api.usage.retries == server.requests.total() - 80 > 40


def test_what_is_cached_is_not_asked(
    server: FakeChatAPI, make: Callable[..., ChatAPI], tmp_path: Path
) -> None:
    first = make().ask(questions(10))
    server.bodies.clear()
    api, told = make(), []
    assert api.ask(questions(14), lambda i, answer: told.append(i))[:10] == first
    assert told[:10] == [*range(10)]
    asked = sorted(body["messages"][0]["content"] for body in server.bodies)
    assert asked == [f"question {i}" for i in range(10, 14)]
    assert (api.usage.asked, api.usage.cached, api.usage.cached_prompt_tokens) == (4, 10, 1000)
    assert len(api.ask(questions(14))) == 14  # the same client, once more
    assert len(server.bodies) == 4
    assert len(lines(tmp_path / "cache.jsonl")) == 14


@pytest.mark.parametrize(
    "other",
    [
        {"temperature": 0.5},
        {"max_tokens": 2},
        {"top_logprobs": 0},
        {"sample": 1},
        {"messages": [{"role": "system", "content": "question 0"}]},
    ],
)
def test_a_request_that_differs_is_asked(
    server: FakeChatAPI, make: Callable[..., ChatAPI], other: dict[str, Any]
) -> None:
    (request,) = questions(1)
    make().ask([request, ChatRequest(**(vars(request) | other))])
    assert len(server.bodies) == 2


def test_another_model_or_server_is_asked(
    server: FakeChatAPI, make: Callable[..., ChatAPI], tmp_path: Path
) -> None:
    make().ask(questions(1))
    ChatAPI("other", base_url=server.url, cache=tmp_path / "cache.jsonl").ask(questions(1))
    with serving() as other:
        make(base_url=other.url).ask(questions(1))
        assert len(other.bodies) == 1
    assert len(server.bodies) == 2
    assert len(set(lines(tmp_path / "cache.jsonl"))) == 3


def test_equal_requests_are_asked_once(server: FakeChatAPI, make: Callable[..., ChatAPI]) -> None:
    api, told = make(), []
    answers = api.ask(questions(2) * 3, lambda i, answer: told.append(i))
    assert answers[:2] == answers[2:4] == answers[4:]
    assert sorted(told) == [*range(6)]
    assert (len(server.bodies), api.usage.asked, api.usage.cached) == (2, 2, 4)


def test_a_killed_process_is_gone_on_with(
    server: FakeChatAPI, make: Callable[..., ChatAPI], tmp_path: Path
) -> None:
    cache = tmp_path / "cache.jsonl"
    server.manners, server.slowness = always("slow"), 0.1
    # forked, since a new process takes long to import torch
    process = multiprocessing.get_context("fork").Process(
        target=lambda: make(cache=cache, concurrency=4).ask(questions(40))
    )
    process.start()
    while server.answered.total() < 13:
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = lines(cache)
    assert 8 <= len(kept) < 30

    server.manners = always(None)
    before = len(server.bodies)
    api = make(cache=cache)
    assert len(api.ask(questions(40))) == 40
    assert len(server.bodies) - before == api.usage.asked == 40 - len(kept)
    assert len(lines(cache)) == len(set(lines(cache))) == 40


def test_an_interrupt_ends_it_at_once(
    server: FakeChatAPI, make: Callable[..., ChatAPI], tmp_path: Path
) -> None:
    server.manners = lambda call: "hang" if call.number >= 5 else None
    api, told = make(), []

    def interrupt_soon(index: int, answer: Any) -> None:
        told.append(index)
        if len(told) == 5:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        api.ask(questions(30), interrupt_soon)
    assert len(lines(tmp_path / "cache.jsonl")) == 5
    server.manners = always(None)
    api.ask(questions(30))
    assert (api.usage.asked, api.usage.cached) == (30, 5)


def test_half_a_line_is_cut_off(
    server: FakeChatAPI, make: Callable[..., ChatAPI], tmp_path: Path
) -> None:
    cache = tmp_path / "cache.jsonl"
    answers = make().ask(questions(3))
    whole = cache.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in (ends[1] + 1, ends[1] + 4, ends[1] + 100, ends[2] - 1):
        cache.write_bytes(whole[:length])
        server.bodies.clear()
        assert make(concurrency=1).ask(questions(3)) == answers
        assert len(server.bodies) == 1
        assert cache.read_bytes() == whole


def test_a_file_that_is_no_cache_is_left_alone(
    make: Callable[..., ChatAPI], server: FakeChatAPI, tmp_path: Path
) -> None:
    for content in ('[{"output": "an answer"}]', '{"output": "an answer"}\n', '{"key": 1}\n', "\n"):
        path = tmp_path / "answers.json"
        path.write_text(content)
        with pytest.raises(PrefoptError, match=r"answers.json:1: .*expected a cache"):
            make(cache=path).ask(questions(1))
        assert path.read_text() == content
    assert not server.bodies


def test_two_at_a_time_on_one_cache_are_refused(make: Callable[..., ChatAPI]) -> None:
    other = make()

    def ask_meanwhile(index: int, answer: Any) -> None:
        with pytest.raises(PrefoptError, match="another process or thread that asks"):
            other.ask(questions(2))

    make().ask(questions(1), ask_meanwhile)
    assert len(other.ask(questions(2))) == 2  # and then it may


def test_no_more_than_the_limit_at_once(server: FakeChatAPI, make: Callable[..., ChatAPI]) -> None:
    server.manners, server.slowness = always("500", "slow"), 0.02
    make(concurrency=3).ask(questions(12))
    assert server.most == 3


def test_a_server_is_asked_again_when_it_says(
    server: FakeChatAPI, make: Callable[..., ChatAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.manners = always("429 0.4", None)
    make().ask(questions(1))
    assert server.times[1] - server.times[0] >= 0.4
    monkeypatch.setattr(chat_api, "_LONGEST_RETRY_AFTER", 0.1)
    server.requests.clear()
    server.manners = always("503 86400", None)
    make().ask(questions(1, sample=1))
    assert len(server.bodies) == 4
    assert server.times[3] - server.times[2] >= 0.1
    assert chat_response._seconds("120") == 120
    assert 50 < chat_response._seconds(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert chat_response._seconds(formatdate(time.time() - 60, usegmt=True)) == 0
    assert chat_response._seconds("soon") is None


def test_waits_double_up_to_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    from tenacity import AsyncRetrying, Future, RetryCallState

    monkeypatch.setattr(chat_api, "_FIRST_WAIT", 1.0)
    state = RetryCallState(AsyncRetrying(), None, (), {})
    for attempt, least in enumerate((1, 2, 4, 8, 16, 32, 60, 60), start=1):
        state.attempt_number = attempt
        state.outcome = Future(attempt)
        state.outcome.set_exception(chat_response.FailedAttemptError("", passing=True))
        assert least <= chat_api._wait(state) <= least + 1


@pytest.mark.parametrize(
    ("manner", "said"),
    [
        ("400", "HTTP 400: this is why"),
        ("401", "HTTP 401: this is why .*OPENAI_API_KEY"),
        ("403", "HTTP 403: this is why .*OPENAI_API_KEY"),
        ("404", "HTTP 404: this is why .*base_url"),
        ("422", "HTTP 422: this is why"),
        ("307", "HTTP 307: this is why"),
        ("quota", "HTTP 429: no credit .*no credit left"),
    ],
)
def test_a_refusal_is_not_repeated(
    server: FakeChatAPI, make: Callable[..., ChatAPI], manner: str, said: str
) -> None:
    server.manners = always(manner)
    with pytest.raises(
        PrefoptError, match=f"judge at {server.url}: 1 of 1 requests failed: .*{said}"
    ):
        make().ask(questions(1))
    assert len(server.bodies) == 1


def test_a_redirect_is_told_and_not_followed(
    server: FakeChatAPI, make: Callable[..., ChatAPI]
) -> None:
    with serving() as other:
        server.manners, server.elsewhere = always("redirect"), f"{other.url}/chat/completions"
        with pytest.raises(PrefoptError, match=f"HTTP 308: it redirects to {other.url}"):
            make(concurrency=1).ask(questions(5))
        assert not other.bodies
    assert len(server.bodies) == 1


@pytest.mark.parametrize("manner", ["401", "404", "quota"])
def test_what_all_would_be_refused_for_ends_at_once(
    server: FakeChatAPI, make: Callable[..., ChatAPI], manner: str
) -> None:
    server.manners = always(manner)
    with pytest.raises(PrefoptError, match=r"of 50 requests failed and \d+ were not sent any more"):
        make(concurrency=2).ask(questions(50))
    assert len(server.bodies) <= 4


@pytest.mark.parametrize(
    ("manner", "said"),
    [
        ("429", "HTTP 429"),
        ("408", "HTTP 408"),
        ("409", "HTTP 409"),
        ("529", "HTTP 529"),
        ("drop", "RemoteProtocolError"),
        ("cut", "RemoteProtocolError"),
        ("malformed", "not JSON"),
        ("deep", "not JSON"),
        ("no choices", "another form: try again"),
        ("no content", "another form"),
        ("hang", "no answer within 0.4 s"),
    ],
)
def test_what_may_pass_is_repeated(
    server: FakeChatAPI, make: Callable[..., ChatAPI], tmp_path: Path, manner: str, said: str
) -> None:
    server.manners = always(manner)
    api = make(attempts=3, timeout=0.4 if manner == "hang" else 10)
    with pytest.raises(PrefoptError, match=f"1 of 1 requests failed: 1 times .*{said}"):
        api.ask(questions(1))
    assert len(server.bodies) == 3
    assert api.usage.retries == 2
    assert not lines(tmp_path / "cache.jsonl")


def test_others_go_on_when_one_fails(
    server: FakeChatAPI, make: Callable[..., ChatAPI], tmp_path: Path
) -> None:
    bad = [content_of({"model": "judge", "messages": q.messages}) for q in questions(20)[3:5]]
    server.manners = lambda call: "403" if content_of(call.body) in bad else "slow"
    with pytest.raises(PrefoptError, match="2 of 20 requests failed: 2 times HTTP 403") as failure:
        make(concurrency=4).ask(questions(20))
    assert "\n" not in str(failure.value)
    assert str(tmp_path / "cache.jsonl") in str(failure.value)
    assert len(lines(tmp_path / "cache.jsonl")) == 18
    server.manners = always(None)
    server.bodies.clear()
    assert len(make().ask(questions(20))) == 20
    assert len(server.bodies) == 2


def test_what_is_refused_for_what_it_holds_is_unanswered(
    server: FakeChatAPI,
    make: Callable[..., ChatAPI],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad = [content_of({"model": "judge", "messages": q.messages}) for q in questions(20)[3:9]]
    server.manners = lambda call: "400" if content_of(call.body) in bad else None
    caplog.set_level(logging.WARNING, logger="prefopt")
    told: list[int] = []
    api = make(concurrency=2)
    answers = api.ask(questions(20), lambda index, answer: told.append(index))
    assert [a.finish_reason == "refused" for a in answers] == [3 <= n < 9 for n in range(20)]
    assert all(a.text == "" and a.top_log_probs == {} for a in answers[3:9])
    assert sorted(told) == list(range(20))
    assert (api.usage.asked, api.usage.refused) == (14, 6)
    assert "6 requests were refused and are unanswered: HTTP 400: this is why" in caplog.text
    assert len(lines(tmp_path / "cache.jsonl")) == 14
    server.bodies.clear()
    again = make(concurrency=2)  # more in a row than end a run with a server that is gone
    assert again.ask(questions(20)) == answers
    assert len(server.bodies) == 6
    with pytest.raises(PrefoptError, match="6 of 6 requests failed: 6 times HTTP 400"):
        make(concurrency=8).ask(questions(20)[3:9])


def test_a_server_that_refuses_most_is_an_error(
    server: FakeChatAPI, make: Callable[..., ChatAPI]
) -> None:
    server.manners = lambda call: None if call.number < 8 else "400"
    with pytest.raises(PrefoptError, match="12 of 20 requests failed"):
        make(concurrency=1).ask(questions(20))


def test_a_server_that_is_gone_is_left_in_peace(
    server: FakeChatAPI, make: Callable[..., ChatAPI]
) -> None:
    server.manners = always("500")
    with pytest.raises(PrefoptError, match=r"of 100 requests failed and \d+ were not sent"):
        make(concurrency=4, attempts=2).ask(questions(100))
    assert len(server.bodies) < 20


def test_a_filtered_answer_is_empty(server: FakeChatAPI, make: Callable[..., ChatAPI]) -> None:
    server.manners = always("null content")
    (answer,) = make().ask(questions(1))
    assert (answer.text, answer.finish_reason, answer.top_log_probs) == ("", "content_filter", {})


def test_a_server_without_log_probs_is_named(
    server: FakeChatAPI, make: Callable[..., ChatAPI], tmp_path: Path
) -> None:
    server.reply = lambda body: ("m", None)
    with pytest.raises(PrefoptError, match="no log-probs of the first token"):
        make(concurrency=1).ask(questions(10))
    assert len(server.bodies) == 1
    assert not lines(tmp_path / "cache.jsonl")
    assert make().ask(questions(1, top_logprobs=0))[0].text == "m"


def test_log_probs_are_read(server: FakeChatAPI, make: Callable[..., ChatAPI]) -> None:
    server.reply = lambda body: ("m", {"m": 0.5, "M": 0.25, " m": 0.125})
    (answer,) = make().ask(questions(1, top_logprobs=2))
    assert answer.top_log_probs == {"m": math.log(0.5), "M": math.log(0.25)}
    body = server.bodies[0]
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 2, 1)
    make().ask(questions(1, top_logprobs=0))
    assert "logprobs" not in server.bodies[1]


def test_tokens_that_read_the_same_add_up() -> None:
    top = [{"token": "?", "logprob": math.log(p)} for p in (0.5, 0.25)]
    choice = {"message": {"content": "?"}, "logprobs": {"content": [{"top_logprobs": top}]}}
    answer = chat_response.read_answer({"choices": [choice]})
    assert answer.top_log_probs == pytest.approx({"?": math.log(0.75)})


def test_half_a_character_can_be_written() -> None:
    choice = {"message": {"content": "cut \ud83d"}, "finish_reason": "length"}
    assert chat_response.read_answer({"choices": [choice]}).text == "cut ?"


def test_cost(server: FakeChatAPI, make: Callable[..., ChatAPI]) -> None:
    server.reply = lambda body: ("three little words", None)
    api = make(price=(10.0, 30.0))
    api.ask(questions(4, top_logprobs=0))
    assert (api.usage.prompt_tokens, api.usage.completion_tokens) == (400, 12)
    assert api.usage.cost == pytest.approx((400 * 10 + 12 * 30) / 1e6)
    again = make(price=(10.0, 30.0))
    again.ask(questions(4, top_logprobs=0))
    assert (again.usage.cost, again.usage.cached_completion_tokens) == (0.0, 12)
    assert make().usage.cost is None
    assert "(" not in usage_line(vars(api.usage))
    line = usage_line(vars(api.usage) | {"uncounted": 2})
    assert line.endswith("(2 answers came without their number of tokens); 0.00 dollars")


def test_asks_inside_a_running_event_loop(make: Callable[..., ChatAPI]) -> None:
    async def notebook() -> int:
        return len(make().ask(questions(5)))

    assert asyncio.run(notebook()) == 5


def test_an_error_of_the_caller_ends_it(
    server: FakeChatAPI, make: Callable[..., ChatAPI], tmp_path: Path
) -> None:
    server.manners = lambda call: "hang" if call.number > 3 else None

    def stop(index: int, answer: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make().ask(questions(10), stop)
    assert lines(tmp_path / "cache.jsonl")


def test_the_key_is_told_to_nobody(
    server: FakeChatAPI,
    make: Callable[..., ChatAPI],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore", "asyncio", "prefopt"):
        caplog.set_level(logging.DEBUG, logger=name)
    api = make()
    server.manners = troubled
    api.ask(questions(20))
    assert all(headers["authorization"] == f"Bearer {KEY}" for headers in server.headers)
    server.manners = always("echo")
    with pytest.raises(PrefoptError, match=r"HTTP 401: .*\[key\]") as failure:
        api.ask(questions(25))
    server.manners = always(None)
    server.reply = lambda body: (f"your key is {KEY}", None)
    (answer,) = api.ask(questions(1, top_logprobs=0))
    assert answer.text == "your key is [key]"
    told = [caplog.text, *capfd.readouterr(), str(failure.value), repr(failure.value)]
    told += [repr(api), repr(vars(api)), repr(api.describe()), repr(api.usage), repr(answer)]
    told += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert "send_request_headers" in caplog.text  # httpcore's log is there, at its fullest
    assert not [text for text in told if KEY[8:] in text]


def test_a_half_masked_key_is_hidden_too(make: Callable[..., ChatAPI]) -> None:
    key = make()._key
    assert key.redact("wrong key: sk-proj-7f***4d06!") == "wrong key: [key]"
    assert key.redact("no key at all") == "no key at all"


def test_a_server_without_a_key(
    server: FakeChatAPI, make: Callable[..., ChatAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    make().ask(questions(1))
    assert "authorization" not in server.headers[0]
    server.manners = always("401")
    with pytest.raises(PrefoptError, match="no key was sent: the environment variable OPENAI_API_"):
        make().ask(questions(2))
    with pytest.raises(PrefoptError, match="variable OPENAI_API_KEY is not set; expected the API"):
        ChatAPI("gpt", cache=Path("unused"))
    with pytest.raises(PrefoptError, match="variable MY_KEY is not set; expected the API key"):
        make(key_variable="MY_KEY")
    for key in (KEY, "gsk_" + KEY[8:]):  # the key where its variable's name belongs
        with pytest.raises(PrefoptError, match="key_variable") as failure:
            make(key_variable=key)
        assert KEY[8:] not in str(failure.value)
    monkeypatch.setenv("MY_KEY", "two words")
    with pytest.raises(PrefoptError, match="MY_KEY holds spaces") as failure:
        ChatAPI("gpt", key_variable="MY_KEY", cache=Path("unused"))
    assert "two words" not in str(failure.value)


@pytest.mark.parametrize(
    "base_url",
    [
        "http://user:hunter2@127.0.0.1/v1",
        "user:hunter2@127.0.0.1/v1",
        "http://127.0.0.1/v1?key=hunter2",
        "127.0.0.1:8000/v1",
        "ftp://127.0.0.1/v1",
        "http://127.0.0.1:99999/v1",
        "http://xn--/v1",
        "http://",
    ],
)
def test_bad_addresses(make: Callable[..., ChatAPI], base_url: str) -> None:
    with pytest.raises(PrefoptError, match=r"base_url .*expected one like") as failure:
        make(base_url=base_url)
    assert "hunter2" not in str(failure.value)


def test_bad_numbers(make: Callable[..., ChatAPI]) -> None:
    for wrong in ({"concurrency": 0}, {"attempts": 0}, {"timeout": 0}):
        with pytest.raises(PrefoptError, match="expected at least 1"):
            make(**wrong)


def test_nothing_to_ask(server: FakeChatAPI, make: Callable[..., ChatAPI]) -> None:
    assert make().ask([]) == []
    assert not server.bodies


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1"),
        ("HTTP_PROXY", "hunter2://x:hunter2@y"),
        ("HTTP_PROXY", "http://[::1"),
        ("SSL_CERT_FILE", "/no/such/file.pem"),
    ],
)
def test_bad_settings_of_proxies_and_certificates(
    make: Callable[..., ChatAPI], monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv(variable, value)
    with pytest.raises(PrefoptError, match="settings of proxies or certificates") as failure:
        make(base_url="http://192.0.2.1/v1", attempts=1).ask(questions(1))
    assert "hunter2" not in str(failure.value)


def test_a_full_disk_leaves_whole_lines(
    server: FakeChatAPI, make: Callable[..., ChatAPI], tmp_path: Path
) -> None:
    cache = tmp_path / "cache.jsonl"
    make().ask(questions(3))
    whole, limits = cache.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    # the kernel takes a part of what goes beyond the limit, as a full disk does
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, limits[1]))
    try:
        with pytest.raises(PrefoptError, match=r"cache.jsonl: an answer cannot be written"):
            make().ask(questions(6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert cache.read_bytes() == whole
    api = make()
    assert len(api.ask(questions(6))) == 6
    assert (api.usage.cached, len(lines(cache))) == (3, 6)
