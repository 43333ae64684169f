"""Every message that crosses a process or thread boundary, typed.

Wire form is JSON (msgspec). Unknown fields are refused, sizes are bounded by the reader, and ``PROTOCOL`` is
checked at attach, so two versions never talk past each other.
"""

from typing import Annotated, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

PROTOCOL = 7
MAX_JOURNAL = 64 << 20  # bytes; an answer that is longer cannot be continued elsewhere

T = TypeVar("T")
Role = Literal["both", "prefill", "decode"]
WorkerState = Literal["starting", "ready", "draining"]
FinishReason = Literal["stop", "length", "abort"]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Url = Annotated[str, Meta(min_length=1, max_length=512)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Host = Annotated[str, Meta(pattern=r"^([A-Za-z0-9._-]{1,253}|\[?[0-9A-Fa-f:.]{2,45}\]?)\Z")]  # a name or an address
Address = Annotated[str, Meta(pattern=r"^[0-9A-Fa-f:.]{2,45}(%[0-9A-Za-z._-]{1,32})?\Z")]  # numeric: nobody is asked
HexKey = Annotated[str, Meta(pattern="^[0-9a-f]{48}\\Z")]  # of a block
Room = Annotated[int, Meta(ge=0, le=2**63 - 1)]

REQUEST_ID_HEADER = "x-request-id"
TICKET_HEADER = "x-twostroke-handover"
JOURNAL_HEADER = "x-twostroke-journal"
ATTEMPT_HEADER = "x-twostroke-attempt"  # of an abort: it means this attempt of the request alone
ALIVE_HEADER = "x-twostroke-alive"  # of a request: who sends it wants signs of life, and understands them
ALIVE_SECONDS = 1.0  # of saying nothing, after which there is one
TENANT_HEADER = "x-twostroke-tenant"  # the salt of requests that name none; believed with the secret
SECRET_HEADER = "x-twostroke-secret"  # noqa: S105 - the header's name, not a secret


# -- requests, from the API to the engine ------------------------------------------------------------------------


class Sampling(Struct, frozen=True, forbid_unknown_fields=True):
    """How to pick tokens. Values are already validated and every default is resolved (``seed`` too)."""

    max_tokens: int
    seed: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives to report; 0 reports the chosen token's only; None is off

    @property
    def needs_history(self) -> bool:
        """Whether the next token depends on which tokens came before, other than through the network."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class Request(Struct, frozen=True, forbid_unknown_fields=True):
    """One sequence to complete. ``n`` choices of one prompt are n requests with the same ``prompt_index``."""

    id: str  # unique in the worker: "<x-request-id>/<prompt index>/<choice>"
    prompt: list[int]  # token ids, at least one
    sampling: Sampling
    prompt_index: int = 0
    choice: int = 0
    salt: str = ""  # tenant salt, part of every block key
    priority: int = 0  # smaller is served first
    output: list[int] = []  # tokens that were generated elsewhere already; at least one less than ``max_tokens``

    @property
    def http_id(self) -> str:
        """The ``x-request-id`` of the HTTP request that this sequence belongs to."""
        return self.id.rsplit("/", 2)[0]


class Token(Struct, frozen=True):
    """One sampled token. ``logprob`` and ``top`` (id, logprob; best first) are set when logprobs were asked for."""

    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


class Output(Struct, frozen=True):
    """What one engine step (or the producer's first token) adds to a request."""

    tokens: list[Token]
    finish: FinishReason | None = None
    cached_tokens: int = 0  # prompt tokens that were not computed for this request on any worker


class ModelCard(Struct, frozen=True):
    """What clients may ask of the model that is served."""

    name: str
    vocab_size: int  # token ids are 0 .. vocab_size - 1
    max_model_len: int  # prompt + output tokens
    eos_token_ids: frozenset[int]
    created: int  # unix seconds


# -- the hand-over, between router, producer (P) and consumer (D) ------------------------------------------------


class Ticket(Struct, frozen=True, forbid_unknown_fields=True):
    """The router's word to one end of a hand-over, as JSON in the header ``x-twostroke-handover``."""

    id: Name  # one per HTTP request; prompts of it hand over as "<id>/<prompt index>"
    side: Literal["produce", "consume"]
    attempt: Count = 0
    peer: Url | None = None  # the producer's URL, for the consumer
    same_body: bool = True  # both ends are sent the same body, so that P's first token is D's; else only the prompt is
    waits: bool = True  # the consumer, for slots; else it answers 429 (``NoRoom``) at once if it has none


class Attach(Struct, frozen=True, forbid_unknown_fields=True):
    """D → P, opens the hand-over. The reply is a stream of ``Event``s, one JSON object a line."""

    handover: Name
    attempt: Count
    fingerprint: Name  # of the layout: both ends must hold the same model, dtype and block size
    have: Count  # full blocks of the prefix that D holds already
    prompt: (
        Name  # ``prompt_key`` of D's prompt: whoever brought the two ends together may have shown them different ones
    )
    protocol: int = PROTOCOL


class MemoryFile(Struct, frozen=True, tag="file", forbid_unknown_fields=True):
    """A pool in the memory file ``/proc/<pid>/fd/<fd>``, whose header is stamped with the owner's instance."""

    kind: ClassVar[str] = "a memory file"
    link: ClassVar[str] = "shm"  # the name of the link that reads it
    fd: Count


class CudaMemory(Struct, frozen=True, tag="cuda", forbid_unknown_fields=True):
    """A pool in a CUDA allocation that its owner exports to other processes (CUDA IPC)."""

    kind: ClassVar[str] = "GPU memory"
    link: ClassVar[str] = "cuda-ipc"
    device: Annotated[str, Meta(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")]  # the GPU's UUID
    handle: Annotated[str, Meta(pattern=r"^[0-9a-f]{128}\Z")]  # the 64 bytes of its cudaIpcMemHandle_t
    offset: Annotated[int, Meta(ge=0, le=2**48)]  # bytes from the allocation's start to the first slot


class TcpEndpoint(Struct, frozen=True, tag="tcp", forbid_unknown_fields=True):
    """A pool whose owner sends slots itself, to whoever knows the cluster secret and has a hand-over for them."""

    kind: ClassVar[str] = "behind a TCP port"
    link: ClassVar[str] = "tcp"
    host: Address
    port: Port


class NixlMemory(Struct, frozen=True, tag="nixl", forbid_unknown_fields=True):
    """A pool that is registered with a NIXL agent of its owner: read without the owner doing anything."""

    kind: ClassVar[str] = "registered with NIXL"
    link: ClassVar[str] = "nixl"
    segment: Literal["DRAM", "VRAM"]
    device: Count  # the owner's index of its GPU; 0 in host memory
    base: Annotated[int, Meta(ge=0, lt=2**57)]  # of the first slot, in the owner's address space
    agent: Annotated[bytes, Meta(min_length=1, max_length=64 << 10)]  # what NIXL has to know of the owner's agent
    proof: Annotated[bytes, Meta(min_length=32, max_length=32)]  # HMAC of the whole address under the cluster secret


class PoolAddress(Struct, frozen=True, forbid_unknown_fields=True):
    """One way in which a worker's pool can be read."""

    host: Name  # ``host_id`` of the machine; another machine cannot map the memory
    pid: Count  # of the process that owns it
    instance: Name  # of the worker: a pid can be reused
    num_slots: Count
    block_bytes: Count
    memory: MemoryFile | CudaMemory | NixlMemory | TcpEndpoint


class Posted(Struct, frozen=True, forbid_unknown_fields=True):
    """Where a process on P's machine sees whether P's lease is alive (``kv/board.py``)."""

    board: PoolAddress  # of one slot, which is all cells
    cell: Count
    number: Annotated[int, Meta(ge=1, lt=2**62)]  # that is in the cell as long as it is


class Opened(Struct, frozen=True, tag="opened", forbid_unknown_fields=True):
    """P → D, first event: every way in which P's pool can be read. D takes the best that it has too."""

    pools: Annotated[tuple[PoolAddress, ...], Meta(min_length=1, max_length=8)]
    posted: Posted | None = None


class Published(Struct, frozen=True, tag="published", forbid_unknown_fields=True):
    """P → D: blocks ``first .. first + len(slots) - 1`` of the request are complete in these slots, and leased."""

    first: Count
    slots: Annotated[list[Count], Meta(max_length=1 << 20)]


class Sampled(Struct, frozen=True, tag="sampled", forbid_unknown_fields=True):
    """P → D: the first token, and how many prompt tokens P did not compute. Travels before the last blocks."""

    output: Output


class Alive(Struct, frozen=True, tag="alive", forbid_unknown_fields=True):
    """P → D, when nothing else was sent for a while: still there, still computing."""


class Ended(Struct, frozen=True, tag="ended", forbid_unknown_fields=True):
    """P → D: nothing more will be published. ``error`` says why if that is too early."""

    error: str | None = None


Event = Opened | Published | Sampled | Alive | Ended


class Confirm(Struct, frozen=True, forbid_unknown_fields=True):
    """D → P, after reading: was the lease alive? ``release`` ends it."""

    handover: Name
    attempt: Count
    instance: Name
    blocks: Count  # D has read the first `blocks` blocks
    release: bool = False


class Confirmed(Struct, frozen=True, forbid_unknown_fields=True):
    """P → D: whether the lease was alive when the ``Confirm`` arrived; only then do the read blocks count."""

    alive: bool


class Writing(Struct, frozen=True, forbid_unknown_fields=True):
    """D → P: do you still compute this hand-over's prompt, whose blocks go through the store? → ``Confirmed``"""

    handover: Name
    attempt: Count


class Abandon(Struct, frozen=True, forbid_unknown_fields=True):
    """Router → P: nobody will consume this hand-over, though P may have finished its part."""

    handover: Name  # all prompts of the ticket with this id
    attempt: Count


# -- a hand-over in other routers' words, in the body of a request --------------------------------------------------


class Bootstrap(Struct, frozen=True):
    """SGLang's word to both ends, in the body of a request: the producer's address, and a number for the hand-over."""

    host: Host
    port: Port
    room: Room


class KvTransfer(Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's word to one end (``kv_transfer_params``). The producer's reply carries the one for the consumer, which the
    router passes on as it is.
    """

    do_remote_decode: bool = False  # to the producer
    do_remote_prefill: bool = False  # to the consumer, and then all that follows is set
    remote_engine_id: Name | None = None  # the producer's instance
    remote_host: Host | None = None
    remote_port: Port | None = None
    remote_request_id: Annotated[str, Meta(pattern="^[0-9a-f]{32}\\Z")] | None = None  # names the hand-over
    signature: Annotated[str, Meta(pattern="^[0-9a-f]{64}\\Z")] | None = None  # by who knows the cluster secret


ForeignTicket = Bootstrap | KvTransfer  # of another router


# -- the journal, between a router and the worker that answers ----------------------------------------------------


class Journal(Struct, frozen=True, forbid_unknown_fields=True):
    """The router's word to the worker that streams an answer, as JSON in the header ``x-twostroke-journal``: write down
    what is needed to continue it elsewhere, and continue it where the journal so far ends.

    The journal, lines of JSON ``list[Sent]``, stands in front of the body. A stream with a journal consists of frames
    ``:<size> <line>\\n<events>``: ``size`` bytes of events, and what they send. (To a client the first line of a frame
    would be a comment.) An empty frame is a sign of life. Of an answer that is not streamed there is no journal.
    """

    size: Annotated[int, Meta(ge=0, le=MAX_JOURNAL)]  # bytes of the journal so far
    created: Annotated[int, Meta(ge=0, le=2**53)]  # unix seconds: when the answer says that it was created
    attempt: Count = 0  # of the request, by the router


class Sent(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An ``Output`` of one choice that the client has seen all of. Tokens with log-probabilities are whole."""

    choice: Count  # its index in the reply
    tokens: list[int | Token]
    finish: FinishReason | None = None
    cached_tokens: Count = 0


# -- what a worker says of itself --------------------------------------------------------------------------------


class Slots(Struct, frozen=True, forbid_unknown_fields=True):
    """The pool's account; ``free + cached + leased == total`` at all times."""

    total: int
    free: int
    cached: int
    leased: int


class TierReport(Struct, frozen=True):
    """What became of a tier of a store so far. Numbers are blocks unless they say otherwise."""

    name: str
    in_service: bool
    reason: str  # why it is out of service
    capacity: int  # bytes it may use
    used: int  # bytes
    blocks: int
    evictions: int
    damaged: int  # that did not verify
    pinned: int = 0
    hits: int = 0  # that it gave to requests
    misses: int = 0  # of requests that it did not have
    written: int = 0
    dropped: int = 0  # not written: the queue was full, or they were gone before their turn
    faults: int = 0  # calls that failed
    read_bytes: int = 0
    written_bytes: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0


class Manage(Struct, frozen=True, forbid_unknown_fields=True):
    """To a worker or a cache service, from people (``twostroke kv``): do this to the blocks of your store."""

    action: Literal["stats", "ls", "verify", "gc", "clear", "pin", "unpin"]
    tier: Name | None = None  # only the one of this name
    keys: Annotated[list[HexKey], Meta(max_length=1024)] | None = None  # None is all
    prompt: str | None = None  # instead: text, by its blocks; to a worker
    salt: Annotated[str, Meta(max_length=256)] = ""  # of that
    limit: Count = 50  # blocks to list


class StoredBlock(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A block of a tier."""

    key: HexKey
    length: Count  # bytes
    written: float | None  # unix seconds, where that is known
    pinned: bool


class ManagedTier(Struct, frozen=True, forbid_unknown_fields=True):
    """What became of a ``Manage`` on one tier."""

    report: TierReport
    layout: str  # fingerprint
    changed: Count = 0  # blocks that were pinned, unpinned or removed
    good: Count = 0
    damaged: Count = 0
    blocks: list[StoredBlock] = []
    problem: str = ""  # why nothing was done


class Managed(Struct, frozen=True, forbid_unknown_fields=True):
    """Reply to a ``Manage``."""

    tiers: list[ManagedTier]


class WorkerInfo(Struct, frozen=True):
    """Reply of ``GET /internal/info``: the worker as its router sees it."""

    id: str  # "prefill-0": stable across restarts
    instance: str  # fresh for each process
    role: Role
    url: str
    pid: int
    state: WorkerState
    detail: str  # what it is doing while it starts
    model: str
    fingerprint: str  # of the layout; empty while starting
    link: str  # the links that this worker offers, best first: "shm, tcp"
    slots: Slots
    running: int  # requests that compute
    waiting: int  # requests that wait for slots or a turn
    queued_tokens: int  # tokens still to compute of running and waiting prompts
    threads: int
    device: str = "cpu"  # as torch names it, such as "cuda:0"
    dtype: str = ""  # of the KV cache; empty while starting
    block_tokens: int = 0  # of the layout; 0 while starting
    assigned: Role | None = None  # what this process was told to be used for, by a call; routers come and go
    protocol: int = PROTOCOL


class Join(Struct, frozen=True, forbid_unknown_fields=True):
    """Worker → router, every second: I am here. A router that does not know the worker, or not so, takes a look."""

    url: Url  # where it listens; the router knows better if that is "all addresses"
    instance: Name
    role: Role  # what to use it for, unless the router was told otherwise
    state: WorkerState
    protocol: int = PROTOCOL


class Leave(Struct, frozen=True, forbid_unknown_fields=True):
    """Worker → router: I am done, and go."""

    url: Url
    instance: Name


class Drain(Struct, frozen=True, forbid_unknown_fields=True):
    """To a worker, also through its router: take nothing new, finish, serve your KV to who needs it, then leave."""

    seconds: Annotated[float, Meta(ge=0, le=86400)] | None = None  # then leave anyway; None is the worker's own setting


class Assign(Struct, frozen=True, forbid_unknown_fields=True):
    """To a router: use a worker for this from now on; it tells the worker, which remembers it for all routers."""

    role: Role


class TimelineEvent(Struct, frozen=True, gc=False):
    """One lifecycle stamp of a request. ``time`` is unix seconds, comparable on one host."""

    event: str
    worker: str
    time: float
    detail: dict[str, str | int | float] = {}


encode = msgspec.json.encode


def decode(data: bytes | bytearray | str, type_: type[T]) -> T:
    """A message that somebody sent. ``ValueError`` if it is none: not JSON, not UTF-8, nested too deeply, or not so."""
    try:
        return msgspec.json.decode(data, type=type_)
    except RecursionError:
        raise ValueError("nested too deeply") from None
