"""OpenAI's ``/v1/completions``, ``/v1/chat/completions`` and ``/v1/models`` as pure translation.

Unknown fields are refused by name, known but unsupported ones too unless they ask for nothing. Accepted and ignored,
because the answer would be the same: ``user``, ``metadata``, ``safety_identifier``, ``prompt_cache_key`` (they label a
call), ``parallel_tool_calls`` (there are no tools), ``service_tier`` "auto" or "default", ``store`` false.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, cast

from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.json import encode

from twostroke.api.call import (
    Call,
    Choice,
    Delta,
    Knobs,
    Prompt,
    Setting,
    TokenIds,
    drop_neutral,
    encode_text,
    event,
    finite,
    plan,
    read_object,
    token_counts,
    typed,
)
from twostroke.api.handover import check_model, take_handover
from twostroke.errors import BadRequest
from twostroke.messages import ForeignTicket, ModelCard, Token
from twostroke.tokenizer import Tokenizer

COMPLETION_TOKENS = 16  # OpenAI's default max_tokens of /v1/completions

_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "include_stop_str_in_output": (None, False),
    "use_beam_search": (None, False),
    "no_stop_trim": (None, False),
    "return_hidden_states": (None, False),
    "continue_final_message": (None, False),
    "separate_reasoning": (None, True, False),  # of no effect here: all text is content
    "stream_reasoning": (None, True, False),
    "include_reasoning": (None, True),
}
_NEUTRAL_COMPLETION = _NEUTRAL | {
    "best_of": (None, 1),
    "suffix": (None, ""),
    "echo": (None, False),
    "prompt_logprobs": (None,),
}
_NEUTRAL_CHAT = _NEUTRAL | {
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    "echo": (None, False),
}
_NEUTRAL_MESSAGE: dict[str, tuple[object, ...]] = {  # what clients send back when they repeat our own replies
    "refusal": (None,),
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "tool_calls": (None, []),
    "tool_call_id": (None,),
    "reasoning_content": (None,),
}


# -- requests ----------------------------------------------------------------------------------------------------


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """``include_usage`` adds a last chunk with the token counts."""

    include_usage: bool | None = None
    continuous_usage_stats: Literal[False] | None = None


class Body(Knobs, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields that both endpoints have."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None


class CompletionBody(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``/v1/completions``."""

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class Part(Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a conversation. Which roles there are is up to the model's template."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[Part] | None = None
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or ())
        named = {"name": self.name} if self.name else {}
        return {"role": self.role, "content": content} | named


