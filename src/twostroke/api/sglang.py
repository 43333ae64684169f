"""SGLang's native ``/generate`` and its companions as pure translation.

Sampling fields may stand in ``sampling_params`` or, as some tutorials have it, at the top level; not in both.
"""

import time
from collections.abc import Sequence
from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.json import encode

from twostroke import __version__
from twostroke.api.call import (
    Call,
    Choice,
    Delta,
    Knobs,
    Natural,
    Positive,
    Prompt,
    Seed,
    Setting,
    TokenIds,
    drop_neutral,
    encode_text,
    event,
    finite,
    plan,
    read_object,
    typed,
)
from twostroke.api.handover import check_model, take_handover
from twostroke.api.service import Load
from twostroke.errors import BadRequest
from twostroke.messages import KvTransfer, ModelCard, Token
from twostroke.tokenizer import Tokenizer

NEW_TOKENS = 128  # SGLang's default max_new_tokens

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "image_data": (None, []),
    "video_data": (None, []),
    "audio_data": (None, []),
    "input_embeds": (None,),
    "lora_path": (None,),
    "logprob_start_len": (None, -1),  # logprobs of the prompt
    "return_hidden_states": (None, False),
    "return_bytes": (None, False),
    "return_entropy": (None, False),
    "background": (None, False),
    "no_logs": (None, True, False),  # of no effect here: logs hold no text
    "log_metrics": (None, True, False),  # of no effect here: metrics hold no text
}
_NEUTRAL_PARAMS: dict[str, tuple[object, ...]] = {
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "no_stop_trim": (None, False),
    "regex": (None,),
    "json_schema": (None,),
    "ebnf": (None,),
    "structural_tag": (None,),
    "stop_regex": (None, []),
    "custom_params": (None,),
}


# -- requests ----------------------------------------------------------------------------------------------------


class SamplingParams(
    Knobs,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    rename={"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed"},
):
    """The common knobs under SGLang's names. ``seed`` is taken for ``sampling_seed`` too."""

    max_tokens: Positive | None = None  # repeated, since renaming reaches only a class's own fields
    min_tokens: Natural | None = None
    seed: Seed | None = None
    temperature: Annotated[float, Meta(ge=0, le=1e6)] | None = None


class GenerateBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``/generate``, less the sampling fields."""

    model: str | None = None
    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    stream: bool | None = None
    return_logprob: bool | None = None
    top_logprobs_num: Annotated[int, Meta(ge=0, le=20)] | None = None
    return_text_in_logprobs: bool | None = None
    rid: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None


class AbortBody(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``/abort_request``."""

    rid: Annotated[str, Meta(min_length=1, max_length=128)]


_PARAM_NAMES = {*SamplingParams.__struct_encode_fields__, "seed", *_NEUTRAL_PARAMS}


def generate(body: bytes, setting: Setting) -> Call:
    """Translate a body of ``/generate``.

    Raises:
        BadRequest, ContextExceeded, ModelNotFound: it cannot be served.
    """
    fields = read_object(body)
    handover = take_handover(fields)
    if isinstance(handover, KvTransfer) and handover.do_remote_decode:
        fields.pop("max_tokens", None)  # vLLM's way to ask for one token only
    drop_neutral(fields, _NEUTRAL)
    params = fields.pop("sampling_params", None)
    shared = {name: fields.pop(name) for name in _PARAM_NAMES & fields.keys()}
    asked = typed(fields, GenerateBody)
    check_model(asked.model, setting.card)
    tokens = _prompts(asked, setting.tokenizer)
    if isinstance(params, list) and len(params) != len(tokens):
        raise BadRequest(
            f"sampling_params has {len(params)} entries for {len(tokens)} prompts", param="sampling_params"
        )
    knobs = [_knobs(item, shared) for item in params] if isinstance(params, list) else [_knobs(params, shared)]
    if len(knobs) == 1:
        knobs *= len(tokens)
    logprobs = (asked.top_logprobs_num or 0) if asked.return_logprob else None
    prompts = [Prompt(ids, own, NEW_TOKENS, logprobs) for ids, own in zip(tokens, knobs, strict=True)]
    jobs = plan(prompts, setting, "text" if asked.text is not None else "input_ids", priority=asked.priority or 0)
    single = not isinstance(asked.text, list) and not _nested(asked.input_ids) and len(jobs) == 1
    reply = GenerateReply(setting.tokenizer, asked.rid or setting.http_id, single, asked)
    return Call(jobs, bool(asked.stream), reply, asked.rid, handover)


def abort(body: bytes) -> str:
    """The ``rid`` that a body of ``/abort_request`` names.

    Raises:
        BadRequest: there is none.
    """
    fields = read_object(body)
    drop_neutral(fields, {"abort_all": (None, False), "abort_message": (None,)})
    return typed(fields, AbortBody).rid


def _knobs(params: object, shared: dict[str, object]) -> SamplingParams:
    own = {} if params is None else params
    if not isinstance(own, dict):
        raise BadRequest("sampling_params must be an object or a list of objects", param="sampling_params")
    if twice := own.keys() & shared.keys():
        raise BadRequest(f"{min(twice)} is given twice, also in sampling_params", param=min(twice))
    merged = {**own, **shared}
    drop_neutral(merged, _NEUTRAL_PARAMS, "sampling_params.")
    if "seed" in merged:
        if "sampling_seed" in merged:
            raise BadRequest("give either seed or sampling_seed", param="seed")
        merged["sampling_seed"] = merged.pop("seed")
    return typed(merged, SamplingParams, "sampling_params.")


