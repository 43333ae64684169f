"""A worker without a model, for measuring the router alone: answers at once with canned tokens.

python -m benchmarks.upstream PORT
"""

import asyncio
import sys

from starlette.types import Receive, Scope, Send

from twostroke.api.http import DONE, header, read_body
from twostroke.api.server import bind, serve
from twostroke.messages import JOURNAL_HEADER, Slots, WorkerInfo, encode

_TOKEN = b'data: {"id":"cmpl-0","object":"text_completion","choices":[{"index":0,"text":" token"}]}\n\n'


class Upstream:
    """Streams as many events as the body says, each a write of its own; with a journal when the router asks for it."""

    def __init__(self, port: int) -> None:
        self._info = encode(
            WorkerInfo(
                id=f"upstream-{port}", instance=str(port), role="both", url=f"http://127.0.0.1:{port}", pid=0,
                state="ready", detail="", model="none", fingerprint="", link="none",
                slots=Slots(total=0, free=0, cached=0, leased=0), running=0, waiting=0, queued_tokens=0, threads=1,
            )
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(scope, receive, 1 << 20)
        stream = scope["path"] == "/v1/completions"
        content_type = b"text/event-stream" if stream else b"application/json"
        journaled = header(scope, JOURNAL_HEADER) is not None
        headers = [(b"content-type", content_type), *([(JOURNAL_HEADER.encode(), b"1")] if journaled else [])]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if stream:
            for token in range(int(body)):
                line = b":%d [[0,[%d],null,0]]\n" % (len(_TOKEN), token) if journaled else b""
                await send({"type": "http.response.body", "body": line + _TOKEN, "more_body": True})
                await asyncio.sleep(0)  # a token is a turn of the loop, as it is with a model
            end = b":%d \n" % len(DONE) if journaled else b""
            await send({"type": "http.response.body", "body": end + DONE, "more_body": True})
        await send({"type": "http.response.body", "body": b"" if stream else self._info})


async def main(port: int) -> None:
    """Serve until a signal."""
    await serve(Upstream(port), bind("127.0.0.1", port), shutdown_seconds=1)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