class ChatBody(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(max_length=4096)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


def completions(body: bytes, setting: Setting) -> Call:
    """Translate a body of ``/v1/completions``.

    Raises:
        BadRequest, ContextExceeded, ModelNotFound: it cannot be served.
    """
    fields, handover = _fields(body, _NEUTRAL_COMPLETION)
    asked = typed(fields, CompletionBody)
    _check(asked, setting.card)
    prompts = [
        Prompt(tokens, asked, COMPLETION_TOKENS, asked.logprobs) for tokens in _prompts(asked.prompt, setting.tokenizer)
    ]
    jobs = plan(prompts, setting, "prompt", asked.cache_salt or "", asked.priority or 0)
    reply = CompletionReply(setting, _include_usage(asked), asked.logprobs)
    return Call(jobs, bool(asked.stream), reply, handover=handover)


def chat(body: bytes, setting: Setting) -> Call:
    """Translate a body of ``/v1/chat/completions``.

    Raises:
        BadRequest, ContextExceeded, ModelNotFound: it cannot be served.
    """
    fields, handover = _fields(body, _NEUTRAL_CHAT)
    if "max_completion_tokens" in fields:  # the newer name of max_tokens
        newer = fields.pop("max_completion_tokens")
        if fields.setdefault("max_tokens", newer) not in (newer, None):
            raise BadRequest("max_tokens and max_completion_tokens differ", param="max_completion_tokens")
        fields["max_tokens"] = newer
    _drop_from_messages(fields.get("messages"))
    asked = typed(fields, ChatBody)
    _check(asked, setting.card)
    if asked.top_logprobs and not asked.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    if not asked.messages:
        raise BadRequest("messages is empty", param="messages")
    tokens = setting.tokenizer.chat([message.plain() for message in asked.messages])
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    prompts = [Prompt(tokens, asked, None, logprobs, chat=True)]
    jobs = plan(prompts, setting, "messages", asked.cache_salt or "", asked.priority or 0)
    return Call(jobs, bool(asked.stream), ChatReply(setting, _include_usage(asked), logprobs), handover=handover)


def _fields(body: bytes, neutral: dict[str, tuple[object, ...]]) -> tuple[dict[str, object], ForeignTicket | None]:
    fields = read_object(body)
    handover = take_handover(fields)
    for name in _IGNORED:
        fields.pop(name, None)
    drop_neutral(fields, neutral)
    return fields, handover


def _drop_from_messages(messages: object) -> None:
    """Remove empty fields of other features from messages, and name parts that are not text."""
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            drop_neutral(message, _NEUTRAL_MESSAGE, f"messages[{i}].")
            content = message.get("content")
            for part in content if isinstance(content, list) else ():
                if isinstance(part, dict) and part.get("type", "text") != "text":
                    raise BadRequest(f"messages[{i}].content: only text is supported", param=f"messages[{i}].content")


def _check(asked: Body, card: ModelCard) -> None:
    check_model(asked.model, card)
    if asked.stream_options and not asked.stream:
        raise BadRequest("stream_options needs stream to be true", param="stream_options")


def _prompts(prompt: str | list[str | int | list[int]], tokenizer: Tokenizer) -> list[TokenIds]:
    """A prompt is text, token ids, or a list of either (not a mixture)."""
    if isinstance(prompt, str):
        return [encode_text(tokenizer, prompt, "prompt")]
    if len(set(map(type, prompt))) > 1:
        raise BadRequest("prompt mixes text and token ids", param="prompt")
    if prompt and isinstance(prompt[0], int):  # nothing more is done with each of what may be many
        return [cast(TokenIds, prompt)]
    texts = [item for item in prompt if isinstance(item, str)]
    return [encode_text(tokenizer, text, "prompt") for text in texts] or [i for i in prompt if isinstance(i, list)]


def _include_usage(asked: Body) -> bool:
    return bool(asked.stream_options and asked.stream_options.include_usage)


# -- replies -----------------------------------------------------------------------------------------------------


class CachedTokens(Struct, frozen=True):
    """Prompt tokens that were not computed for this call."""

    cached_tokens: int


class Usage(Struct, frozen=True):
    """Token counts of a call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TokenLists(Struct, frozen=True):
    """Logprobs of ``/v1/completions``: parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]  # the chosen token is always among them
    text_offset: list[int]


class TopToken(Struct, frozen=True):
    """An alternative to a chosen token."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(Struct, frozen=True):
    """A chosen token of a chat answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopToken]


class ChatLogprobs(Struct, frozen=True):
    """Logprobs of ``/v1/chat/completions``."""

    content: list[ChosenToken]
    refusal: None = None


class TextChoice(Struct, frozen=True):
    """A choice of ``/v1/completions``, streamed or whole."""

    index: int
    text: str
    logprobs: TokenLists | None = None
    finish_reason: str | None = None


class Speech(Struct, frozen=True, omit_defaults=True):
    """The assistant's message or a piece of it."""

    role: str | None = None
    content: str | None = None


