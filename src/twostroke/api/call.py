"""One HTTP call in the form that all dialects share: knobs in, sequences to generate, their text so far.

A dialect (``openai.py``, ``sglang.py``) translates a body into a ``Call``, and a ``Call``'s choices into replies.
Nothing here or there does I/O.
"""

import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Annotated, Protocol, TypeVar

import msgspec
from msgspec import Meta, Struct

from twostroke.api.text import Detokenizer, StopFinder
from twostroke.errors import BadRequest, ContextExceeded
from twostroke.messages import ForeignTicket, ModelCard, Output, Request, Sampling, Token
from twostroke.tokenizer import Tokenizer

MAX_SEQUENCES = 1024  # prompts x n of one call
CONTEXT_TOKENS = 4  # of the prompt that the detokeniser sees

Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Natural = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Stop = Annotated[str, Meta(min_length=1, max_length=256)]
TokenIds = list[int]
T = TypeVar("T")


class Knobs(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling fields that all dialects have; ``null`` means the default. Bodies extend it."""

    max_tokens: Positive | None = None
    min_tokens: Natural | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None  # OpenAI's range
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None  # -1 and 0 are off
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    logit_bias: Annotated[dict[int, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=256)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None


class Setting(Struct, frozen=True):
    """What a translation needs besides the body. ``now`` is unix seconds."""

    card: ModelCard
    tokenizer: Tokenizer
    http_id: str
    now: int
    salt: str = ""  # of requests that name none


class Prompt(Struct, frozen=True):
    """One prompt and how to continue it. ``default_max`` of None is all that the context leaves."""

    tokens: TokenIds
    knobs: Knobs
    default_max: int | None
    logprobs: int | None = None
    chat: bool = False


class Job(Struct, frozen=True):
    """One sequence to generate. ``context`` is the end of the prompt that its text continues."""

    request: Request
    index: int  # of the choice in the reply
    stop: tuple[str, ...] = ()
    context: TokenIds = []


class Delta(Struct, frozen=True):
    """What one output adds to a choice."""

    text: str
    tokens: list[Token]


class Choice:
    """Progress of one sequence: tokens in, text out. Finished when ``finish`` is set."""

    def __init__(self, job: Job, card: ModelCard, tokenizer: Tokenizer) -> None:
        self.job = job
        self.index = job.index
        self.tokens: list[Token] = []
        self.text = ""
        self.finish: str | None = None
        self.matched: str | int | None = None  # the stop string or stop token that ended it
        self.cached_tokens = 0
        self._stop_ids = card.eos_token_ids | job.request.sampling.stop_token_ids
        self._detokenizer = Detokenizer(tokenizer.decode, tokenizer.special_ids, job.context)
        self._stops = StopFinder(job.stop)

    def feed(self, output: Output) -> Delta:
        """Take an output. A stop string ends the choice early: later tokens are not taken."""
        before = len(self.tokens)
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        text = ""
        for token in output.tokens:
            self.tokens.append(token)
            if output.finish == "stop" and token is output.tokens[-1] and token.id in self._stop_ids:
                self.matched = token.id  # its text is no part of the answer
                break
            text += self._visible(self._detokenizer.feed(token.id))
            if self._stops.matched is not None:
                break
        if output.finish and self._stops.matched is None:
            text += self._visible(self._detokenizer.flush())
        if self._stops.matched is not None:
            self.finish, self.matched = "stop", self._stops.matched
        elif output.finish:
            text += self._stops.flush()
            self.finish = output.finish
        self.text += text
        return Delta(text, self.tokens[before:])

    def _visible(self, text: str) -> str:
        """Text in front of any stop string. The first ``min_tokens`` tokens are not searched for one."""
        searched = len(self.tokens) > self.job.request.sampling.min_tokens
        return self._stops.feed(text) if searched else text


class Reply(Protocol):
    """How a dialect writes choices: server-sent events while streaming, or one body."""

    def opening(self, choices: Sequence[Choice]) -> bytes:
        """Events before any token."""
        ...

    def chunk(self, choice: Choice, delta: Delta) -> bytes:
        """Events of one delta; empty if it shows nothing."""
        ...

    def closing(self, choices: Sequence[Choice]) -> bytes:
        """Events after the last token, without the final [DONE]."""
        ...

    def whole(self, choices: Sequence[Choice]) -> bytes:
        """The body of a reply that is not streamed."""
        ...


class Call(Struct, frozen=True):
    """A translated HTTP call."""

    jobs: list[Job]
    stream: bool
    reply: Reply
    rid: str | None = None  # SGLang's name for the call
    handover: ForeignTicket | None = None


# -- bodies ------------------------------------------------------------------------------------------------------


def read_object(body: bytes) -> dict[str, object]:
    """The JSON object in ``body``.

    Raises:
        BadRequest: not UTF-8, not JSON, nested too deeply, or not an object.
    """
    try:
        fields = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8 (byte {error.start})") from None
    except msgspec.DecodeError as error:
        hint = "; NaN and Infinity are no JSON numbers" if re.search(rb"\b(NaN|Infinity)\b", body) else ""
        raise BadRequest(f"the body is not valid JSON: {error}{hint}") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    if not isinstance(fields, dict):
        raise BadRequest("the body must be a JSON object")
    return fields


def drop_neutral(fields: dict[str, object], neutral: Mapping[str, tuple[object, ...]], path: str = "") -> None:
    """Remove known fields that ask for nothing; refuse them with any other value than the neutral ones.

    Raises:
        BadRequest: such a field asks for something that is not supported.
    """
    for name in neutral.keys() & fields.keys():
        value = fields.pop(name)
        if not any(type(value) is type(same) and value == same for same in neutral[name]):
            raise BadRequest(f"{path}{name} is not supported", param=f"{path}{name}")


def typed(fields: object, kind: type[T], path: str = "") -> T:
    """``fields`` as a ``kind``.

    Raises:
        BadRequest: unknown field, wrong type, or out of range; ``param`` is the field's path below ``path``.
    """
    try:
        return msgspec.convert(fields, kind, str_keys=True)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at ")
    message = message.replace(" | null`", "`")
    below = re.search(r"`\$\.(.*)`", where)
    param = path + below[1] if below else path.rstrip(".") or None
    if unknown := re.search(r"unknown field `(.*)`", message):
        param = f"{param}.{unknown[1]}" if param else unknown[1]
        raise BadRequest(f"unknown field {param}", param=param)
    raise BadRequest(f"{param}: {message}" if param else message, param=param)


def check_tokens(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Refuse token ids outside the vocabulary.

    Raises:
        BadRequest: some id is not in ``0 .. vocab_size - 1``.
    """
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        bad = next(i for i in ids if not 0 <= i < vocab_size)
        raise BadRequest(f"{param}: token id {bad} is not in the vocabulary (0 to {vocab_size - 1})", param=param)


def encode_text(tokenizer: Tokenizer, text: str, param: str) -> TokenIds:
    """Token ids of a prompt. An empty one has none, even if the model would begin it with BOS.

    Raises:
        BadRequest: the text is empty.
    """
    if not text:
        raise BadRequest(f"{param} is empty", param=param)
    return tokenizer.encode(text)


# -- jobs --------------------------------------------------------------------------------------------------------


def plan(prompts: Sequence[Prompt], setting: Setting, param: str, salt: str = "", priority: int = 0) -> list[Job]:
    """The sequences of a call: for each prompt its n choices, in the order of the reply.

    Raises:
        BadRequest, ContextExceeded: a prompt or a combination of knobs cannot be served.
    """
    total = sum(prompt.knobs.n or 1 for prompt in prompts)
    if not prompts:
        raise BadRequest(f"{param} is empty", param=param)
    if total > MAX_SEQUENCES:
        raise BadRequest(f"prompts times n is {total}; at most {MAX_SEQUENCES} in one call", param="n")
    jobs: list[Job] = []
    for at, prompt in enumerate(prompts):
        check_tokens(prompt.tokens, setting.card.vocab_size, param)
        room = _room(prompt, setting.card, param)
        for choice in range(prompt.knobs.n or 1):
            request = Request(
                id=f"{setting.http_id}/{at}/{choice}",
                prompt=prompt.tokens,
                sampling=_sampling(prompt, setting, room, _seed(prompt.knobs.seed, setting.http_id, at, choice)),
                prompt_index=at,
                choice=choice,
                salt=salt or setting.salt,
                priority=priority,
            )
            context = [] if prompt.chat else prompt.tokens[-CONTEXT_TOKENS:]
            jobs.append(Job(request, len(jobs), _stops(prompt.knobs), context))
    return jobs


def _stops(knobs: Knobs) -> tuple[str, ...]:
    return (knobs.stop,) if isinstance(knobs.stop, str) else tuple(knobs.stop or ())


def _room(prompt: Prompt, card: ModelCard, param: str) -> int:
    """Tokens that the context leaves for the answer; checked against what was asked for."""
    size, limit, asked = len(prompt.tokens), card.max_model_len, prompt.knobs.max_tokens
    if not size:
        raise BadRequest(f"{param} is empty", param=param)
    if size >= limit:
        raise ContextExceeded(
            f"the prompt has {size} tokens, and the context is {limit} tokens, of which at least 1 is for the answer",
            param=param,
        )
    if asked is not None and size + asked > limit:
        raise ContextExceeded(
            f"{size} tokens of prompt and {asked} of output are {size + asked}; the context is {limit} tokens",
            param="max_tokens",
        )
    return limit - size


def _sampling(prompt: Prompt, setting: Setting, room: int, seed: int) -> Sampling:
    knobs, vocab = prompt.knobs, setting.card.vocab_size
    max_tokens = knobs.max_tokens or min(prompt.default_max or room, room)
    if (knobs.min_tokens or 0) > max_tokens:
        raise BadRequest(f"min_tokens {knobs.min_tokens} is more than max_tokens {max_tokens}", param="min_tokens")
    check_tokens(knobs.stop_token_ids or (), vocab, "stop_token_ids")
    check_tokens(list(knobs.logit_bias or ()), vocab, "logit_bias")
    return Sampling(
        max_tokens=max_tokens,
        seed=seed,
        min_tokens=knobs.min_tokens or 0,
        temperature=_or(knobs.temperature, 1.0),
        top_p=_or(knobs.top_p, 1.0),
        top_k=max(knobs.top_k or 0, 0),
        min_p=knobs.min_p or 0.0,
        presence_penalty=knobs.presence_penalty or 0.0,
        frequency_penalty=knobs.frequency_penalty or 0.0,
        repetition_penalty=_or(knobs.repetition_penalty, 1.0),
        logit_bias=knobs.logit_bias or {},
        stop_token_ids=frozenset(knobs.stop_token_ids or ()),
        ignore_eos=bool(knobs.ignore_eos),
        logprobs=prompt.logprobs,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _seed(given: int | None, http_id: str, prompt_index: int, choice: int) -> int:
    """A seed in 0 .. 2**63 - 1 that prefill and decode workers compute alike.

    A given seed is taken as it is (modulo 2**63) for the first choice of every prompt; without one it comes from the
    x-request-id and the prompt's index. Further choices mix their index in.
    """
    if given is None:
        given = _mix(f"{http_id}/{prompt_index}")
    return _mix(f"{given % 2**63}/{choice}") if choice else given % 2**63


def _mix(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") % 2**63


def finite(logprob: float) -> float:
    """A logprob that JSON can carry; OpenAI's floor stands for minus infinity."""
    return max(logprob, -9999.0)


def event(message: object) -> bytes:
    """A server-sent event that carries ``message`` as JSON."""
    return b"data: " + msgspec.json.encode(message) + b"\n\n"


def token_counts(choices: Sequence[Choice]) -> tuple[int, int, int]:
    """Prompt, output and cached prompt tokens of a call. A prompt counts once however many choices it has."""
    firsts = [choice for choice in choices if choice.job.request.choice == 0]
    return (
        sum(len(choice.job.request.prompt) for choice in firsts),
        sum(len(choice.tokens) for choice in choices),
        sum(choice.cached_tokens for choice in firsts),
    )
