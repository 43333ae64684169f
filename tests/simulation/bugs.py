"""Bugs to plant, each of which breaks one rule that keeps the hand-over right. The simulation has to find them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

from twostroke.handover.machine import ProducerAction
from twostroke.kv import board
from twostroke.messages import Confirm, Confirmed
from twostroke.worker import consumer, producer, worker


@contextmanager
def unconfirmed() -> Iterator[None]:
    """Blocks count as soon as they are read: nobody asks whether the lease was alive."""

    async def confirm(self: consumer.Peer, message: Confirm) -> bool:
        return True

    with patch.object(consumer.Peer, "confirm", confirm):
        yield


@contextmanager
def confirmed_blindly() -> Iterator[None]:
    """The producer confirms whatever it is asked, also of leases that have ended."""
    confirm = producer.Producer.confirm

    def blindly(self: producer.Producer, message: Confirm) -> Confirmed:
        confirm(self, message)
        return Confirmed(alive=True)

    with patch.object(producer.Producer, "confirm", blindly):
        yield


@contextmanager
def not_quarantined() -> Iterator[None]:
    """A cancelled read is not waited for before its slots are given to somebody else."""

    async def end(task: object) -> None:
        if task is not None:
            task.cancel()  # type: ignore[attr-defined]

    with patch.object(worker, "end", end):
        yield


@contextmanager
def leased_for_ever() -> Iterator[None]:
    """No lease expires."""
    do = producer.Export._do

    def without_clock(self: producer.Export, action: ProducerAction) -> None:
        if action is not ProducerAction.RENEW:
            do(self, action)

    with patch.object(producer.Export, "_do", without_clock):
        yield


@contextmanager
def counted_before_read() -> Iterator[None]:
    """Blocks count as soon as they are published, before they were read."""
    read = consumer.Pull._read

    async def early(self: consumer.Pull) -> None:
        assert self._fresh is not None
        end = self._fresh.first + len(self._fresh.slots)
        self._engine.loaded(self._job, min(end * self._block_tokens, self._prompt))
        await read(self)

    with patch.object(consumer.Pull, "_read", early):
        yield


@contextmanager
def posted_for_ever() -> Iterator[None]:
    """The board says of a lease that has ended that it is alive."""
    with patch.object(board.Board, "clear", lambda self, posted: None):
        yield


BUGS: tuple[Callable[[], AbstractContextManager[None]], ...] = (
    unconfirmed,
    confirmed_blindly,
    not_quarantined,
    leased_for_ever,
    counted_before_read,
    posted_for_ever,
)