class MessageChoice(Struct, frozen=True):
    """A choice of a whole chat reply."""

    index: int
    message: Speech
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class DeltaChoice(Struct, frozen=True):
    """A choice of a streamed chat chunk."""

    index: int
    delta: Speech
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class Completion(Struct, frozen=True):
    """Any reply or chunk. ``usage`` is absent from chunks unless asked for, and then null in all but the last."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[TextChoice | MessageChoice | DeltaChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelEntry(Struct, frozen=True):
    """One entry of ``/v1/models``."""

    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = "twostroke"


class ModelList(Struct, frozen=True):
    """Reply of ``/v1/models``."""

    data: list[ModelEntry]
    object: str = "list"


def models(card: ModelCard) -> ModelList:
    """Reply of ``/v1/models``."""
    return ModelList([ModelEntry(card.name, card.created, card.max_model_len)])


def usage(choices: Sequence[Choice]) -> Usage:
    """Token counts of a call."""
    prompt, output, cached = token_counts(choices)
    return Usage(prompt, output, prompt + output, CachedTokens(cached))


class CompletionReply:
    """Writes ``/v1/completions``."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, setting: Setting, include_usage: bool, logprobs: int | None) -> None:
        self._setting = setting
        self._include_usage = include_usage
        self._logprobs = logprobs
        self._offsets: dict[int, int] = {}  # by choice: characters of its tokens so far

    def opening(self, choices: Sequence[Choice]) -> bytes:
        return b""

    def chunk(self, choice: Choice, delta: Delta) -> bytes:
        if not (delta.text or choice.finish or (self._logprobs is not None and delta.tokens)):
            return b""
        return event(self._chunk([self._piece(choice, delta)]))

    def closing(self, choices: Sequence[Choice]) -> bytes:
        return event(self._chunk([], usage(choices))) if self._include_usage else b""

    def whole(self, choices: Sequence[Choice]) -> bytes:
        return encode(self._reply(self.kind, [self._full(choice) for choice in choices], usage(choices)))

    def _piece(self, choice: Choice, delta: Delta) -> TextChoice | DeltaChoice:
        return TextChoice(choice.index, delta.text, self._lists(choice.index, delta.tokens), choice.finish)

    def _full(self, choice: Choice) -> TextChoice | MessageChoice:
        return TextChoice(choice.index, choice.text, self._lists(choice.index, choice.tokens), choice.finish)

    def _chunk(self, choices: Sequence[TextChoice | DeltaChoice], counts: Usage | None = None) -> Completion:
        return self._reply(self.chunk_kind, choices, counts if self._include_usage else UNSET)

    def _reply(
        self,
        kind: str,
        choices: Sequence[TextChoice | MessageChoice | DeltaChoice],
        counts: Usage | UnsetType | None,
    ) -> Completion:
        setting = self._setting
        return Completion(f"{self.prefix}-{setting.http_id}", kind, setting.now, setting.card.name, choices, counts)

    def _lists(self, index: int, tokens: Sequence[Token]) -> TokenLists | None:
        if self._logprobs is None:
            return None
        piece = self._setting.tokenizer.piece
        texts, offsets, offset = [piece(token.id) for token in tokens], [], self._offsets.get(index, 0)
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self._offsets[index] = offset
        tops = [{piece(i): finite(p) for i, p in [*(t.top or ()), (t.id, t.logprob or 0.0)]} for t in tokens]
        return TokenLists(texts, [finite(token.logprob or 0.0) for token in tokens], tops, offsets)


class ChatReply(CompletionReply):
    """Writes ``/v1/chat/completions``."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, choices: Sequence[Choice]) -> bytes:
        start = Speech(role="assistant", content="")
        return b"".join(event(self._chunk([DeltaChoice(choice.index, start)])) for choice in choices)

    def _piece(self, choice: Choice, delta: Delta) -> DeltaChoice:
        speech = Speech(content=delta.text or None)
        return DeltaChoice(choice.index, speech, self._chosen(delta.tokens), choice.finish)

    def _full(self, choice: Choice) -> MessageChoice:
        speech = Speech(role="assistant", content=choice.text)
        return MessageChoice(choice.index, speech, self._chosen(choice.tokens), choice.finish)

    def _chosen(self, tokens: Sequence[Token]) -> ChatLogprobs | None:
        if self._logprobs is None:
            return None
        piece, raw = self._setting.tokenizer.piece, self._setting.tokenizer.token_bytes
        return ChatLogprobs(
            [
                ChosenToken(
                    piece(token.id),
                    finite(token.logprob or 0.0),
                    list(raw(token.id)),
                    [TopToken(piece(i), finite(logprob), list(raw(i))) for i, logprob in token.top or ()],
                )
                for token in tokens
            ]
        )
