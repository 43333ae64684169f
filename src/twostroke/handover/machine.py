"""The hand-over of one request, as two pure tables: one for the producer (P), one for the consumer (D).

``(state, event) → (state, actions)``. An event that a state does not list is illegal and raises: a driver that gets
there has a bug, or a peer broke the protocol. There are no sockets, clocks or threads here; drivers
(`worker/producer.py`, `worker/consumer.py`) turn what happens into events and carry out the actions.
``docs/handover.md`` is generated from these tables (`diagram.py`).
"""

from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar


class ProducerState(Enum):
    """Where the producer's end is."""

    NEW = "nobody came yet"
    EXPECTED = "the consumer attached, the request is not here yet"
    COMPUTING = "prefill runs, nobody attached yet"
    STREAMING = "prefill runs, finished blocks are published to the consumer"
    HELD = "prefill is done, the blocks wait for a consumer under a lease"
    OFFERED = "prefill is done, everything is published, the consumer reads"
    CLOSED = "over: nothing is held"


class ProducerEvent(Enum):
    """What can happen to the producer's end."""

    REQUEST = "the router's request arrived"
    ATTACH = "the consumer attached"
    PROGRESS = "a chunk of the prompt is computed"
    FINISH = "prefill is done, the first token is known"
    CONFIRM = "the consumer read some blocks"
    RELEASE = "the consumer needs nothing more"
    DETACH = "the consumer's stream broke"
    FAIL = "the request failed or was aborted"
    EXPIRE = "nobody renewed the lease in time"


class ProducerAction(Enum):
    """What the producer's driver has to do."""

    COMPUTE = "submit the prefill to the engine"
    PUBLISH = "stream what is ready to the consumer"
    RENEW = "set the deadline anew"
    ABORT = "stop the prefill"
    RELEASE = "end the lease"


class ConsumerState(Enum):
    """Where the consumer's end is."""

    ATTACHING = "holds slots, asks the producer"
    PULLING = "copies blocks as they are published; its slots are in quarantine until the lease was seen alive"
    STREAMING = "the same, and the client has the first token"
    RESUMED = "over: the engine goes on from the verified blocks"
    CLOSED = "over: the request is finished or aborted"


class ConsumerEvent(Enum):
    """What can happen to the consumer's end."""

    OPENED = "the producer answered with its pool's address"
    PUBLISHED = "blocks are ready to be read"
    VERIFIED = "the lease was alive after the read"
    SAMPLED = "the first token came"
    SAMPLED_LAST = "the first token came, and ends the request"
    COMPLETE = "the producer ended well and every block is verified"
    LOST = "the producer failed, was silent too long, or its lease was dead"
    ABORT = "the client left"


class ConsumerAction(Enum):
    """What the consumer's driver has to do."""

    READ = "copy the published blocks, then see or ask whether the lease is alive"
    KEEP = "count the blocks that were read as loaded"
    EMIT = "send the first token to the client"
    RESUME = "let the engine go on from what is verified"
    RELEASE = "tell the producer that nothing more is needed"
    ABORT = "end the request in the engine"


State = TypeVar("State", bound=Enum)
Event = TypeVar("Event", bound=Enum)
Action = TypeVar("Action", bound=Enum)
Table = Mapping[tuple[State, Event], tuple[State, tuple[Action, ...]]]

