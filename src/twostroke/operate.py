"""What ``twostroke workers`` asks of a running router."""

import json
import urllib.error
import urllib.request
from urllib.parse import quote

import msgspec
from rich.console import Console
from rich.table import Table

from twostroke.config import check_urls, cluster_secret
from twostroke.errors import StartupError
from twostroke.lent import secret_of
from twostroke.messages import SECRET_HEADER, Assign, Drain, Role, encode
from twostroke.router.worker import WorkerReport

_SECONDS = 10.0


class Operator:
    """Calls one router. Everything raises ``StartupError`` with the router's own words if it refuses."""

    def __init__(self, url: str) -> None:
        check_urls([url])
        self._url = url.rstrip("/")
        self._console = Console(highlight=False)

    def show(self) -> int:
        """Print all workers."""
        table = Table("worker", "role", "state", "URL", "requests", "slots used", "detail", box=None, pad_edge=False)
        for worker in msgspec.json.decode(self._ask("/workers"), type=list[WorkerReport]):
            state = worker.state if worker.breaker == "closed" else f"{worker.state}, breaker {worker.breaker}"
            used = f"{worker.slots.leased}/{worker.slots.total}"
            requests = str(max(worker.in_flight, worker.running + worker.waiting))
            table.add_row(worker.id, worker.role, state, worker.url, requests, used, worker.detail)
        self._console.print(table)
        return 0

    def drain(self, worker: str, seconds: float | None) -> int:
        """Have a worker finish and leave."""
        return self._tell(worker, "drain", encode(Drain(seconds)))

    def assign(self, worker: str, role: Role) -> int:
        """Change a worker's role."""
        return self._tell(worker, "role", encode(Assign(role)))

    def _tell(self, worker: str, what: str, message: bytes) -> int:
        body = self._ask(f"/workers/{quote(worker, safe=':/')}/{what}", message)
        report = msgspec.json.decode(body, type=WorkerReport)
        self._console.print(f"{report.id} ({report.role}): {report.state}, {report.detail}", markup=False)
        return 0

    def _ask(self, path: str, message: bytes | None = None) -> bytes:
        return ask(self._url, path, message, who="router")


def ask(url: str, path: str, message: bytes | None, *, who: str, seconds: float = _SECONDS) -> bytes:
    """What a process replies, at most so many seconds later; to a message, or to a question for what is at ``path``.

    Raises:
        StartupError: in its own words, it refuses; or nobody answers.
    """
    secret = cluster_secret() or secret_of(url)
    headers = {"content-type": "application/json", **({SECRET_HEADER: secret} if secret else {})}
    request = urllib.request.Request(url + path, data=message, headers=headers)  # noqa: S310 - checked
    try:
        with urllib.request.urlopen(request, timeout=seconds) as reply:  # noqa: S310 - checked
            body: bytes = reply.read()
            return body
    except urllib.error.HTTPError as error:
        raise StartupError(_reason(error.read()) or f"the {who} answers {error.code}") from error
    except OSError as error:
        raise StartupError(f"no {who} answers at {url}: {error}") from error


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
