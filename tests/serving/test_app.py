"""What the server answers."""

import json
import socket
import time

import pytest
import torch
from serving.conftest import served

from nnx_cli.config import SampleConfig
from nnx_cli.data.conversations import Message, template_of
from nnx_cli.data.tokenizers.build import build_tokenizer
from nnx_cli.inference.generate import generate

BYTES = build_tokenizer("byte")


def sampled(client, prompt, tokenizer=BYTES, stops=(), **config):
    """What `nnx sample` writes."""
    ids = tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else prompt
    found = generate(client.engine.model, tokenizer, [ids], SampleConfig(**config), stops=stops)
    return [sample.text for sample in found.samples]


def until(condition, seconds=20):
    """Wait for something."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_greedy_text_is_that_of_sample(server):
    answer = server.write(prompt="The cat", max_tokens=60, temperature=0)
    assert answer.status == 200, answer.body
    (choice,) = answer.json["choices"]
    assert [choice["text"]] == sampled(server, "The cat", greedy=True, max_new_tokens=60)
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None and answer.json["model"] == "tiny"
    assert answer.json["usage"] == {"prompt_tokens": 7, "completion_tokens": 60, "total_tokens": 67}


def test_drawn_text_is_that_of_sample_with_that_seed(server):
    ways = dict(temperature=0.9, top_p=0.95, top_k=40, min_p=0.01, repetition_penalty=1.1, seed=7)
    choices = server.write(prompt="The cat", max_tokens=40, n=3, **ways).json["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert [choice["text"] for choice in choices] == sampled(
        server, "The cat", num_samples=3, max_new_tokens=40, **ways
    )
    unseeded = {server.write(prompt="The", max_tokens=20).json["choices"][0]["text"] for _ in range(3)}
    assert len(unseeded) == 3


def test_a_stream_has_the_same_text(server):
    asked = dict(prompt=["The cat", "A dog"], max_tokens=50, n=2, seed=3)
    whole = server.write(**asked).json["choices"]
    streamed = server.write(**asked, stream=True, stream_options={"include_usage": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *events, usage = streamed.events
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 200
    for choice in whole:
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(each["text"] for each in own) == choice["text"]
        assert [each["finish_reason"] for each in own] == [None] * (len(own) - 1) + ["length"]
    assert len({event["id"] for event in [*events, usage]}) == 1


def test_text_is_streamed_as_it_is_written(server):
    """Not when all of it is there."""
    connection = socket.create_connection((server.host, server.port))
    body = json.dumps({"prompt": "a", "max_tokens": 1000, "stream": True}).encode()
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    connection.recv(2000)
    until(lambda: b"data:" in connection.recv(2000))
    assert server.engine.working, "it is still being written"
    connection.close()


@pytest.mark.parametrize("stop", ["e", ["zz", "e"], "the end"])
def test_text_ends_before_a_stop(server, stop):
    plain = sampled(server, "ab", temperature=1.0, seed=5, max_new_tokens=300)[0]
    stops = [stop] if isinstance(stop, str) else stop
    answer = server.write(prompt="ab", max_tokens=300, seed=5, stop=stop).json["choices"][0]
    ends = min((plain.find(each) for each in stops if each in plain), default=len(plain))
    assert answer["text"] == plain[:ends] and answer["finish_reason"] == ("stop" if ends < len(plain) else "length")
    events = server.write(prompt="ab", max_tokens=300, seed=5, stop=stop, stream=True).events
    assert "".join(event["choices"][0]["text"] for event in events) == plain[:ends]


def test_logprobs_are_those_of_the_model(server):
    asked = dict(prompt="abc", max_tokens=12, temperature=0.7, seed=1, logprobs=3)
    choice = server.write(**asked).json["choices"][0]
    found = choice["logprobs"]
    ids = [*b"abc", *(token for text in found["tokens"] for token in as_bytes(text))]
    with torch.no_grad():
        expected = server.engine.model(torch.tensor([ids[:-1]])).log_softmax(2)[0, 2:]
    assert found["token_logprobs"] == pytest.approx(
        [float(expected[n, token]) for n, token in enumerate(ids[3:])], abs=1e-4
    )
    assert all(
        len(top) == 3 and list(top.values()) == sorted(top.values(), reverse=True) for top in found["top_logprobs"]
    )
    assert found["text_offset"] == sorted(found["text_offset"]) and found["text_offset"][0] == 0
    streamed = [event["choices"][0]["logprobs"] for event in server.write(**asked, stream=True).events]
    assert [token for each in streamed if each for token in each["tokens"]] == found["tokens"]
    assert server.write(prompt="abc", max_tokens=2, logprobs=0).json["choices"][0]["logprobs"]["top_logprobs"] == [
        {},
        {},
    ]


def as_bytes(text):
    return bytes.fromhex(text.removeprefix("bytes:").replace("\\x", "")) if text.startswith("bytes:") else text.encode()


def test_prompts_may_be_texts_or_ids(server):
    greedy = dict(max_tokens=10, temperature=0)
    (text,) = (choice["text"] for choice in server.write(prompt="abc", **greedy).json["choices"])
    for prompt in (["abc"], [97, 98, 99], [[97, 98, 99]]):
        assert [choice["text"] for choice in server.write(prompt=prompt, **greedy).json["choices"]] == [text]
    assert server.write(**greedy).json["choices"][0]["text"] == sampled(server, [10], greedy=True, max_new_tokens=10)[0]


def test_models_and_health(server):
    assert [model["id"] for model in server.ask("/v1/models").json["data"]] == ["tiny"]
    health = server.ask("/health")
    assert health.status == 200 and health.json["rows"] == 4 and health.json["answering"] == 0 == health.json["waiting"]
    assert server.write(model="tiny", max_tokens=1).status == 200


@pytest.mark.parametrize(
    ("status", "words", "asked"),
    [
        (422, "max_tokens is 10,000,000; up to 1,000", {"max_tokens": 10_000_000}),
        (422, "max_tokens", {"max_tokens": 0}),
        (422, "max_tokens", {"max_tokens": "many"}),
        (422, "n: ", {"n": 0}),
        (422, "answers at once", {"n": 9}),
        (422, "n: ", {"n": 10**9}),
        (422, "echo", {"echo": True}),
        (422, "logit_bias", {"logit_bias": {}}),
        (422, "temperature", {"temperature": -1}),
        (422, "temperature", {"temperature": 1e999}),
        (422, "top_p", {"top_p": 0}),
        (422, "seed", {"seed": -1}),
        (422, "seed", {"seed": 2**63}),
        (422, "logprobs", {"logprobs": 21}),
        (422, "stop: up to 16", {"stop": ["x"] * 17}),
        (422, "stop: up to 16", {"stop": "x" * 1001}),
        (422, "prompt", {"prompt": {"a": 1}}),
        (422, "prompt", {"prompt": []}),
        (422, "not below 256", {"prompt": [256]}),
        (422, "not below 256", {"prompt": [[1], [-1]]}),
        (422, "not below 256", {"prompt": [10**30]}),
        (413, "101 tokens; up to 100", {"prompt": "x" * 101}),
        (413, "101 tokens", {"prompt": ["x", "y" * 101]}),
        (404, "no model 'gpt'", {"model": "gpt"}),
    ],
    ids=str,
)
def test_what_is_refused(server, status, words, asked):
    answer = server.ask("/v1/completions", json.dumps({"max_tokens": 1} | asked).encode())
    assert answer.status == status, answer.body
    assert words in answer.json["error"]["message"] and len(answer.body) < 1000
    assert answer.json["error"]["param"] == (None if words == "answers at once" else next(iter(asked)))
    assert not server.engine.working and not server.engine.waiting


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"prompt": "\\ud800"}', b'{"a":' * 50_000, b"\x00" * 99],
    ids=range(9),
)
def test_bodies_that_are_none(server, body):
    answer = server.ask("/v1/completions", body)
    assert answer.status == 422 and "message" in answer.json["error"] and len(answer.body) < 1000


def test_a_body_that_is_too_long(server):
    for size in (4 * 2**20 + 1, 10_000_000):
        answer = server.ask("/v1/completions", b'{"prompt": "' + b"x" * size + b'"}')
        assert answer.status == 413 and "4,194,304 bytes at most" in answer.json["error"]["message"]
    assert server.write(max_tokens=1).status == 200


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/nothing", "GET", 404),
        ("/v1/completions", "GET", 405),
        ("/v1/chat/completions", "POST", 404),
        ("/docs", "GET", 404),
        ("/openapi.json", "GET", 404),
    ],
)
def test_addresses_that_there_are_not(server, path, method, status):
    assert server.ask(path, b"{}" if method == "POST" else None, method).status == status


def test_more_than_may_wait_is_sent_away(server):
    slow = [Held(server, max_tokens=900) for _ in range(8)]
    until(lambda: len(server.engine.working) == 4 and len(server.engine.waiting) == 4)
    answer = server.write(max_tokens=1)
    assert (
        answer.status == 429 and answer.headers["retry-after"] == "1" and "too many" in answer.json["error"]["message"]
    )
    assert server.ask("/health").json["waiting"] == 4
    for each in slow:
        each.leave()
    until(lambda: not server.engine.working and not server.engine.waiting)
    assert server.write(max_tokens=1).status == 200


class Held:
    """A request whose answer nobody reads yet."""

    def __init__(self, server, path="/v1/completions", **asked):
        self.connection = socket.create_connection((server.host, server.port))
        body = json.dumps(asked).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        self.connection.sendall(head.encode() + body)

    def leave(self):
        self.connection.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_goes_away_frees_its_rows(byte_model, stream, n):
    with served(byte_model, BYTES, max_new_tokens=10**6) as server:
        held = Held(server, max_tokens=10**6, stream=stream, n=n)
        until(lambda: len(server.engine.working) == n)
        held.leave()
        until(lambda: not server.engine.working)
        assert server.write(max_tokens=5, n=4).status == 200


def test_what_is_closed_ends_properly(byte_model):
    with served(byte_model, BYTES, max_new_tokens=10**6) as server:
        held = [Held(server, max_tokens=10**6, stream=stream, n=2) for stream in (True, False)]
        until(lambda: len(server.engine.working) == 4)
        server.engine.close()
        for each, end in zip(held, (b"data: [DONE]", b'"finish_reason":"length"'), strict=True):
            text = b""
            while end not in text:
                part = each.connection.recv(65536)
                assert part, text[-300:]
                text += part
        assert server.write(max_tokens=1).status == 503 and server.ask("/health").status == 503
        for each in held:
            each.leave()


@pytest.mark.parametrize("method", ["trunk", "make_cache"])
def test_a_model_that_runs_out_of_memory_says_so_and_goes_on(byte_model, monkeypatch, method):
    def run_out(*_, **__):
        raise torch.OutOfMemoryError("no room")

    with served(byte_model, BYTES) as server:
        monkeypatch.setattr(byte_model, method, run_out)
        answers = [server.write(prompt="ab", max_tokens=5), server.write(prompt="ab", max_tokens=5, stream=True)]
        assert answers[0].status == 503 and "out of memory" in answers[0].json["error"]["message"]
        assert b"out of memory" in answers[1].body
        monkeypatch.undo()
        assert server.write(prompt="ab", max_tokens=5).status == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_mistake_of_ours_ends_the_server_and_says_so(byte_model, monkeypatch):
    def fail(*_, **__):
        raise TypeError("a mistake")

    with served(byte_model, BYTES) as server:
        monkeypatch.setattr(byte_model, "trunk", fail)
        assert server.write(prompt="ab", max_tokens=5).status == 503
        until(lambda: not server.engine.thread.is_alive())
        assert server.write(max_tokens=1).status == 503 and server.ask("/health").status == 503


# chats


def test_a_chat_is_what_the_template_makes_of_it(chat_server):
    tokenizer = chat_server.engine.tokenizer
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|end|>"}]
    asked = dict(messages=messages, max_tokens=30, temperature=0)
    answer = chat_server.ask("/v1/chat/completions", asked)
    assert answer.status == 200, answer.body
    (choice,) = answer.json["choices"]
    ids = template_of(tokenizer).prompt([Message(**message) for message in messages])
    assert [choice["message"]["content"]] == sampled(chat_server, ids, tokenizer, greedy=True, max_new_tokens=30)
    assert choice["message"]["role"] == "assistant" and answer.json["object"] == "chat.completion"
    events = chat_server.ask("/v1/chat/completions", asked | {"stream": True}).events
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == choice["message"]["content"]


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ("roles are out of order", [{"role": "assistant", "content": "a"}]),
        ("roles are out of order", [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]),
        ("out of order", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        ("messages", []),
        ("role", [{"role": "tool", "content": "a"}]),
        ("content", [{"role": "user", "content": [{"type": "text", "text": "a"}]}]),
        ("content", [{"role": "user"}]),
    ],
    ids=range(7),
)
def test_conversations_that_are_none(chat_server, words, messages):
    answer = chat_server.ask("/v1/chat/completions", {"messages": messages, "max_tokens": 1})
    assert answer.status == 422 and words in answer.json["error"]["message"], answer.body
    assert answer.json["error"]["param"] == "messages"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_the_field_of_a_chat_that_is_wrong(chat_server, field):
    asked = {"messages": [{"role": "user", "content": "a"}], field: 10**7}
    error = chat_server.ask("/v1/chat/completions", asked).json["error"]
    assert error["param"] == field and error["message"].startswith(f"{field} is 10,000,000")


def test_chats_have_logprobs(chat_server):
    asked = dict(messages=[{"role": "user", "content": "Hi"}], max_tokens=5, logprobs=True, top_logprobs=2)
    content = chat_server.ask("/v1/chat/completions", asked).json["choices"][0]["logprobs"]["content"]
    assert content and all(len(each["top_logprobs"]) == 2 and each["logprob"] <= 0 for each in content)
    refused = chat_server.ask("/v1/chat/completions", asked | {"logprobs": False})
    assert refused.status == 422 and "needs logprobs" in refused.json["error"]["message"]


def test_a_model_without_a_tokenizer_reads_and_writes_ids(byte_model):
    with served(byte_model, None) as server:
        assert server.write(prompt="abc", max_tokens=2).status == 422
        answer = server.write(prompt=[5, 6], max_tokens=4, temperature=0, logprobs=1)
        (choice,) = answer.json["choices"]
        assert [choice["text"]] == [
            sample.text
            for sample in generate(byte_model, None, [[5, 6]], SampleConfig(greedy=True, max_new_tokens=4)).samples
        ]
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert server.write(max_tokens=2).status == 200, "it begins as its text does"
