"""Translation of SGLang's native bodies and replies."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twostroke.api import sglang
from twostroke.api.call import Call, Choice, Setting
from twostroke.errors import BadRequest, RequestError
from twostroke.messages import Output, Token


def generate(setting: Setting, **fields: object) -> Call:
    return sglang.generate(json.dumps({"text": "hello", **fields}).encode(), setting)


def test_defaults(setting: Setting) -> None:
    (job,) = generate(setting).jobs
    assert job.request.sampling.max_tokens == 128
    assert job.request.prompt == setting.tokenizer.encode("hello")


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling_params": {"max_new_tokens": 4, "temperature": 0, "stop": ["x"], "sampling_seed": 5}},
        {"max_new_tokens": 4, "temperature": 0, "stop": ["x"], "seed": 5},
        {"sampling_params": {"max_new_tokens": 4, "seed": 5}, "temperature": 0.0, "stop": "x"},
    ],
)
def test_knobs_in_either_place(setting: Setting, fields: dict[str, object]) -> None:
    (job,) = generate(setting, **fields).jobs
    sampling = job.request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed, job.stop) == (4, 0.0, 5, ("x",))


def test_lists(setting: Setting) -> None:
    params = [{"max_new_tokens": 1}, {"max_new_tokens": 2, "n": 2}]
    jobs = generate(setting, text=["hello", "world"], sampling_params=params).jobs
    assert [job.request.sampling.max_tokens for job in jobs] == [1, 2, 2]
    assert [(job.request.prompt_index, job.request.choice) for job in jobs] == [(0, 0), (1, 0), (1, 1)]
    ids = [[5, 6], [7]]
    assert [job.request.prompt for job in generate(setting, text=None, input_ids=ids).jobs] == ids


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"text": None}, "text", "either text or input_ids"),
        ({"input_ids": [1]}, "text", "either text or input_ids"),
        ({"text": ""}, "text", "empty"),
        ({"text": []}, "text", "empty"),
        ({"text": None, "input_ids": []}, "input_ids", "empty"),
        ({"text": None, "input_ids": [1, [2]]}, "input_ids", "mixes"),
        ({"text": None, "input_ids": [10**9]}, "input_ids", "vocabulary"),
        ({"sampling_params": {"max_new_tokens": 0}}, "sampling_params.max_new_tokens", ">= 1"),
        ({"sampling_params": {"max_tokens": 1}}, "sampling_params.max_tokens", "unknown field"),
        ({"sampling_params": {"regex": "a*"}}, "sampling_params.regex", "not supported"),
        ({"sampling_params": [{}, {}]}, "sampling_params", "2 entries for 1 prompts"),
        ({"sampling_params": [3]}, "sampling_params", "must be an object"),
        ({"sampling_params": {"temperature": 1}, "temperature": 1}, "temperature", "twice"),
        ({"bootstrap_host": "a"}, "bootstrap_room", "missing"),
        ({"lora_path": "a"}, "lora_path", "not supported"),
        ({"what": 1}, "what", "unknown field"),
        ({"rid": ["a"]}, "rid", "got `array`"),
    ],
)
def test_bad_bodies(setting: Setting, fields: dict[str, object], param: str, says: str) -> None:
    with pytest.raises(BadRequest) as caught:
        generate(setting, **fields)
    assert says in caught.value.message
    assert caught.value.param == param


def test_reply(setting: Setting) -> None:
    call = generate(setting, rid="mine", return_logprob=True, top_logprobs_num=1)
    choice = Choice(call.jobs[0], setting.card, setting.tokenizer)
    (token,) = setting.tokenizer.encode("h")
    choice.feed(Output([Token(token, -0.5, [(token, float("-inf"))])], "length", cached_tokens=1))
    reply = json.loads(call.reply.whole([choice]))
    assert (reply["text"], reply["output_ids"]) == ("h", [token])
    meta = reply["meta_info"]
    assert meta.pop("e2e_latency") >= 0
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 1},
        "prompt_tokens": len(call.jobs[0].request.prompt),
        "completion_tokens": 1,
        "cached_tokens": 1,
        "input_token_logprobs": [],
        "output_token_logprobs": [[-0.5, token, None]],
        "output_top_logprobs": [[[-9999.0, token, None]]],
    }


def test_lists_are_answered_with_lists(setting: Setting) -> None:
    call = generate(setting, text=["hello"])
    choice = Choice(call.jobs[0], setting.card, setting.tokenizer)
    choice.feed(Output([], "abort"))
    (reply,) = json.loads(call.reply.whole([choice]))
    assert reply["meta_info"]["finish_reason"]["type"] == "abort"


def test_abort() -> None:
    assert sglang.abort(b'{"rid": "x", "abort_all": false}') == "x"
    for body in (b"{}", b'{"rid": ""}', b'{"rid": "x", "abort_all": true}', b"[]"):
        with pytest.raises(BadRequest):
            sglang.abort(body)


_NAMES = st.sampled_from(["text", "input_ids", "sampling_params", "max_new_tokens", "n", "stop", "seed", "rid"])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_NAMES | st.text(max_size=5), inner, max_size=6),
    max_leaves=20,
)


@settings(max_examples=300)
@given(value=_JSON)
def test_any_json_is_served_or_refused(setting: Setting, value: Any) -> None:  # noqa: ANN401 - any JSON
    for start in ({}, {"text": "hello"}, {"input_ids": [1]}):
        body = json.dumps(start | value if isinstance(value, dict) else value).encode()
        for translate in (sglang.generate, lambda body, _: sglang.abort(body)):
            with suppress(RequestError):
                translate(body, setting)
