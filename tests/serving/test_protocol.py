"""Request bodies and answers, without a server."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakda.data.tokenizer import ByteTokenizer
from megakda.inference.request import TokenLogprob, Update
from megakda.serving.answers import CompletionAnswer, Prompt, TokenTexts
from megakda.serving.options import parse_size
from megakda.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Limits,
    check_prompt,
    fit_context,
    read,
)

LIMITS = Limits(max_context=64, vocab_size=320, max_choices=4, max_requests=8)


def completion(**fields):
    return read(CompletionRequest, json.dumps({"prompt": "x", **fields}).encode())


def chat(**fields):
    fields = {"messages": [{"role": "user", "content": "x"}], **fields}
    return read(ChatRequest, json.dumps(fields).encode())


def refused(kind, **fields):
    with pytest.raises(ApiError) as info:
        asked = kind(**fields)
        asked.check(LIMITS)
        asked.sampling(1, None)
    assert info.value.status == 400
    return info.value.error


@pytest.mark.parametrize(
    ("given", "prompts"),
    [("ab", ["ab"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_forms_of_prompts(given, prompts):
    assert completion(prompt=given).prompt == prompts


@pytest.mark.parametrize("given", [None, 7, [], {}, ["a", 1], [[1], "a"], [1, True], [[1.0]]])
def test_other_prompts(given):
    error = refused(completion, prompt=given)
    assert error["param"] == "prompt" and "list of token ids" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temprature": 1}, "temprature", "Unrecognized request argument supplied: temprature"),
        ({"temperature": "1"}, "temperature", "expected a number, but got '1'"),
        ({"temperature": -1}, "temperature", "temperature=-1.0 must be a finite number"),
        ({"top_p": 0}, "top_p", "top_p=0.0 must be in (0, 1]"),
        ({"min_p": 1}, "min_p", "min_p=1.0 must be in [0, 1)"),
        ({"top_k": -1}, "top_k", "top_k=-1 must be in 0..2^31-1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "in 0.01..100"),
        ({"max_tokens": 1.5}, "max_tokens", "expected an integer, but got 1.5"),
        ({"max_tokens": True}, "max_tokens", "expected an integer, but got True"),
        ({"n": 0}, "n", "n=0 must be in 1..4"),
        ({"n": 5}, "n", "n=5 must be in 1..4"),
        ({"seed": -1}, "seed", "seed=-1 must be in 0..2^63-n"),
        ({"seed": 2**63 - 1, "n": 2}, "seed", "must be in 0..2^63-n"),
        ({"stop": 1}, "stop", "a list of strings"),
        ({"stop": ["a", 1]}, "stop", "a list of strings"),
        ({"stop": ""}, "stop", "texts that are not empty"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop_token_ids": [320]}, "stop_token_ids", "0..319"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids", "has 65 ids; at most 64"),
        ({"presence_penalty": 0.5}, "presence_penalty", "use repetition_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty", "use repetition_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "Unrecognized"),
    ],
)
@pytest.mark.parametrize("kind", [completion, chat])
def test_fields_of_both(kind, fields, param, message):
    error = refused(kind, **fields)
    assert error["param"] == param and message in error["message"]


@pytest.mark.parametrize(
    "name", ["top_k", "n", "seed", "stop_token_ids", "best_of", "logprobs", "max_tokens", "prompt"]
)
def test_huge_numbers_are_not_sent_back(name):
    """Up to the 4300 digits that JSON numbers may have here, and Python would write out."""
    huge = 10**4299
    asked = completion(**{name: [huge] if name in ("stop_token_ids", "prompt") else huge})
    with pytest.raises(ApiError) as info:
        asked.check(LIMITS)
        check_prompt(asked.prompt[0] if name == "prompt" else [1], "prompt", LIMITS)
        fit_context(1, asked.max_tokens, 16, "max_tokens", LIMITS)
        asked.sampling(1, None)
    error = info.value.error
    assert error["param"] == name and "1000" in error["message"] and len(error["message"]) < 250


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt": ["x"] * 3, "n": 3}, "prompt"),
        ({"messages": []}, "messages"),
    ],
)
def test_fields_of_completions(fields, param):
    assert refused(completion, **fields)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "", "x": 1}]}, "messages[0].x"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_fields_of_chats(fields, param):
    assert refused(chat, **fields)["param"] == param


def test_null_is_the_default():
    names = set(CompletionRequest.model_fields) - {"prompt"}
    assert completion(**dict.fromkeys(names)) == completion()
    names = set(ChatRequest.model_fields) - {"messages"}
    assert chat(**dict.fromkeys(names)) == chat()


def test_parts_of_a_message_are_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "ab"


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_other_body_is_refused(body):
    with pytest.raises(ApiError) as info:
        read(CompletionRequest, body)
    assert info.value.status == 400
    json.dumps(info.value.body)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"prompt": "\\ud800"}', "invalid_json"),
        (b"[]", "invalid_type"),
        (b"{}", "missing_required_parameter"),
        (b'{"prompt": "x", "temperature": NaN}', "invalid_value"),
        (b'{"prompt": "x", "temperature": 1e999}', "invalid_value"),
        (b'{"prompt": "x", "seed": 1, "prompt": "x"}', "duplicate_parameter"),
        (b'{"prompt": "x", "logit_bias": {"1": 0, "\\u0031": 0}}', "duplicate_parameter"),
    ],
)
def test_bodies(body, code):
    with pytest.raises(ApiError) as info:
        read(CompletionRequest, body)
    assert info.value.error["code"] == code


def test_choices_draw_with_seeds_in_a_row():
    assert [p.seed for p in completion(seed=7, n=3).sampling(1, None)] == [7, 8, 9]
    assert completion(seed=2**63 - 1).sampling(1, None)[0].seed == 2**63 - 1
    drawn = [completion(n=2).sampling(1, None) for _ in range(2)]
    assert drawn[0][1].seed == drawn[0][0].seed + 1 and drawn[0][0].seed != drawn[1][0].seed


def test_sampling_fields_arrive():
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1}
    fields |= {"repetition_penalty": 1.5, "ignore_eos": True}
    (params,) = completion(**fields, stop="x", stop_token_ids=[1]).sampling(5, 2, 3)
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.stop, params.stop_token_ids, params.max_tokens) == (("x",), (1,), 5)
    assert (params.logprobs, params.prompt_logprobs) == (2, 3)


def test_context():
    assert fit_context(10, None, 16, "prompt", LIMITS) == 16
    assert fit_context(60, None, 16, "prompt", LIMITS) == 4  # a default shrinks
    assert fit_context(60, None, None, "messages", LIMITS) == 4
    assert fit_context(64, 0, 16, "prompt", LIMITS) == 0  # only to be scored
    for longest, wanted in [(60, 5), (64, None), (65, 0), (100, None), (10, 10**30)]:
        with pytest.raises(ApiError) as info:
            fit_context(longest, wanted, 16, "prompt", LIMITS)
        assert info.value.error["code"] == "context_length_exceeded", (longest, wanted)
    with pytest.raises(ApiError, match="max_tokens=-1"):
        fit_context(1, -1, 16, "prompt", LIMITS)
    for tokens in ([], [320], [-1]):
        with pytest.raises(ApiError):
            check_prompt(tokens, "prompt", LIMITS)


def test_logprobs_of_parts_of_characters():
    """They are shown by their ids, begin where the character begins, and -inf is a number."""
    tokenizer = ByteTokenizer()
    tokens = list("aé!".encode())
    asked = completion(logprobs=1, echo=True)
    answer = CompletionAnswer("m", asked, [Prompt([65], "A")], tokenizer, TokenTexts(tokenizer))
    scores = [TokenLogprob(t, float("-inf"), 2, ((98, -0.5),)) for t in tokens]
    update = Update(0, tuple(tokens), "aé!", tuple(scores), (None,), 0, "length")
    found = answer.choice(0, update)
    assert found["text"] == "Aaé!"
    assert found["logprobs"]["tokens"] == ["A", "a", "token_id:195", "token_id:169", "!"]
    assert found["logprobs"]["token_logprobs"] == [None, *[-9999.0] * 4]
    assert found["logprobs"]["text_offset"] == [0, 1, 2, 2, 3]
    assert found["logprobs"]["top_logprobs"][1] == {"b": -0.5, "a": -9999.0}
    json.dumps(found, allow_nan=False)


def test_sizes():
    assert [parse_size(x) for x in ("5", "1MB", "2 MiB", "0.5k", "1G")] == [
        5,
        10**6,
        2**21,
        500,
        10**9,
    ]
    for text in ("", "MB", "1TB", "-1", "1 i"):
        with pytest.raises(ValueError, match="no size"):
            parse_size(text)
