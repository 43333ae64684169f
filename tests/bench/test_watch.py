"""What is read of servers' metrics, and that a server which has none, or breaks, costs nothing but the samples."""

import asyncio

import pytest
from starlette.types import Receive, Scope, Send

from twostroke.api.http import reply
from twostroke.api.lifecycle import Gauges, Lifecycle, StoreCollector
from twostroke.api.serving import bind, serve
from twostroke.bench import watch
from twostroke.bench.watch import Watched, read_metrics, watching
from twostroke.messages import TierReport


def ours() -> str:
    """The metrics of a worker, as it writes them."""
    lifecycle = Lifecycle("decode-0")
    lifecycle.watch(lambda: Gauges(3, 2))
    lifecycle.received("shm", 2, 1000)
    lifecycle.collect(
        StoreCollector(lambda: [TierReport("host", True, "", 100, 50, 1, 0, 0, read_bytes=7, written_bytes=9)])
    )
    return lifecycle.metrics().decode()


def test_our_metrics_are_read_by_their_names() -> None:
    assert read_metrics(ours()) == {
        "running": 3, "waiting": 2, "link shm": 1000, "tier host, read": 7, "tier host, written": 9
    }  # fmt: skip


def test_metrics_of_vllm_and_sglang() -> None:
    vllm = "".join(f'vllm:num_requests_running{{engine="{i}",model_name="m"}} {n}.0\n' for i, n in enumerate((1, 2)))
    assert read_metrics(f"# TYPE vllm:num_requests_running gauge\n{vllm}vllm:num_requests_waiting 4.0\n") == {
        "running": 3, "waiting": 4
    }  # fmt: skip
    assert read_metrics('sglang:num_queue_reqs{tp_rank="0"} 5.0\npython_info 1.0\n') == {"waiting": 5}


def test_a_server_that_does_not_answer_leaves_a_gap() -> None:
    watched = Watched()
    watched.add(0.0, {"a": {"running": 1}})
    watched.add(0.5, {"b": {"running": 2, "link shm": 0, "link tcp": 0}})
    watched.add(1.0, {"a": {"running": 0}, "b": {"running": 3, "link shm": 5, "link tcp": 0}})
    watched.drop_idle()
    assert watched == Watched(
        [0.0, 0.5, 1.0], {"a": {"running": [1, None, 0]}, "b": {"running": [None, 2, 3], "link shm": [None, 0, 5]}}
    )
    watched.thin()
    assert watched == Watched(
        [0.0, 1.0], {"a": {"running": [1, 0]}, "b": {"running": [None, 3], "link shm": [None, 5]}}
    )


async def in_pieces(send: Send, body: bytes) -> None:
    """As a long answer arrives."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for start in range(0, len(body), 1000):
        await send({"type": "http.response.body", "body": body[start : start + 1000], "more_body": True})
        await asyncio.sleep(0.001)
    await send({"type": "http.response.body", "body": b""})


class Front:
    """A router of two workers, of which one has no metrics; or, without workers, a server of its own."""

    def __init__(self, *, routes: bool) -> None:
        self.routes = routes
        self.url = ""
        self.scrapes = 0
        self.enough = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path == "/workers" and self.routes:
            workers = ",".join(f'{{"id":"{name}","url":"{self.url}/{name}"}}' for name in ("decode-0", "broken"))
            await reply(send, f"[{workers}]".encode())
        elif path in ("/decode-0/metrics", "/metrics"):
            self.scrapes += 1
            if self.scrapes == 6:
                self.enough.set()
            await in_pieces(send, ours().encode())
        elif path == "/broken/metrics":
            await reply(send, b"twostroke_num_requests_running many\n")
        else:
            await reply(send, b"", 404)


@pytest.mark.parametrize(("routes", "name"), [(True, "decode-0"), (False, "server")])
async def test_every_worker_is_looked_at(routes: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "INTERVAL", 0.01)
    monkeypatch.setattr(watch, "MOST", 4)
    front, stop, sock = Front(routes=routes), asyncio.Event(), bind("127.0.0.1", 0)
    front.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    task = asyncio.create_task(serve(front, sock, shutdown_seconds=0, stop=stop))
    async with watching(front.url) as watched, asyncio.timeout(20):
        await front.enough.wait()
    stop.set()
    await task
    assert list(watched.values) == [name], "what is no metric is left out"
    assert set(watched.values[name]["running"]) == {3}
    assert len(watched.times) == len(watched.values[name]["waiting"]) <= 4
    assert watched.times == sorted(watched.times)
    assert "link shm" not in watched.values[name], "it did not move"


async def test_an_endless_answer_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_MAX_BYTES", 2000)
    front, stop, sock = Front(routes=False), asyncio.Event(), bind("127.0.0.1", 0)
    task = asyncio.create_task(serve(front, sock, shutdown_seconds=0, stop=stop))
    async with watching(f"http://127.0.0.1:{sock.getsockname()[1]}") as watched:
        pass
    stop.set()
    await task
    assert (front.scrapes > 0, watched.values) == (True, {})


async def test_nobody_is_there() -> None:
    async with watching("http://127.0.0.1:9") as watched:
        pass
    assert watched.values == {}
