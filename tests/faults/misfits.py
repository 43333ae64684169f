"""Rows in which a worker does not go with the others."""

import asyncio
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.faults.fleet import DECODE, Json
from tests.faults.stage import Stage, row
from twostroke.messages import PROTOCOL

MISFIT = DECODE[1]
_PROMISE = "refused at registration, both named"


async def _misfit(stage: Stage, options: Mapping[str, str], *named: str, secret: str = "") -> None:
    """A decode worker comes back other than it was. It is refused by name; who is asked answers as ever."""
    fitting = stage.fleet.workers[MISFIT]
    fitting.kill()
    misfit = fitting.again(options, **({"TWOSTROKE_SECRET": secret} if secret else {}))
    try:
        report = await _judged(stage, misfit.pid if not secret else 0)
        assert report["state"] in ("refused", "lost"), report
        for name in named:
            assert name in report["detail"], report
        for _ in range(4):
            await stage.exactly(stage.probe())
    finally:
        misfit.kill()
        stage.fleet.workers[MISFIT] = fitting.again()
        await stage.fleet.whole(stage.session)
    await stage.freed()


async def _judged(stage: Stage, pid: int) -> Json:
    """What the router says of the misfit, once it has seen it ready, or has seen why it cannot."""
    async with asyncio.timeout(60):
        while True:
            async with stage.session.get(f"{stage.fleet.url}/workers") as reply:
                report = (await reply.json())[-1]
            if report["state"] in ("ready", "refused") and report["pid"] == pid:
                return report
            if not pid and "secret" in report["detail"]:
                return report
            await asyncio.sleep(0.05)


@row("mismatched dtype", _PROMISE, "shm", pending=True)
async def other_dtype(stage: Stage) -> None:
    await _misfit(stage, {"--dtype": "bfloat16"}, "bfloat16", "float32")


@row("mismatched block size", _PROMISE, "shm", pending=True)
async def other_block_size(stage: Stage) -> None:
    await _misfit(stage, {"--block-size": "8"}, "8", "16")


@row("mismatched model", _PROMISE, "shm", pending=True)
async def other_model(stage: Stage) -> None:
    """Of the same shape, with other weights."""
    fitting = stage.fleet.workers[MISFIT]
    directory = Path(fitting.arguments[1])
    other = directory.with_name("other")
    if not other.exists():
        shutil.copytree(directory, other)
        weights = load_file(other / "model.safetensors")
        changed = {name: torch.roll(weight, 1) for name, weight in weights.items()}
        save_file(changed, other / "model.safetensors", {"format": "pt"})
    await _misfit(stage, {"serve": str(other)}, "model", "other")


@row("mismatched secret", _PROMISE, "tcp")
async def other_secret(stage: Stage) -> None:
    await _misfit(stage, {}, "secret", secret="another")


@row("mismatched version", _PROMISE, "shm")
async def other_version(stage: Stage) -> None:
    """The prefill worker says that it speaks another protocol. Without it there is an answer or an explicit error."""
    network, spoken = stage.fleet.control, b'"protocol":%d' % PROTOCOL
    honest, network.rewrite = network.rewrite, lambda data: data.replace(spoken, b'"protocol":9')
    try:
        async with asyncio.timeout(60):
            report: Json = {"state": "", "detail": ""}
            while report["state"] not in ("lost", "refused"):
                async with stage.session.get(f"{stage.fleet.url}/workers") as reply:
                    report = (await reply.json())[0]
        assert "protocol 9" in report["detail"], report
        assert f"{PROTOCOL}" in report["detail"], report
        await stage.exactly_or_refused(stage.body())
    finally:
        network.rewrite = honest
    await stage.fleet.whole(stage.session)
    await stage.freed()
