"""Tickets for the hand-overs of other routers: whom to believe, and what to tell the other end.

What SGLang's and vLLM's routers say of a hand-over stands in a request's body, so anybody may have written it, and a
consumer sends the cluster secret to the producer that it is told of. So it believes only who knows the secret (by a
header, or by a signature under what the producer said), or who names one of the hosts that its operator has allowed.
"""

import hmac
from collections.abc import Collection
from hashlib import sha256
from uuid import uuid4

from msgspec.json import encode
from msgspec.structs import replace

from twostroke.config import is_loopback
from twostroke.errors import BadRequest, Unauthorized
from twostroke.messages import ForeignTicket, KvTransfer, Role, Ticket


class Tickets:
    """Turns other routers' words into tickets, for one worker."""

    def __init__(self, instance: str, secret: str, hosts: Collection[str], *, alone: bool) -> None:
        """A reader of such words.

        Args:
            instance: this worker's.
            secret: the cluster's; may be empty.
            hosts: producers that any request may name, as "host" or "host:port".
            alone: nobody beyond this machine reaches us. Without a secret, its own addresses are then allowed too.
        """
        self._instance = instance
        self._secret = secret
        self._hosts = frozenset(hosts)
        self._loopback = alone and not secret

    def read(self, word: ForeignTicket, role: Role, *, insider: bool) -> Ticket:
        """The ticket that is meant. SGLang's word does not say which end it is for: ``role`` does.

        Args:
            word: from a request's body.
            role: what this worker is for.
            insider: the request came with the cluster secret.

        Raises:
            BadRequest: the word cannot be meant for this worker.
            Unauthorized: it names a producer that this worker was not allowed to ask.
        """
        if isinstance(word, KvTransfer):
            return self._of_transfer(word, insider)
        if role == "both":
            raise BadRequest(
                "bootstrap fields do not say which end of the hand-over is meant: start this worker with "
                "--role prefill or --role decode",
                param="bootstrap_room",
            )
        ticket = Ticket(f"room-{word.room}", "produce")
        return ticket if role == "prefill" else self._consuming(ticket, word.host, word.port, believed=insider)

    def transfer(self, ticket: Ticket, host: str, port: int) -> KvTransfer:
        """What a producer tells the consumer by way of vLLM's router: here, at this address of ours, is the KV."""
        transfer = KvTransfer(
            do_remote_prefill=True,
            remote_engine_id=self._instance,
            remote_host=host,
            remote_port=port,
            remote_request_id=ticket.id,
        )
        return replace(transfer, signature=self._sign(transfer)) if self._secret else transfer

    def _of_transfer(self, word: KvTransfer, insider: bool) -> Ticket:
        if word.do_remote_decode:
            return Ticket(uuid4().hex, "produce", same_body=False)
        if word.remote_host is None or word.remote_port is None or word.remote_request_id is None:
            raise BadRequest("kv_transfer_params are not those of a twostroke worker", param="kv_transfer_params")
        ticket = Ticket(word.remote_request_id, "consume", same_body=False)
        signed = bool(self._secret) and hmac.compare_digest(word.signature or "", self._sign(word))
        return self._consuming(ticket, word.remote_host, word.remote_port, believed=insider or signed)

    def _consuming(self, ticket: Ticket, host: str, port: int, *, believed: bool) -> Ticket:
        host = host.strip("[]")
        named = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        allowed = not self._hosts.isdisjoint({host, named}) or (self._loopback and is_loopback(host))
        if not (believed or allowed):
            raise Unauthorized(f"this worker may not fetch KV from {named}: allow it with --bootstrap-hosts {named}")
        return replace(ticket, side="consume", peer=f"http://{named}")

    def _sign(self, word: KvTransfer) -> str:
        """HMAC-SHA256, in hex, over everything that a consumer acts upon."""
        said = [word.remote_engine_id, word.remote_host, word.remote_port, word.remote_request_id]
        return hmac.new(self._secret.encode(), b"kv_transfer_params " + encode(said), sha256).hexdigest()
