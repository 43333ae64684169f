"""Hand-overs in the words of other routers, which stand in a request's body. Pure; whom to believe is not known here.

SGLang's router sends the same body to both ends and adds ``bootstrap_host``, ``bootstrap_port`` and ``bootstrap_room``,
as lists if there are several sequences. vLLM's asks the producer first, for one token and with ``kv_transfer_params``;
the consumer gets the client's own request, with the ``kv_transfer_params`` out of the producer's reply.
"""

from typing import Annotated, TypeVar

from msgspec import Meta, Struct
from msgspec.json import encode

from twostroke.api.call import MAX_SEQUENCES, typed
from twostroke.errors import BadRequest, ModelNotFound
from twostroke.messages import Bootstrap, ForeignTicket, Host, KvTransfer, ModelCard, Port, Room

T = TypeVar("T")
_UNNAMED = "unknown"  # as SGLang's router says if the client named none
_Several = Meta(min_length=1, max_length=MAX_SEQUENCES)
_PORT_MISSING = (
    "bootstrap_port is missing: name the prefill worker's port to the router, as in --prefill http://10.0.0.1:8100 8100"
)


class BootstrapFields(Struct, frozen=True, forbid_unknown_fields=True):
    """SGLang's fields, as they come."""

    bootstrap_host: Host | Annotated[list[Host], _Several] | None = None
    bootstrap_port: Port | Annotated[list[Port | None], _Several] | None = None
    bootstrap_room: Room | Annotated[list[Room], _Several] | None = None


def check_model(name: str | None, card: ModelCard) -> None:
    """Refuse a request for another model.

    Raises:
        ModelNotFound: it is not the one that is served here.
    """
    if name not in (None, _UNNAMED, card.name):
        raise ModelNotFound(f"the model {name!r} is not served here; {card.name!r} is", param="model")


def take_handover(fields: dict[str, object]) -> ForeignTicket | None:
    """Remove from a body what another router says of a hand-over; None if that is nothing.

    Raises:
        BadRequest: it makes no sense.
    """
    bootstrap = _bootstrap({name: fields.pop(name) for name in BootstrapFields.__struct_fields__ if name in fields})
    transfer = _transfer(fields.pop("kv_transfer_params", None))
    if bootstrap and transfer:
        raise BadRequest("give either kv_transfer_params or bootstrap fields", param="kv_transfer_params")
    if transfer and transfer.do_remote_decode:  # of the producer's one token, whatever a router writes here
        fields.pop("min_tokens", None)
    return bootstrap or transfer


def add_transfer(answer: bytes, transfer: KvTransfer) -> bytes:
    """A producer's reply, with what its consumer is to be told. A list has no place for that, and is left out."""
    word = b'{"kv_transfer_params":' + encode(transfer)
    return word + b"," + answer[1:] if answer.startswith(b"{") else word + b"}"


def _bootstrap(given: dict[str, object]) -> Bootstrap | None:
    """All sequences of a request are handed over by one producer; the first room names the hand-over of all."""
    fields = typed(given, BootstrapFields)
    host, port = _one(fields.bootstrap_host, "bootstrap_host"), _one(fields.bootstrap_port, "bootstrap_port")
    rooms = fields.bootstrap_room
    room = rooms[0] if isinstance(rooms, list) else rooms
    if room is None and host is None:
        return None
    if room is None or host is None:
        missing = "bootstrap_room" if room is None else "bootstrap_host"
        raise BadRequest(f"{missing} is missing", param=missing)
    if port is None:
        raise BadRequest(_PORT_MISSING, param="bootstrap_port")
    return Bootstrap(host, port, room)


def _one(value: T | list[T] | list[T | None] | None, name: str) -> T | None:
    if not isinstance(value, list):
        return value
    if any(other != value[0] for other in value):
        raise BadRequest(f"{name}: all sequences of a request must come from one prefill worker", param=name)
    return value[0]


def _transfer(given: object) -> KvTransfer | None:
    """Fields that are null say nothing, so unknown ones may be; a router writes them for connectors of many kinds."""
    if given is None:
        return None
    if isinstance(given, dict):
        given = {name: value for name, value in given.items() if value is not None}
    transfer = typed(given, KvTransfer, "kv_transfer_params.")
    if transfer.do_remote_decode and transfer.do_remote_prefill:
        raise BadRequest("a worker cannot be both ends of a hand-over", param="kv_transfer_params")
    return transfer if transfer.do_remote_decode or transfer.do_remote_prefill else None