def _prompts(asked: GenerateBody, tokenizer: Tokenizer) -> list[TokenIds]:
    if (asked.text is None) == (asked.input_ids is None):
        raise BadRequest("give either text or input_ids", param="text")
    if asked.text is not None:
        texts = [asked.text] if isinstance(asked.text, str) else asked.text
        return [encode_text(tokenizer, text, "text") for text in texts]
    flat = [item for item in asked.input_ids or () if isinstance(item, int)]
    nested = [item for item in asked.input_ids or () if isinstance(item, list)]
    if flat and nested:
        raise BadRequest("input_ids mixes token ids and lists of token ids", param="input_ids")
    return nested or [flat]


def _nested(ids: list[int | list[int]] | None) -> bool:
    return ids is not None and any(isinstance(item, list) for item in ids)


# -- replies -----------------------------------------------------------------------------------------------------


class Finish(Struct, frozen=True, omit_defaults=True):
    """Why a choice ended."""

    type: str
    matched: str | int | None = None
    length: int | None = None
    message: str | None = None


Logprob = tuple[float, int, str | None]  # logprob, token id, text


class MetaInfo(Struct, frozen=True):
    """What is known of a choice so far. ``e2e_latency`` is in seconds, from parsing to the present chunk."""

    id: str
    finish_reason: Finish | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    e2e_latency: float
    input_token_logprobs: list[Logprob] | UnsetType = UNSET
    output_token_logprobs: list[Logprob] | UnsetType = UNSET
    output_top_logprobs: list[list[Logprob]] | UnsetType = UNSET


class Generated(Struct, frozen=True):
    """One choice. ``index`` tells streamed choices of one call apart."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | UnsetType = UNSET


class ModelInfo(Struct, frozen=True):
    """Reply of ``/get_model_info``."""

    model_path: str
    tokenizer_path: str
    is_generation: bool = True


class ServerInfo(Struct, frozen=True):
    """Reply of ``/get_server_info`` and ``/server_info``."""

    model_path: str
    served_model_name: str
    context_length: int
    status: str
    version: str = __version__


def model_info(card: ModelCard) -> ModelInfo:
    """Reply of ``/get_model_info``."""
    return ModelInfo(card.name, card.name)


def server_info(card: ModelCard, state: str) -> ServerInfo:
    """Reply of ``/get_server_info``."""
    return ServerInfo(card.name, card.name, card.max_model_len, state)


class LoadInfo(Struct, frozen=True):
    """The one entry of the reply of ``/get_load``, by which SGLang's router balances (``--policy power_of_two``)."""

    num_reqs: int
    num_waiting_reqs: int
    num_tokens: int
    dp_rank: int = 0


def load_info(load: Load) -> list[LoadInfo]:
    """Reply of ``/get_load``."""
    return [LoadInfo(load.running + load.waiting, load.waiting, load.tokens)]


class GenerateReply:
    """Writes ``/generate``; every streamed chunk carries the whole text so far."""

    def __init__(self, tokenizer: Tokenizer, call_id: str, single: bool, asked: GenerateBody) -> None:
        self._tokenizer = tokenizer
        self._id = call_id
        self._single = single
        self._logprobs = bool(asked.return_logprob)
        self._texts = bool(asked.return_text_in_logprobs)
        self._top = bool(asked.top_logprobs_num)
        self._started = time.perf_counter()

    def opening(self, choices: Sequence[Choice]) -> bytes:
        return b""

    def chunk(self, choice: Choice, delta: Delta) -> bytes:
        return event(self._generated(choice)) if delta.tokens or choice.finish else b""

    def closing(self, choices: Sequence[Choice]) -> bytes:
        return b""

    def whole(self, choices: Sequence[Choice]) -> bytes:
        generated = [self._generated(choice) for choice in choices]
        return encode(generated[0] if self._single else generated)

    def _generated(self, choice: Choice) -> Generated:
        ids = [token.id for token in choice.tokens]
        return Generated(choice.text, ids, self._meta(choice), UNSET if self._single else choice.index)

    def _meta(self, choice: Choice) -> MetaInfo:
        return MetaInfo(
            self._id if self._single else f"{self._id}_{choice.index}",
            _finish(choice),
            len(choice.job.request.prompt),
            len(choice.tokens),
            choice.cached_tokens,
            time.perf_counter() - self._started,
            [] if self._logprobs else UNSET,
            [self._logprob(t.id, t.logprob or 0.0) for t in choice.tokens] if self._logprobs else UNSET,
            [self._alternatives(t) for t in choice.tokens] if self._logprobs and self._top else UNSET,
        )

    def _alternatives(self, token: Token) -> list[Logprob]:
        return [self._logprob(i, logprob) for i, logprob in token.top or ()]

    def _logprob(self, token: int, logprob: float) -> Logprob:
        return finite(logprob), token, self._tokenizer.piece(token) if self._texts else None


def _finish(choice: Choice) -> Finish | None:
    if choice.finish == "stop":
        return Finish("stop", matched=choice.matched)
    if choice.finish == "length":
        return Finish("length", length=len(choice.tokens))
    return Finish(choice.finish, message="the request was aborted") if choice.finish else None
