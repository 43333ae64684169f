"""A process that ``up`` starts: its last words, and its end."""

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence

_LAST_LINES = 20
_MAX_LINE = 64 << 10  # bytes; longer lines are dropped


class Child:
    """One running ``twostroke`` process.

    It has a session of its own, so that Ctrl-C reaches only ``up``, which stops everything in order, and it dies with
    ``up`` (see ``parent.py``). Its output comes through a pipe: nothing is left on disk however this ends.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, on_line: Callable[[str, str], None]) -> None:
        self.name = name
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self.ended = asyncio.create_task(self._follow(on_line))
        self._process = process

    @classmethod
    async def start(
        cls, name: str, arguments: Sequence[str], environment: Mapping[str, str], on_line: Callable[[str, str], None]
    ) -> "Child":
        """Start ``twostroke <arguments>``. ``on_line`` gets the name and each line that the process writes."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "twostroke", *arguments, "--parent-pid", str(os.getpid())),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env=dict(environment),
            limit=_MAX_LINE,
        )
        return cls(name, process, on_line)

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    @property
    def left(self) -> bool:
        """Whether it ended as it should."""
        return self._process.returncode == 0

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if the process is still there."""
        if self.running:
            self._process.send_signal(number)

    def epitaph(self) -> str:
        """How it ended, and what it wrote last."""
        code = self._process.returncode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return "\n".join([f"{self.name} {how}", *(f"  {line}" for line in self.last_lines)])

    async def _follow(self, on_line: Callable[[str, str], None]) -> None:
        """Ends when the process has ended and all it wrote is read."""
        output = self._process.stdout
        assert output is not None  # it was opened as a pipe
        while True:
            try:
                raw = await output.readline()
            except ValueError:  # an endless line
                continue
            if not raw:
                break
            line = raw.decode(errors="replace").rstrip().rsplit("\r", 1)[-1]  # the last state of a progress bar
            self.last_lines.append(line)
            on_line(self.name, line)
        await self._process.wait()
