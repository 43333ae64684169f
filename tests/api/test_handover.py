"""Hand-overs in other routers' words, as they stand in a body. The bodies are those that the real routers send."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostroke.api import openai, sglang
from twostroke.api.call import MAX_SEQUENCES, Call, Setting
from twostroke.api.handover import add_transfer, take_handover
from twostroke.errors import BadRequest, ModelNotFound, RequestError
from twostroke.messages import Bootstrap, KvTransfer

BOOTSTRAP = {"bootstrap_host": "10.0.0.1", "bootstrap_port": 8100, "bootstrap_room": 2**63 - 1}
REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
REMOTE_PREFILL = {
    "do_remote_prefill": True,
    "remote_host": "10.0.0.1",
    "remote_port": 8100,
    "remote_request_id": "0f" * 16,
}


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, None),
        ({"bootstrap_host": None, "bootstrap_port": None, "bootstrap_room": None, "kv_transfer_params": None}, None),
        ({"kv_transfer_params": {}}, None),
        ({"kv_transfer_params": {"do_remote_decode": False, "remote_host": "h"}}, None),
        (BOOTSTRAP, Bootstrap("10.0.0.1", 8100, 2**63 - 1)),
        (
            {"bootstrap_host": ["h", "h"], "bootstrap_port": [1, 1], "bootstrap_room": [5, 6]},
            Bootstrap("h", 1, 5),
        ),
        (BOOTSTRAP | {"bootstrap_host": "[::1]"}, Bootstrap("[::1]", 8100, 2**63 - 1)),
        ({"kv_transfer_params": REMOTE_DECODE}, KvTransfer(do_remote_decode=True)),
        (
            {"kv_transfer_params": REMOTE_PREFILL},
            KvTransfer(do_remote_prefill=True, remote_host="10.0.0.1", remote_port=8100, remote_request_id="0f" * 16),
        ),
    ],
)
def test_words(fields: dict[str, object], word: Bootstrap | KvTransfer | None) -> None:
    body: dict[str, object] = {"text": "hello", **fields}
    assert take_handover(body) == word
    assert body == {"text": "hello"}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"bootstrap_host": "h"}, "bootstrap_room", "missing"),
        ({"bootstrap_room": 1}, "bootstrap_host", "missing"),
        (BOOTSTRAP | {"bootstrap_port": None}, "bootstrap_port", "--prefill"),
        (BOOTSTRAP | {"bootstrap_port": [None, None]}, "bootstrap_port", "--prefill"),
        (BOOTSTRAP | {"bootstrap_port": 0}, "bootstrap_port", ">= 1"),
        (BOOTSTRAP | {"bootstrap_port": 65536}, "bootstrap_port", "<= 65535"),
        (BOOTSTRAP | {"bootstrap_room": -1}, "bootstrap_room", ">= 0"),
        (BOOTSTRAP | {"bootstrap_room": 2**63}, "bootstrap_room", ""),
        (BOOTSTRAP | {"bootstrap_room": "1"}, "bootstrap_room", "str"),
        (BOOTSTRAP | {"bootstrap_room": []}, "bootstrap_room", "length"),
        (BOOTSTRAP | {"bootstrap_room": [1] * (MAX_SEQUENCES + 1)}, "bootstrap_room", "length"),
        (BOOTSTRAP | {"bootstrap_host": ["a", "b"]}, "bootstrap_host", "one prefill worker"),
        (BOOTSTRAP | {"bootstrap_host": "user@evil"}, "bootstrap_host", "regex"),
        (BOOTSTRAP | {"bootstrap_host": "evil/path?"}, "bootstrap_host", "regex"),
        (BOOTSTRAP | {"bootstrap_host": "a\n"}, "bootstrap_host", "regex"),
        (BOOTSTRAP | {"bootstrap_host": ""}, "bootstrap_host", "regex"),
        (BOOTSTRAP | {"bootstrap_host": "a" * 254}, "bootstrap_host", "regex"),
        (BOOTSTRAP | {"kv_transfer_params": REMOTE_DECODE}, "kv_transfer_params", "either"),
        ({"kv_transfer_params": 1}, "kv_transfer_params", "object"),
        ({"kv_transfer_params": {"do_remote_decode": 1}}, "kv_transfer_params.do_remote_decode", "bool"),
        ({"kv_transfer_params": REMOTE_DECODE | {"what": 1}}, "kv_transfer_params.what", "unknown"),
        ({"kv_transfer_params": REMOTE_PREFILL | {"do_remote_decode": True}}, "kv_transfer_params", "both ends"),
        ({"kv_transfer_params": {"remote_request_id": "../x"}}, "kv_transfer_params.remote_request_id", "regex"),
        ({"kv_transfer_params": REMOTE_PREFILL | {"signature": "é" * 64}}, "kv_transfer_params.signature", "regex"),
    ],
)  # fmt: skip
def test_words_that_make_no_sense(fields: dict[str, object], param: str, says: str) -> None:
    with pytest.raises(BadRequest) as caught:
        take_handover(dict(fields))
    assert caught.value.param == param
    assert says in caught.value.message


_VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["h", "::1", "0f" * 16])
_LISTS = _VALUES | st.lists(_VALUES, max_size=3)
_NAMES = st.sampled_from(list(KvTransfer.__struct_fields__)) | st.text(max_size=4)


@given(
    st.fixed_dictionaries(
        {},
        optional={**dict.fromkeys(BOOTSTRAP, _LISTS), "kv_transfer_params": _LISTS | st.dictionaries(_NAMES, _LISTS)},
    )
)
def test_any_words_are_understood_or_refused(fields: dict[str, Any]) -> None:
    body = dict(fields)
    try:
        word = take_handover(body)
    except RequestError:
        return
    assert body == {}
    if isinstance(word, Bootstrap):
        assert 1 <= word.port <= 65535
        assert "/" not in word.host
    elif word is not None:
        assert word.do_remote_decode != word.do_remote_prefill


# -- in whole bodies -------------------------------------------------------------------------------------------------


def translated(setting: Setting, path: str, **fields: object) -> Call:
    translate = {"generate": sglang.generate, "completions": openai.completions, "chat": openai.chat}[path]
    prompt = {"generate": {"text": "hello"}, "completions": {"prompt": "hello"}}.get(
        path, {"messages": [{"role": "user", "content": "hello"}]}
    )
    return translate(json.dumps(prompt | fields).encode(), setting)


SGLANG_DEFAULTS: dict[str, dict[str, object]] = {  # what SGLang's router writes beside what it was asked for
    "generate": {
        "model": None, "return_text_in_logprobs": False, "stream": False, "log_metrics": True, "background": False,
        "return_hidden_states": False, "no_logs": False, "return_bytes": False, "return_entropy": False,
    },
    "completions": {
        "stream": False, "echo": False, "no_stop_trim": False, "ignore_eos": False, "skip_special_tokens": True,
        "return_hidden_states": False,
    },
    "chat": {
        "model": "unknown", "logprobs": False, "max_completion_tokens": 4, "stream": False, "no_stop_trim": False,
        "ignore_eos": False, "continue_final_message": False, "skip_special_tokens": True, "separate_reasoning": True,
        "stream_reasoning": True, "return_hidden_states": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("path", SGLANG_DEFAULTS)
def test_what_sglang_router_sends(setting: Setting, path: str) -> None:
    call = translated(setting, path, **SGLANG_DEFAULTS[path], **BOOTSTRAP)
    assert call.handover == Bootstrap("10.0.0.1", 8100, 2**63 - 1)


@pytest.mark.parametrize("path", SGLANG_DEFAULTS)
def test_a_model_that_is_not_named(setting: Setting, path: str) -> None:
    """That router says "unknown", also where it hands nothing over."""
    for fields in ({}, {"model": None}, {"model": "unknown"}, {"model": "unknown", **BOOTSTRAP}, {"model": "tiny"}):
        assert translated(setting, path, **fields).jobs
    with pytest.raises(ModelNotFound):
        translated(setting, path, model="another", **BOOTSTRAP)


@pytest.mark.parametrize("path", SGLANG_DEFAULTS)
def test_what_vllm_router_sends_to_the_producer(setting: Setting, path: str) -> None:
    """It writes both limits wherever the client's are, and an end must not be ruled out for the first token."""
    own: dict[str, object] = {"sampling_params": {"max_new_tokens": 4}} if path == "generate" else {}
    added = {"max_tokens": 1, "min_tokens": 1, "stream": False}
    call = translated(setting, path, **own, **added, kv_transfer_params=REMOTE_DECODE)
    assert call.handover == KvTransfer(do_remote_decode=True)
    assert call.jobs[0].request.sampling.min_tokens == 0
    assert call.jobs[0].request.sampling.max_tokens == (4 if path == "generate" else 1)


@pytest.mark.parametrize("path", SGLANG_DEFAULTS)
def test_what_vllm_router_sends_to_the_consumer(setting: Setting, path: str) -> None:
    own: dict[str, object] = {"min_tokens": 2}
    if path == "generate":
        own = {"sampling_params": {"min_new_tokens": 2}}
    call = translated(setting, path, **own, kv_transfer_params=REMOTE_PREFILL)
    assert isinstance(call.handover, KvTransfer)
    assert call.jobs[0].request.sampling.min_tokens == 2


def test_a_reply_with_a_word_for_the_consumer() -> None:
    word = KvTransfer(do_remote_prefill=True, remote_host="h", remote_port=1)
    reply = json.loads(add_transfer(b'{"id":"x"}', word))
    assert reply.pop("id") == "x"
    assert take_handover(reply) == word
    assert list(json.loads(add_transfer(b"[{}]", word))) == ["kv_transfer_params"]
