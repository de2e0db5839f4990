"""The HTTP interface on a stand-in engine: answers, errors, limits, faults."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time

import httpx
import openai
import pytest

from megakda.data.tokenizer import ByteTokenizer
from megakda.errors import MegakdaError
from megakda.inference.chat import load_template
from megakda.inference.request import SamplingParams, Update
from megakda.serving.answers import CompletionAnswer, Prompt, TokenTexts
from megakda.serving.generation import GeneratedResponse
from megakda.serving.loop import EngineLoop, ShuttingDown
from megakda.serving.metrics import Metrics
from megakda.serving.protocol import CompletionRequest, read
from tests.serving.standin import KEY, StandIn, idle, left_behind, serving, wait_until

TEMPLATE = """
{%- for message in messages %}
{%- if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
<{{ message.role }}>{{ message.content }}
{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}
"""
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def server():
    engine = StandIn()
    template = load_template(engine.tokenizer, TEMPLATE)
    with serving(engine, max_queue=8, template=template, max_body=20_000) as server:
        yield server
        wait_until(lambda: idle(server))


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        yield client


def post(server, body, path="/v1/completions", **kwargs):
    if not isinstance(body, (bytes, str)):
        body = json.dumps(body)
    with httpx.Client(trust_env=False, timeout=20) as client:
        return client.post(server.url + path, content=body, **kwargs)


def get(server, path, **kwargs):
    with httpx.Client(trust_env=False, timeout=20) as client:
        return client.get(server.url + path, **kwargs)


def offline(server, prompt, **fields):
    params = SamplingParams(**fields)
    return server.engine.generate([list(prompt.encode())], [params])[0]


def metric(server, name):
    lines = get(server, "/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


# ------------------------------------------------------------------ answers


def test_completions_are_those_of_the_engine(server, client):
    found = client.completions.create(
        model="tiny", prompt=["ab", "cd"], n=2, seed=5, max_tokens=20, stop=["zz"]
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    for choice, (prompt, seed) in zip(
        found.choices, [("ab", 5), ("ab", 6), ("cd", 5), ("cd", 6)], strict=True
    ):
        same = offline(server, prompt, seed=seed, max_tokens=20, stop=("zz",))
        assert (choice.text, choice.finish_reason) == (same.text, same.finish_reason)
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 80, 84)


def test_streams_are_the_whole_answer_in_pieces(server, client):
    fields = {"model": "tiny", "prompt": "ab", "n": 3, "seed": 1, "max_tokens": 40, "echo": True}
    fields |= {"logprobs": 2, "stop": ["q", "e "], "extra_body": {"return_token_ids": True}}
    whole = client.completions.create(**fields)
    options = {"include_usage": True}
    *pieces, last = client.completions.create(**fields, stream=True, stream_options=options)
    assert last.usage == whole.usage and last.choices == []
    assert all(piece.usage is None and piece.id == last.id for piece in pieces)
    for index, wanted in enumerate(whole.choices):
        mine = [p.choices[0] for p in pieces if p.choices[0].index == index]
        assert "".join(c.text for c in mine) == wanted.text
        assert [c.finish_reason for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == wanted.finish_reason
        assert sum([c.token_ids for c in mine], []) == wanted.token_ids
        assert mine[0].prompt_token_ids == wanted.prompt_token_ids == [97, 98]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = sum([getattr(c.logprobs, name) for c in mine], [])
            assert joined == getattr(wanted.logprobs, name)
        assert wanted.text.startswith("ab") and wanted.logprobs.tokens[:2] == ["a", "b"]
        assert wanted.logprobs.token_logprobs[:2] == [None, -9.8]
        assert wanted.logprobs.text_offset[:3] == [0, 1, 2]


def test_token_prompts_and_scores_alone(server):
    body = {"prompt": [[97, 98, 99], [100]], "max_tokens": 0, "echo": True, "logprobs": 1}
    found = post(server, body).json()
    assert [c["text"] for c in found["choices"]] == ["abc", "d"]
    assert [c["logprobs"]["token_logprobs"] for c in found["choices"]] == [
        [None, -9.8, -9.9],
        [None],
    ]
    assert found["usage"]["completion_tokens"] == 0


def test_chat(server, client):
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    fields = {"model": "tiny", "messages": messages, "seed": 3, "max_completion_tokens": 12}
    prompt = "<system>be kind\n<user>hi\n<assistant>"
    same = offline(server, prompt, seed=3, max_tokens=12)
    whole = client.chat.completions.create(
        **fields, logprobs=True, top_logprobs=2, extra_body={"return_token_ids": True}
    )
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content) == ("assistant", same.text)
    assert whole.prompt_token_ids == list(prompt.encode()) and choice.token_ids == same.tokens
    scores = choice.logprobs.content
    assert len(scores) == 12 and [len(s.top_logprobs) for s in scores] == [2] * 12
    assert scores[0].logprob == -9999.0 and scores[0].top_logprobs[0].bytes == [97]
    pieces = list(client.chat.completions.create(**fields, stream=True))
    assert "".join(p.choices[0].delta.content for p in pieces) == same.text
    assert [p.choices[0].delta.role for p in pieces[:2]] == ["assistant", None]
    # An answer goes back as part of the next question, as the client library holds it.
    again = client.chat.completions.create(
        model="tiny", messages=[*messages, choice.message, messages[1]], max_tokens=1
    )
    assert again.usage.prompt_tokens > whole.usage.prompt_tokens


def test_a_chat_uses_what_is_left_of_the_context(server):
    found = post(server, CHAT, "/v1/chat/completions").json()
    assert found["usage"]["total_tokens"] == server.service.limits.max_context


def test_the_chat_template_refuses(server):
    body = {"messages": [{"role": "tool", "content": "x"}]}
    found = post(server, body, "/v1/chat/completions")
    assert found.status_code == 400 and "no tools here" in found.json()["error"]["message"]


def test_models(server, client):
    (model,) = client.models.list()
    assert model.id == "tiny" and client.models.retrieve("tiny").max_model_len == 128
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        ({"prompt": "x", "unknown": 1}, 400, "unknown_parameter"),
        ({"prompt": "x", "max_tokens": "5"}, 400, "invalid_type"),
        ({"prompt": "x", "presence_penalty": 1}, 400, "invalid_value"),
        ({"prompt": ""}, 400, "invalid_value"),
        ({"prompt": [1000]}, 400, "invalid_value"),
        ({"prompt": "refuse"}, 400, "invalid_value"),
        ({"prompt": "refuse", "stream": True}, 400, "invalid_value"),
        ({"prompt": "x" * 120, "max_tokens": 9}, 400, "context_length_exceeded"),
        ({"prompt": "x", "model": "gpt"}, 404, "model_not_found"),
        ({"prompt": "x" * 20_000}, 413, "body_too_large"),
    ],
)
def test_wrong_requests(server, body, status, code):
    found = post(server, body)
    error = found.json()["error"]
    assert (found.status_code, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_number_beyond_all_tensors_stops_nothing(server):
    for stream in (False, True):
        found = post(server, {"prompt": "x", "top_k": 10**400, "stream": stream})
        assert found.status_code == 400 and found.json()["error"]["param"] == "top_k"
        assert len(found.text) < 300
    assert post(server, {"prompt": "x", "top_k": 2**31 - 1, "max_tokens": 2}).status_code == 200
    assert get(server, "/health").json()["status"] == "ok"


@pytest.mark.parametrize("path", ["/nothing", "/v1/nothing", "/v1/../etc"])
def test_unknown_routes(server, path):
    found = post(server, {}, path)
    assert found.status_code == 404 and found.json()["error"]["code"] == "unknown_route"


def test_wrong_method(server):
    found = get(server, "/v1/completions")
    assert found.status_code == 405 and found.headers["allow"] == "POST"
    assert found.json()["error"]["code"] == "method_not_allowed"


def test_bodies_without_a_length_are_counted(server):
    def parts():
        for _ in range(40):
            yield b" " * 1000

    with httpx.Client(trust_env=False, timeout=20) as client:
        found = client.post(f"{server.url}/v1/completions", content=parts())
    assert found.status_code == 413 and found.json()["error"]["code"] == "body_too_large"


def test_a_very_large_body_gets_its_answer(server):
    """The client is still sending when the answer comes, and must see it all the same."""
    found = post(server, b" " * 20_000_000)
    assert found.status_code == 413
    assert post(server, {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_no_template():
    with serving(StandIn()) as server:
        found = post(server, CHAT, "/v1/chat/completions")
        assert found.status_code == 400
        assert found.json()["error"]["code"] == "no_chat_template"


def test_keys():
    with serving(StandIn(), api_key=KEY) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
            for found in (
                get(server, "/v1/models", headers=headers),
                post(server, b"{", headers=headers),
                post(server, b" " * 10_000_000, headers=headers),
            ):
                assert found.status_code == 401
                assert found.json()["error"]["code"] == "invalid_api_key"
                assert KEY not in found.text
        right = {"Authorization": f"Bearer {KEY}"}
        assert get(server, "/v1/models", headers=right).status_code == 200
        found = post(server, {"prompt": "x", "max_tokens": 2}, headers=right)
        assert found.status_code == 200
        assert [get(server, path).status_code for path in ("/health", "/metrics")] == [200, 200]


def test_slow_bodies():
    with serving(StandIn(), body_seconds=0.2) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert server.loop.open == 0


# ------------------------------------------------------------------ queue, time, leaving


def test_queue_overflow():
    engine = StandIn(max_sequences=2)
    with serving(engine, max_queue=2) as server:
        engine.gate.clear()
        tickets = server.loop.submit(
            [([97], SamplingParams(max_tokens=3, seed=0))] * 4, lambda index, item: None
        )
        found = post(server, {"prompt": "x"})
        assert (found.status_code, found.headers["retry-after"]) == (429, "1")
        assert found.json()["error"]["code"] == "queue_full"
        assert metric(server, "megakda_requests_waiting") == 4  # the first step has not ended
        server.loop.cancel(tickets[:1])
        engine.gate.set()
        assert post(server, {"prompt": "x"}).status_code == 200
        wait_until(lambda: idle(server))
        # More than could ever fit is the client's mistake, not a matter of waiting.
        assert post(server, {"prompt": ["x"] * 5}).status_code == 400


def test_answers_that_take_too_long():
    engine = StandIn(step_seconds=0.02, max_context=10_000)
    with serving(engine, request_seconds=0.3, max_context=10_000) as server:
        body = {"prompt": "x", "max_tokens": 5000}
        found = post(server, body)
        assert found.status_code == 504
        assert found.json()["error"]["code"] == "request_timeout"
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
            pytest.raises(openai.APIError, match="took longer than 0.3 seconds"),
        ):
            pieces = list(client.completions.create(**body, model="tiny", stream=True))
            assert len(pieces) > 2
        wait_until(lambda: idle(server))
        assert metric(server, 'megakda_cut_streams_total{reason="request_timeout"}') == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("abrupt", [False, True])
def test_clients_that_leave_free_their_slots(stream, abrupt):
    """Whether running or still waiting; with a normal end of the connection and with a reset."""
    engine = StandIn(max_sequences=2, step_seconds=0.005, max_context=100_000)
    with serving(engine, max_context=100_000) as server:
        body = json.dumps({"prompt": "x", "max_tokens": 90_000, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connections = []
        for _ in range(4):
            connection = socket.create_connection(("127.0.0.1", server.port))
            connection.sendall(head.encode() + body)
            connections.append(connection)
        wait_until(lambda: server.loop.open == 4 and server.loop.stats.running == 2)
        if stream:
            assert connections[0].recv(1000).startswith(b"HTTP/1.1 200 ")
        for connection in connections:
            if abrupt:
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.close()
        wait_until(lambda: idle(server))
        assert engine.generated < 10_000
        assert post(server, {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_client_that_does_not_read_is_dropped():
    engine = StandIn(max_sequences=1, max_context=10**7)
    with serving(engine, max_context=10**7, request_seconds=1.0) as server:
        body = json.dumps({"prompt": "x", "max_tokens": 9_000_000, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(f"{head}\r\n".encode() + body)
            wait_until(lambda: server.loop.open == 1)
            wait_until(lambda: idle(server))


def test_a_fast_engine_leaves_time_for_others():
    """A stream whose pieces are all there at once lets the event loop turn between them."""

    class Loop:
        def submit(self, requests, deliver):
            for token in range(200):
                deliver(0, Update(0, (97,), "a", finish_reason="length" if token == 199 else None))
            return [0]

        def cancel(self, tickets):
            pass

    async def answer():
        turns, sent = 0, []

        async def turn():
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        async def send(message):  # as uvicorn's, which does not wait while the client reads
            sent.append(turns)

        others = asyncio.ensure_future(turn())
        asked = read(CompletionRequest, b'{"prompt": "x", "stream": true}')
        tokenizer = ByteTokenizer()
        body = CompletionAnswer("m", asked, [Prompt([1])], tokenizer, TokenTexts(tokenizer))
        loop = Loop()
        requests = [([1], SamplingParams())]
        response = GeneratedResponse(body, loop, requests, Metrics(EngineLoop(StandIn(), 1)), 60)
        await response({"type": "http"}, asyncio.Event().wait, send)
        others.cancel()
        return sent

    sent = asyncio.run(answer())
    assert len(sent) == 202 and len(set(sent)) >= 200


# ------------------------------------------------------------------ faults of the server's own


def test_a_failed_engine():
    engine = StandIn(max_sequences=1, step_seconds=0.01, max_context=10_000)
    with serving(engine, max_context=10_000) as server:
        assert get(server, "/health").json()["status"] == "ok"
        url = f"{server.url}/v1/completions"
        body = {"prompt": "x", "max_tokens": 9000, "stream": True}
        with (
            httpx.Client(trust_env=False, timeout=20) as client,
            client.stream("POST", url, json=body) as running,
        ):
            lines = running.iter_lines()
            next(lines)
            waiting = server.loop.submit([([97], SamplingParams())], lambda index, item: None)
            assert waiting
            engine.fault = RuntimeError("a secret path")
            *_, last = (line for line in lines if line)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
        found = post(server, {"prompt": "x"})
        assert found.status_code == 500
        assert found.json()["error"]["type"] == "server_error"
        assert "RuntimeError" in found.text and "secret" not in found.text
        health = get(server, "/health")
        assert health.status_code == 503 and health.json()["status"] == "failed"
        assert metric(server, "megakda_healthy") == 0
        assert server.loop.open == 0
        wait_until(lambda: not left_behind())


def test_an_engine_that_fails_before_the_first_token():
    engine = StandIn()
    with serving(engine) as server:
        engine.fault = MegakdaError("the model's logits are not finite")
        for stream in (True, False):
            found = post(server, {"prompt": "x", "stream": stream})
            assert found.status_code == 500 and "not finite" in found.json()["error"]["message"]


def test_a_stuck_engine_is_not_healthy():
    engine = StandIn()
    with serving(engine, request_seconds=0.1) as server:
        engine.gate.clear()
        assert post(server, {"prompt": "x"}).status_code == 504
        time.sleep(0.05)
        health = get(server, "/health")
        assert health.status_code == 503 and health.json()["status"] == "stuck"
        engine.gate.set()
        wait_until(lambda: idle(server))
        assert get(server, "/health").status_code == 200


def test_a_server_that_shuts_down():
    engine = StandIn(step_seconds=0.01, max_context=10_000)
    with serving(engine, max_context=10_000) as server:
        body = {"prompt": "x", "max_tokens": 9000, "stream": True}
        with (
            httpx.Client(trust_env=False, timeout=20) as client,
            client.stream("POST", f"{server.url}/v1/completions", json=body) as running,
        ):
            lines = running.iter_lines()
            next(lines)
            server.loop.drain()
            found = post(server, {"prompt": "x"})
            assert found.status_code == 503 and found.json()["error"]["code"] == "shutting_down"
            assert json.loads(next(line for line in lines if line).removeprefix("data: "))
            server.loop.fail_open(ShuttingDown("the server is shutting down"))
            *_, last = (line for line in lines if line)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        wait_until(lambda: idle(server))


def test_metrics(server):
    before = metric(server, "megakda_generated_tokens_total")
    first = metric(server, "megakda_time_to_first_token_seconds_count")
    each = metric(server, "megakda_time_per_output_token_seconds_count")
    asked = 'megakda_requests_total{route="/v1/completions",status="200"}'
    requests = metric(server, asked)
    assert post(server, {"prompt": "x", "max_tokens": 5, "n": 2}).status_code == 200
    assert metric(server, "megakda_generated_tokens_total") == before + 10
    assert metric(server, "megakda_time_to_first_token_seconds_count") == first + 2
    assert metric(server, "megakda_time_per_output_token_seconds_count") == each + 2
    assert metric(server, asked) == requests + 1
    post(server, {}, "/made/up")
    assert metric(server, 'megakda_requests_total{route="other",status="404"}') >= 1
    assert "made" not in get(server, "/metrics").text
