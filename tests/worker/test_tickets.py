"""Whom a worker believes when a request's body speaks of a hand-over."""

import pytest
from msgspec.structs import replace

from twostroke.errors import BadRequest, Unauthorized
from twostroke.messages import Bootstrap, KvTransfer, Role, Ticket
from twostroke.worker.tickets import Tickets

ROOM = Bootstrap("10.0.0.1", 8100, 7)
LOCAL = Bootstrap("127.0.0.1", 8100, 7)


def tickets(*hosts: str, secret: str = "s3cret", instance: str = "me", alone: bool = True) -> Tickets:
    return Tickets(instance, secret, hosts, alone=alone)


def produced(by: Tickets) -> KvTransfer:
    """What a producer at 10.0.0.1:8100 tells the consumer."""
    return by.transfer(by.read(KvTransfer(do_remote_decode=True), "both", insider=False), "10.0.0.1", 8100)


# -- SGLang's words --------------------------------------------------------------------------------------------------


def test_the_role_says_which_end_is_meant() -> None:
    reader = tickets("10.0.0.1")
    assert reader.read(ROOM, "prefill", insider=False) == Ticket("room-7", "produce")
    assert reader.read(ROOM, "decode", insider=False) == Ticket("room-7", "consume", peer="http://10.0.0.1:8100")
    with pytest.raises(BadRequest, match="--role"):
        reader.read(ROOM, "both", insider=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"])
def test_a_worker_alone_on_its_machine_takes_its_own_addresses(host: str) -> None:
    ticket = tickets(secret="").read(Bootstrap(host, 9, 7), "decode", insider=False)
    assert ticket.peer in (f"http://{host}:9", f"http://[{host}]:9")


@pytest.mark.parametrize(
    ("reader", "word"),
    [
        (tickets(secret=""), ROOM),
        (tickets(secret=""), Bootstrap("127.0.0.1.evil.example", 8100, 7)),
        (tickets(secret=""), Bootstrap("0.0.0.0", 8100, 7)),
        (tickets(secret="", alone=False), LOCAL),  # others reach this worker, and must not reach through it
        (tickets(), LOCAL),  # any process of the machine could listen there, and would be sent the secret
        (tickets("10.0.0.2", "10.0.0.1:8101", "10.0.0.10"), ROOM),
        (tickets("[::1]:8101"), Bootstrap("::1", 8100, 7)),
    ],
)
def test_nobody_is_asked_who_was_not_allowed(reader: Tickets, word: Bootstrap) -> None:
    with pytest.raises(Unauthorized, match="--bootstrap-hosts"):
        reader.read(word, "decode", insider=False)
    assert reader.read(word, "decode", insider=True).peer, "who knows the secret may name anybody"
    assert reader.read(word, "prefill", insider=False).peer is None, "a producer asks nobody"


@pytest.mark.parametrize("allowed", ["10.0.0.1", "10.0.0.1:8100"])
def test_allowed_hosts(allowed: str) -> None:
    assert tickets(allowed).read(ROOM, "decode", insider=False).peer == "http://10.0.0.1:8100"


@pytest.mark.parametrize("allowed", ["::1", "[::1]:8100"])
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_allowed_addresses_with_colons(allowed: str, host: str) -> None:
    word = Bootstrap(host, 8100, 7)
    assert tickets(allowed).read(word, "decode", insider=False).peer == "http://[::1]:8100"


# -- vLLM's words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
def test_what_a_producer_says_is_believed_by_who_shares_its_secret(role: Role) -> None:
    ticket = tickets().read(KvTransfer(do_remote_decode=True), role, insider=False)
    assert (ticket.side, ticket.same_body) == ("produce", False)
    word = tickets().transfer(ticket, "10.0.0.1", 8100)
    consumed = tickets(instance="another").read(word, role, insider=False)
    assert consumed == Ticket(ticket.id, "consume", peer="http://10.0.0.1:8100", same_body=False)


def test_every_hand_over_has_its_own_name() -> None:
    assert produced(tickets()).remote_request_id != produced(tickets()).remote_request_id


@pytest.mark.parametrize(
    "forged",
    [
        {"signature": None},
        {"signature": "0" * 64},
        {"remote_host": "10.0.0.2"},
        {"remote_port": 8101},
        {"remote_request_id": "0" * 32},
        {"remote_engine_id": "another"},
    ],
)
def test_nothing_can_be_changed_in_what_a_producer_says(forged: dict[str, object]) -> None:
    word = replace(produced(tickets()), **forged)
    for reader in (tickets(), tickets(secret="")):
        with pytest.raises(Unauthorized):
            reader.read(word, "decode", insider=False)
    assert tickets().read(word, "decode", insider=True).peer
    assert tickets("10.0.0.1", "10.0.0.2").read(word, "decode", insider=False).peer


def test_another_secret() -> None:
    with pytest.raises(Unauthorized):
        tickets().read(produced(tickets(secret="other")), "decode", insider=False)


def test_without_a_secret_nothing_is_signed_and_only_this_machine_is_believed() -> None:
    word = produced(tickets(secret=""))
    assert word.signature is None
    with pytest.raises(Unauthorized):
        tickets(secret="").read(word, "decode", insider=False)
    assert tickets(secret="").read(replace(word, remote_host="127.0.0.1"), "decode", insider=False).peer
    unkeyed = replace(word, signature=tickets(secret="")._sign(word))
    with pytest.raises(Unauthorized):
        tickets(secret="").read(unkeyed, "decode", insider=False)


@pytest.mark.parametrize("field", ["remote_host", "remote_port", "remote_request_id"])
def test_what_another_engine_says(field: str) -> None:
    word = replace(produced(tickets()), **{field: None})
    with pytest.raises(BadRequest, match="not those of a twostroke worker"):
        tickets().read(word, "decode", insider=True)