_P, _p, _pa = ProducerState, ProducerEvent, ProducerAction
# A deadline runs in EXPECTED, HELD and OFFERED, where this end waits for the other. While prefill runs, the engine ends
# the state, or the consumer's stream that breaks.
PRODUCER: Table[ProducerState, ProducerEvent, ProducerAction] = {
    (_P.NEW, _p.REQUEST): (_P.COMPUTING, (_pa.COMPUTE,)),
    (_P.NEW, _p.ATTACH): (_P.EXPECTED, (_pa.RENEW,)),
    (_P.EXPECTED, _p.REQUEST): (_P.STREAMING, (_pa.COMPUTE,)),
    (_P.EXPECTED, _p.RELEASE): (_P.CLOSED, ()),
    (_P.EXPECTED, _p.DETACH): (_P.CLOSED, ()),
    (_P.EXPECTED, _p.FAIL): (_P.CLOSED, ()),
    (_P.EXPECTED, _p.EXPIRE): (_P.CLOSED, ()),
    (_P.COMPUTING, _p.ATTACH): (_P.STREAMING, (_pa.PUBLISH,)),
    (_P.COMPUTING, _p.PROGRESS): (_P.COMPUTING, ()),
    (_P.COMPUTING, _p.FINISH): (_P.HELD, (_pa.RENEW,)),
    (_P.COMPUTING, _p.FAIL): (_P.CLOSED, (_pa.ABORT, _pa.RELEASE)),
    (_P.STREAMING, _p.PROGRESS): (_P.STREAMING, (_pa.PUBLISH,)),
    (_P.STREAMING, _p.FINISH): (_P.OFFERED, (_pa.PUBLISH, _pa.RENEW)),
    (_P.STREAMING, _p.CONFIRM): (_P.STREAMING, ()),
    (_P.STREAMING, _p.RELEASE): (_P.CLOSED, (_pa.ABORT, _pa.RELEASE)),
    (_P.STREAMING, _p.DETACH): (_P.CLOSED, (_pa.ABORT, _pa.RELEASE)),
    (_P.STREAMING, _p.FAIL): (_P.CLOSED, (_pa.ABORT, _pa.RELEASE)),
    (_P.HELD, _p.ATTACH): (_P.OFFERED, (_pa.PUBLISH, _pa.RENEW)),
    (_P.HELD, _p.FAIL): (_P.CLOSED, (_pa.RELEASE,)),
    (_P.HELD, _p.EXPIRE): (_P.CLOSED, (_pa.RELEASE,)),
    (_P.OFFERED, _p.CONFIRM): (_P.OFFERED, (_pa.RENEW,)),
    (_P.OFFERED, _p.RELEASE): (_P.CLOSED, (_pa.RELEASE,)),
    (_P.OFFERED, _p.DETACH): (_P.CLOSED, (_pa.RELEASE,)),
    (_P.OFFERED, _p.FAIL): (_P.CLOSED, (_pa.RELEASE,)),
    (_P.OFFERED, _p.EXPIRE): (_P.CLOSED, (_pa.RELEASE,)),
}

_C, _c, _ca = ConsumerState, ConsumerEvent, ConsumerAction
CONSUMER: Table[ConsumerState, ConsumerEvent, ConsumerAction] = {
    (_C.ATTACHING, _c.OPENED): (_C.PULLING, ()),
    (_C.ATTACHING, _c.LOST): (_C.RESUMED, (_ca.RESUME,)),
    (_C.ATTACHING, _c.ABORT): (_C.CLOSED, (_ca.ABORT, _ca.RELEASE)),
    (_C.PULLING, _c.PUBLISHED): (_C.PULLING, (_ca.READ,)),
    (_C.PULLING, _c.VERIFIED): (_C.PULLING, (_ca.KEEP,)),
    (_C.PULLING, _c.SAMPLED): (_C.STREAMING, (_ca.EMIT,)),
    (_C.PULLING, _c.SAMPLED_LAST): (_C.CLOSED, (_ca.EMIT, _ca.ABORT, _ca.RELEASE)),
    (_C.PULLING, _c.COMPLETE): (_C.RESUMED, (_ca.RESUME, _ca.RELEASE)),
    (_C.PULLING, _c.LOST): (_C.RESUMED, (_ca.RESUME, _ca.RELEASE)),
    (_C.PULLING, _c.ABORT): (_C.CLOSED, (_ca.ABORT, _ca.RELEASE)),
    (_C.STREAMING, _c.PUBLISHED): (_C.STREAMING, (_ca.READ,)),
    (_C.STREAMING, _c.VERIFIED): (_C.STREAMING, (_ca.KEEP,)),
    (_C.STREAMING, _c.COMPLETE): (_C.RESUMED, (_ca.RESUME, _ca.RELEASE)),
    (_C.STREAMING, _c.LOST): (_C.RESUMED, (_ca.RESUME, _ca.RELEASE)),
    (_C.STREAMING, _c.ABORT): (_C.CLOSED, (_ca.ABORT, _ca.RELEASE)),
}


class IllegalEvent(Exception):
    """The table has no entry for this event in this state."""


class Machine(Generic[State, Event, Action]):
    """A state, and the only way to change it."""

    def __init__(self, table: Table[State, Event, Action], start: State) -> None:
        self._table = table
        self.state = start

    def on(self, event: Event) -> tuple[Action, ...]:
        """Take an event; returns the actions that it calls for, in order.

        Raises:
            IllegalEvent: the event cannot happen in the present state.
        """
        entry = self._table.get((self.state, event))
        if entry is None:
            raise IllegalEvent(f"{event.name} is illegal in {self.state.name}")
        self.state, actions = entry
        return actions

    def accepts(self, event: Event) -> bool:
        """Whether the event is legal now."""
        return (self.state, event) in self._table
