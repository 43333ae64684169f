"""The terminal chat, against a scripted server on a real socket."""

import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import pytest

from twostroke.chat import Chat, ChatBody, Message
from twostroke.errors import StartupError

MODELS = b'{"object":"list","data":[{"id":"scripted"}]}'
HELLO = (
    b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    b'data: {"choices":[{"delta":{"content":"Hel"}}]}\n\n'
    b'data: {"choices":[{"delta":{"content":"lo \xc3\xa4"}}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":1}}\n\n'
    b"data: [DONE]\n\n"
)


class Server(ThreadingHTTPServer):
    """Answers every chat with ``answers`` in turn, the last one again and again, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, bytes]] = [(200, HELLO)]
        self.models = (200, MODELS)
        self.asked: list[ChatBody] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._reply(*self.server.models)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append(msgspec.json.decode(body, type=ChatBody))
        answers = self.server.answers
        self._reply(*(answers.pop(0) if len(answers) > 1 else answers[0]))

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def talk(server: Server, monkeypatch: pytest.MonkeyPatch, text: str, system: str | None = None) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return Chat(server.url, system=system, temperature=0.5, max_tokens=9).run()


def test_piped_lines_are_turns_of_one_conversation(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(server, monkeypatch, "one\n\ntwo", system="Be brief.") == 0
    assert capsys.readouterr().out == "Hello ä\nHello ä\n"
    first, second = server.asked
    opening = [Message("system", "Be brief."), Message("user", "one")]
    assert first == ChatBody("scripted", opening, 0.5, 9, stream=True)
    assert second.messages == [*opening, Message("assistant", "Hello ä"), Message("user", "two")]


def test_reset_forgets_all_but_the_system_prompt(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    talk(server, monkeypatch, "one\n/reset\ntwo\n/exit\nthree\n", system="s")
    assert [len(body.messages) for body in server.asked] == [2, 2]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((400, b'{"error":{"message":"too long"}}'), "too long"),
        ((502, b"<html>"), "status 502"),
        (
            (200, HELLO.partition(b'data: {"choices":[],')[0] + b'data: {"error":{"message":"worker lost"}}\n\n'),
            "worker lost",
        ),
        ((200, HELLO.partition(b"data: [DONE]")[0]), "broke off"),
        ((200, b"data: nonsense\n\n"), "malformed"),
    ],
)
def test_a_failed_turn_is_told_and_forgotten(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: tuple[int, bytes],
    words: str,
) -> None:
    server.answers = [answer, (200, HELLO)]
    assert talk(server, monkeypatch, "one\ntwo\n") == 1
    out, err = capsys.readouterr()
    assert words in err
    assert out.splitlines()[-1] == "Hello ä"
    assert server.asked[1].messages == [Message("user", "two")]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(io.StringIO):
        armed = True

        def write(self, text: str) -> int:
            if self.armed and text.startswith("lo"):
                self.armed = False
                raise KeyboardInterrupt
            return super().write(text)

    shown = Interrupting()
    monkeypatch.setattr("sys.stdout", shown)
    assert talk(server, monkeypatch, "one\ntwo\n") == 0
    assert shown.getvalue() == "Hel …\nHello ä\n"
    assert server.asked[1].messages[1].content.startswith("Hel")


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ((503, b'{"error":{"message":"loading"}}'), "cannot answer yet: loading"),
        ((200, b"<html>"), "not an OpenAI-compatible server"),
        ((200, b'{"data":[]}'), "not an OpenAI-compatible server"),
    ],
)
def test_a_server_that_is_none_is_named(
    server: Server, monkeypatch: pytest.MonkeyPatch, models: tuple[int, bytes], words: str
) -> None:
    server.models = models
    with pytest.raises(StartupError, match=words):
        talk(server, monkeypatch, "one\n")
