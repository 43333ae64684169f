"""Translation of OpenAI bodies: what is understood, what is refused and why."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.api.conftest import MAX_LEN
from twostroke.api.call import Call, Choice, Setting
from twostroke.api.openai import ChatBody, CompletionBody, chat, completions
from twostroke.errors import BadRequest, ContextExceeded, ModelNotFound, RequestError
from twostroke.messages import Output, Token

HELLO = [{"role": "user", "content": "hello"}]


def complete(setting: Setting, **fields: object) -> Call:
    return completions(json.dumps({"prompt": "hello", **fields}).encode(), setting)


def converse(setting: Setting, **fields: object) -> Call:
    return chat(json.dumps({"messages": HELLO, **fields}).encode(), setting)


def test_defaults(setting: Setting) -> None:
    (job,) = complete(setting).jobs
    sampling = job.request.sampling
    assert job.request.id == "req-1/0/0"
    assert job.request.http_id == "req-1"
    assert job.request.prompt == setting.tokenizer.encode("hello")
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (16, 1.0, 1.0, 0)
    (job,) = converse(setting).jobs
    assert job.request.sampling.max_tokens == MAX_LEN - len(job.request.prompt)


def test_every_knob_arrives(setting: Setting) -> None:
    (job,) = complete(
        setting,
        model="tiny",
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias={"5": -100},
        seed=7,
        stop=["x", "y"],
        stop_token_ids=[3],
        ignore_eos=True,
        logprobs=2,
        cache_salt="tenant",
        priority=-1,
        user="u",
        metadata={"a": "b"},
        best_of=1,
    ).jobs
    sampling = job.request.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.seed, sampling.logprobs) == (9, 2, 7, 2)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 5, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.1, 0.2, 1.1)
    assert (sampling.logit_bias, sampling.stop_token_ids, sampling.ignore_eos) == ({5: -100.0}, frozenset({3}), True)
    assert (job.stop, job.request.salt, job.request.priority) == (("x", "y"), "tenant", -1)


def test_null_means_the_default(setting: Setting) -> None:
    names = ["max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "logit_bias", "logprobs", "suffix"]
    assert complete(setting, **dict.fromkeys(names)).jobs == complete(setting).jobs


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("hello", 1), ([5, 6], 1), (["hello", "world"], 2), ([[5, 6], [7], [8]], 3)],
)
def test_forms_of_a_prompt(setting: Setting, prompt: object, count: int) -> None:
    jobs = complete(setting, prompt=prompt, n=2).jobs
    assert [(job.index, job.request.prompt_index, job.request.choice) for job in jobs] == [
        (2 * at + choice, at, choice) for at in range(count) for choice in range(2)
    ]


def test_seeds_agree_between_workers_and_differ_between_choices(setting: Setting) -> None:
    first, second = complete(setting, n=3).jobs, complete(setting, n=3).jobs
    assert [job.request.sampling.seed for job in first] == [job.request.sampling.seed for job in second]
    assert len({job.request.sampling.seed for job in first}) == 3
    given_seed = [job.request.sampling.seed for job in complete(setting, n=2, seed=42).jobs]
    assert given_seed[0] == 42
    assert given_seed[1] != 42
    assert complete(setting, seed=-1).jobs[0].request.sampling.seed == 2**63 - 1


@pytest.mark.parametrize("content", ["hello", [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]])
def test_forms_of_content(setting: Setting, content: object) -> None:
    call = converse(setting, messages=[{"role": "user", "content": content}])
    assert call.jobs == converse(setting).jobs


def test_our_own_messages_may_come_back(setting: Setting) -> None:
    ours: dict[str, object] = {
        "role": "assistant",
        "content": "hi",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
    }
    assert converse(setting, messages=[*HELLO, ours, *HELLO]).jobs


def test_max_completion_tokens(setting: Setting) -> None:
    assert converse(setting, max_completion_tokens=5).jobs[0].request.sampling.max_tokens == 5
    assert converse(setting, max_completion_tokens=1, max_tokens=1).jobs[0].request.sampling.max_tokens == 1
    with pytest.raises(BadRequest, match="differ"):
        converse(setting, max_completion_tokens=5, max_tokens=6)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": ""}, "prompt", "prompt is empty"),
        ({"prompt": []}, "prompt", "prompt is empty"),
        ({"prompt": [[]]}, "prompt", "prompt is empty"),
        ({"prompt": ["hello", ""]}, "prompt", "prompt is empty"),
        ({"prompt": ["hello", 1]}, "prompt", "mixes"),
        ({"prompt": None}, "prompt", "got `null`"),
        ({"prompt": [-1]}, "prompt", "-1 is not in the vocabulary"),
        ({"prompt": [10**30]}, "prompt", "not in the vocabulary"),
        ({"prompt": [5] * MAX_LEN}, "prompt", f"has {MAX_LEN} tokens, and the context is {MAX_LEN}"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"max_tokens": -3}, "max_tokens", ">= 1"),
        ({"max_tokens": "many"}, "max_tokens", "got `str`"),
        ({"max_tokens": True}, "max_tokens", "got `bool`"),
        ({"max_tokens": MAX_LEN}, "max_tokens", f"the context is {MAX_LEN}"),
        ({"min_tokens": 17}, "min_tokens", "more than max_tokens"),
        ({"model": "gpt-9"}, "model", "not served"),
        ({"temperature": -0.1}, "temperature", ">= 0"),
        ({"temperature": 2.5}, "temperature", "<= 2"),
        ({"temperature": "hot"}, "temperature", "got `str`"),
        ({"top_p": 0}, "top_p", "> 0"),
        ({"top_k": -2}, "top_k", ">= -1"),
        ({"n": 0}, "n", ">= 1"),
        ({"n": 1_000_000}, "n", "<= 128"),
        ({"n": 128, "prompt": [[5]] * 100}, "n", "12800"),
        ({"stop": ""}, "stop", "length >= 1"),
        ({"stop": ["x"] * 17}, "stop", "length <= 16"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids", "vocabulary"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "got `str`"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "<= 100"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias", "vocabulary"),
        ({"logprobs": 21}, "logprobs", "<= 20"),
        ({"seed": 2**63}, "seed", "<= 9223372036854775807"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
        ({"temprature": 1}, "temprature", "unknown field temprature"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"best_of": True}, "best_of", "not supported"),
        ({"echo": True}, "echo", "not supported"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"store": True}, "store", "not supported"),
        ({"kv_transfer_params": 1}, "kv_transfer_params", "object"),
        ({"bootstrap_room": 1}, "bootstrap_host", "missing"),
    ],
)
def test_bad_completions(setting: Setting, fields: dict[str, object], param: str, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        complete(setting, **fields)
    assert says in caught.value.message
    assert (caught.value.param or "").partition("[")[0] == param
    assert caught.value.status == (404 if "model" in fields else 400)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"messages": []}, "messages", "messages is empty"),
        ({"messages": "hello"}, "messages", "got `str`"),
        ({"messages": [{"content": "hello"}]}, "messages[0]", "missing required field `role`"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "unknown role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "only text"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "got `int`"),
        ({"messages": [{"role": "user", "tool_calls": [1]}]}, "messages[0].tool_calls", "not supported"),
        ({"messages": [{"role": "user", "content": "x" * 1000}]}, "messages", "the context is"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "<= 20"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tool_choice": "auto"}, "tool_choice", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"functions": [1]}, "functions", "not supported"),
        ({"audio": {}}, "audio", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"prompt": "hello"}, "prompt", "unknown field prompt"),
    ],
)
def test_bad_chats(setting: Setting, fields: dict[str, object], param: str, says: str) -> None:
    with pytest.raises(BadRequest) as caught:
        converse(setting, **fields)
    assert says in caught.value.message
    assert caught.value.param == param


def test_fields_that_ask_for_nothing(setting: Setting) -> None:
    call = converse(
        setting, tools=[], tool_choice="none", response_format={"type": "text"}, modalities=["text"], store=False
    )
    assert call.jobs == converse(setting).jobs


def test_context_errors_have_their_code(setting: Setting) -> None:
    with pytest.raises(ContextExceeded) as caught:
        complete(setting, max_tokens=MAX_LEN)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(ModelNotFound) as missing:
        complete(setting, model="x")
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"prompt": "hello"} x', "not valid JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"prompt": "hello", "temperature": NaN}', "NaN and Infinity are no JSON numbers"),
        (b'{"prompt": "hello", "temperature": -Infinity}', "NaN and Infinity are no JSON numbers"),
        (b'{"prompt": "hello", "temperature": 1e999}', "out of range"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
    ],
)
def test_bad_bodies(setting: Setting, body: bytes, says: str) -> None:
    for translate in (completions, chat):
        with pytest.raises(BadRequest, match=says):
            translate(body, setting)


_FIELD_NAMES = st.sampled_from(
    sorted({*CompletionBody.__struct_fields__, *ChatBody.__struct_fields__, "tools", "best_of", "role", "content"})
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_FIELD_NAMES | st.text(max_size=5), inner, max_size=6),
    max_leaves=20,
)


@settings(max_examples=300)
@given(value=_JSON)
def test_any_json_is_served_or_refused(setting: Setting, value: Any) -> None:  # noqa: ANN401 - any JSON
    for start in ({}, {"prompt": "hello"}, {"messages": HELLO}):
        body = json.dumps(start | value if isinstance(value, dict) else value).encode()
        for translate in (completions, chat):
            with suppress(RequestError):
                assert translate(body, setting).jobs


@given(body=st.binary(max_size=60))
def test_any_bytes_are_refused(setting: Setting, body: bytes) -> None:
    for translate in (completions, chat):
        with pytest.raises(RequestError):
            translate(body, setting)


# -- choices: outputs to text ------------------------------------------------------------------------------------


def choice_of(setting: Setting, **fields: object) -> Choice:
    return Choice(complete(setting, **fields).jobs[0], setting.card, setting.tokenizer)


def test_stop_string_ends_a_choice(setting: Setting) -> None:
    choice = choice_of(setting, stop="wor")
    for token in setting.tokenizer.encode("hello world, hello there"):
        if not choice.finish:
            choice.feed(Output([Token(token)]))
    assert (choice.text, choice.finish, choice.matched) == ("hello ", "stop", "wor")


def test_stop_strings_wait_for_min_tokens(setting: Setting) -> None:
    ids = setting.tokenizer.encode("abcabc")
    choice = choice_of(setting, stop="bc", min_tokens=len(ids) // 2)
    choice.feed(Output([Token(i) for i in ids], "length"))
    assert (choice.text, choice.finish) == ("abca", "stop")


def test_a_stop_token_counts_but_is_not_shown(setting: Setting) -> None:
    (end,) = setting.tokenizer.encode("!")
    choice = choice_of(setting, stop_token_ids=[end])
    choice.feed(Output([Token(i) for i in [*setting.tokenizer.encode("hi"), end]], "stop"))
    assert (choice.text, choice.finish, choice.matched) == ("hi", "stop", end)
    assert choice.tokens[-1].id == end


def test_an_unfinished_character_is_shown_at_the_end(setting: Setting) -> None:
    first, *_ = setting.tokenizer.encode("🙃")
    choice = choice_of(setting)
    assert choice.feed(Output([Token(first)])).text == ""
    assert choice.feed(Output([], "length")).text == "\ufffd"
