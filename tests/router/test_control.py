"""Workers come, go, and change roles while the router runs."""

import asyncio

import msgspec
import pytest
from msgspec import structs

from tests.router.scripted import ScriptedWorker, System, hang, json_answer, stream_answer, system, until
from twostroke import cli
from twostroke.messages import PROTOCOL, SECRET_HEADER, Assign, Drain, Join, Leave, Role, WorkerState, encode
from twostroke.router import registry as registries
from twostroke.router.worker import WorkerReport

PATH = "/v1/completions"


async def tell(running: System, path: str, message: object, secret: str = "") -> tuple[int, str]:
    headers = {SECRET_HEADER: secret} if secret else {}
    async with running.client.post(path, data=encode(message), headers=headers) as reply:
        return reply.status, await reply.text()


def join(worker: ScriptedWorker, role: Role = "both", state: WorkerState = "ready") -> Join:
    return Join(worker.url, worker.info.instance, role, state)


async def reports(running: System) -> dict[str, WorkerReport]:
    async with running.client.get("/workers") as reply:
        listed = msgspec.json.decode(await reply.read(), type=list[WorkerReport])
    return {report.id: report for report in listed}


async def ask(running: System) -> int:
    async with running.client.post(PATH, data=b"{}") as reply:
        await reply.read()
        return reply.status


async def newcomer(running: System, name: str = "new") -> ScriptedWorker:
    worker = ScriptedWorker(name, running.log)
    await worker.start()
    return worker


# -- joining and leaving -------------------------------------------------------------------------------------------


async def test_a_worker_joins_serves_and_leaves() -> None:
    async with system(0, 0, 0) as running:
        assert await ask(running) == 503
        worker = await newcomer(running)
        status, text = await tell(running, "/internal/join", join(worker))
        assert status == 200, text
        assert (await reports(running))["new"].joined
        assert await ask(running) == 200
        assert (await tell(running, "/internal/join", join(worker)))[0] == 200  # again and again
        assert len(await reports(running)) == 1
        await tell(running, "/internal/leave", Leave(worker.url, "another instance"))
        assert await reports(running)
        assert (await tell(running, "/internal/leave", Leave(worker.url, worker.info.instance)))[0] == 200
        assert not await reports(running)
        assert await ask(running) == 503
        await worker.stop()


async def test_who_joined_is_watched_and_forgotten_when_it_is_lost_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async with system(0, 0, 0) as running:
        watching = asyncio.create_task(running.router.watch())
        worker = await newcomer(running)
        await tell(running, "/internal/join", join(worker))
        known = running.router.registry.workers[0]
        worker.info = structs.replace(worker.info, queued_tokens=5)
        known.clock = lambda: 1.0  # lost long ago, whenever that is
        await until(lambda: known.queued == 5)
        await worker.stop()
        await until(lambda: not running.router.registry.workers)
        watching.cancel()


async def test_joining_needs_the_secret() -> None:
    async with system(0, 0, 0, secret="s3cret") as running:
        worker = await newcomer(running)
        worker.secret = "s3cret"
        for path, message in (
            ("/internal/join", join(worker)),
            ("/internal/leave", Leave(worker.url, "i")),
            ("/workers/new/drain", Drain()),
            ("/workers/new/role", Assign("decode")),
        ):
            status, text = await tell(running, path, message, "guess")
            assert status == 401
            assert "TWOSTROKE_SECRET" in text
        assert (await tell(running, "/internal/join", join(worker), "s3cret"))[0] == 200
        await worker.stop()


async def test_a_worker_with_another_secret_does_not_get_in() -> None:
    async with system(0, 0, 0, secret="right") as running:
        worker = await newcomer(running)
        worker.secret = "other"
        status, text = await tell(running, "/internal/join", join(worker), "right")
        assert status == 502
        assert f"the worker at {worker.url} refuses this router's cluster secret" in text
        await worker.stop()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "bfloat16"}, "has dtype bfloat16, worker p-0 at http://127.0.0.1:"),
        ({"block_tokens": 8}, "has block size 8, worker p-0"),
        ({"fingerprint": "g"}, "has layout (shape or weights) g, worker p-0"),
        ({"model": "other"}, "has model other, worker p-0"),
    ],
)
async def test_whoever_does_not_fit_is_refused_and_both_are_named(changes: dict[str, object], words: str) -> None:
    async with system(1, 1) as running:
        worker = await newcomer(running)
        worker.info = structs.replace(worker.info, **changes)
        status, text = await tell(running, "/internal/join", join(worker, "decode"))
        assert status == 409
        assert f"worker new at {worker.url} {words}" in text
        assert "new" not in await reports(running)
        await worker.stop()


async def test_another_protocol_is_refused_at_the_door() -> None:
    async with system(0, 0, 0) as running:
        message = structs.replace(Join("http://127.0.0.1:1", "i", "both", "ready"), protocol=99)
        status, text = await tell(running, "/internal/join", message)
        assert status == 409
        assert f"protocol 99, this router {PROTOCOL}" in text


@pytest.mark.parametrize("url", ["", "ftp://a:1", "http://", "http://a", "http://a:b", "http://[:1", "x" * 600])
async def test_nonsense_does_not_join(url: str) -> None:
    async with system(0, 0, 0) as running:
        for path in ("/internal/join", "/internal/leave"):
            message = {"url": url, "instance": "i", "role": "both", "state": "ready"}
            if path.endswith("leave"):
                message = {"url": url, "instance": "i"}
            assert (await tell(running, path, message))[0] == 400
        assert (await tell(running, "/internal/join", [1, 2]))[0] == 400


async def test_who_cannot_be_reached_does_not_join_and_who_listens_everywhere_is_where_it_came_from() -> None:
    async with system(0, 0, 0) as running:
        status, text = await tell(running, "/internal/join", Join("http://127.0.0.1:1", "i", "both", "ready"))
        assert status == 502
        assert "http://127.0.0.1:1" in text
        worker = await newcomer(running)
        everywhere = worker.url.replace("127.0.0.1", "0.0.0.0")
        message = structs.replace(join(worker), url=everywhere)
        assert (await tell(running, "/internal/join", message))[0] == 200
        assert running.router.registry.workers[0].url == worker.url
        await worker.stop()


async def test_there_is_an_end_to_how_many_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registries, "MAX_WORKERS", 1)
    async with system(0, 0, 1) as running:
        assert (await tell(running, "/internal/join", Join("http://127.0.0.1:1", "i", "both", "ready")))[0] == 429


async def test_a_process_in_place_of_another_is_checked_and_used_at_once() -> None:
    async with system(1, 1) as running:
        d = running.workers[1]
        d.info = structs.replace(d.info, instance="second", dtype="bfloat16")
        await running.look()
        report = (await reports(running))["d-0"]
        assert report.state == "refused"
        assert "d-0" in report.detail
        assert "p-0" in report.detail
        assert await ask(running) == 200
        assert running.log == ["p-0 asked", "p-0 answered"]  # alone
        d.info = structs.replace(d.info, instance="third", dtype="float32")
        status, _ = await tell(running, "/internal/join", join(d, "decode"))  # it says so: no heartbeat is needed
        assert status == 200
        assert await ask(running) == 200
        assert "d-0 answered" in running.log
        await running.look()
        assert (await reports(running))["d-0"].state == "ready"


async def test_a_refused_worker_gets_in_when_the_other_side_has_gone() -> None:
    async with system(1, 1) as running:
        p, d = running.workers
        d.info = structs.replace(d.info, instance="second", block_tokens=32)
        await running.look()
        assert (await reports(running))["d-0"].state == "refused"
        await p.stop()
        await running.look()
        await running.look()
        assert (await reports(running))["d-0"].state == "ready"
        await p.start()
        await running.look()
        assert (await reports(running))["p-0"].state == "refused"


# -- draining ------------------------------------------------------------------------------------------------------


async def test_a_drained_worker_gets_nothing_new_and_finishes_what_it_has() -> None:
    async with system(0, 0, 2) as running:
        first, second = running.workers
        first.answer = stream_answer(b"data: 1\n\n", b"data: [DONE]\n\n")
        async with running.client.post(PATH, data=b"{}") as reply:
            await reply.content.readany()
            status, text = await tell(running, "/workers/c-0/drain", Drain(9))
            assert status == 200, text
            assert first.drained == Drain(9)
            assert not running.router.registry.workers[0].ready
            for _ in range(4):
                assert await ask(running) == 200
            assert len(first.seen) == 1
            assert len(second.seen) == 4
            first.gate.release()
            assert await reply.read() == b"data: [DONE]\n\n"


async def test_draining_by_url_and_what_cannot_be_drained() -> None:
    async with system(0, 0, 2) as running:
        url = running.workers[0].url
        assert (await tell(running, f"/workers/{url}/drain", {}))[0] == 200
        status, text = await tell(running, "/workers/nobody/drain", {})
        assert status == 404
        assert "c-0, c-1" in text
        await running.workers[1].stop()
        assert (await tell(running, "/workers/c-1/drain", {}))[0] == 502
        assert (await tell(running, "/workers/c-0/drain", {"seconds": -1}))[0] == 400


async def test_a_name_that_two_workers_have_is_not_enough() -> None:
    async with system(0, 0, 2) as running:
        running.workers[1].info = structs.replace(running.workers[1].info, id="c-0")
        await running.look()
        status, text = await tell(running, "/workers/c-0/drain", {})
        assert status == 409
        assert running.workers[0].url in text


async def test_a_watched_url_stays_when_its_worker_leaves_and_a_new_process_is_found_there() -> None:
    async with system(0, 0, 1) as running:
        (worker,) = running.workers
        assert (await tell(running, "/internal/leave", Leave(worker.url, worker.info.instance)))[0] == 200
        assert running.router.registry.workers[0].state == "lost"
        worker.info = structs.replace(worker.info, instance="second")
        await running.look()
        assert await ask(running) == 200


# -- roles ---------------------------------------------------------------------------------------------------------


async def test_a_role_changes_in_one_call_and_requests_in_flight_do_not_notice() -> None:
    async with system(1, 2) as running:
        p, d, other = running.workers
        d.answer = other.answer = stream_answer(b"data: 1\n\n", b"data: [DONE]\n\n")
        async with running.client.post(PATH, data=b"{}") as reply:
            await reply.content.readany()
            status, text = await tell(running, "/workers/d-0/role", Assign("prefill"))
            assert status == 200, text
            assert msgspec.json.decode(text, type=WorkerReport).role == "prefill"
            d.gate.release()
            other.gate.release()
            assert await reply.read() == b"data: [DONE]\n\n"
        p.answer = d.answer = hang
        other.answer = json_answer()
        before = len(other.seen)
        for _ in range(4):
            assert await ask(running) == 200
        assert len(other.seen) == before + 4
        produced = [seen.ticket.side for worker in (p, d) for seen in worker.seen if seen.ticket]
        assert produced.count("produce") >= 4
        await running.look()
        assert (await reports(running))["d-0"].role == "prefill"


async def test_a_role_in_which_it_would_not_fit_is_refused() -> None:
    async with system(1, 1, 1) as running:
        c = running.workers[2]
        c.info = structs.replace(c.info, dtype="bfloat16", fingerprint="g")
        await running.look()
        assert running.router.registry.workers[2].ready  # it exchanges nothing
        status, text = await tell(running, "/workers/c-0/role", Assign("decode"))
        assert status == 409
        assert "c-0" in text
        assert "p-0" in text
        assert running.router.registry.workers[2].pool == "colocated"


async def test_what_an_operator_said_holds_until_the_worker_says_something_new() -> None:
    async with system(1, 0) as running:
        worker = await newcomer(running)
        await tell(running, "/internal/join", join(worker, "decode"))
        await tell(running, "/workers/new/role", Assign("both"))
        await tell(running, "/internal/join", join(worker, "decode"))
        assert (await reports(running))["new"].role == "colocated"
        worker.info = structs.replace(worker.info, instance="second", assigned=None)
        await tell(running, "/internal/join", join(worker, "decode"))
        assert (await reports(running))["new"].role == "colocated"
        await tell(running, "/internal/join", join(worker, "prefill"))
        assert (await reports(running))["new"].role == "prefill"
        await worker.stop()


async def test_a_worker_remembers_its_role_for_a_router_that_does_not_know_it() -> None:
    """Also for one that was told otherwise when it was started; unless it would not fit."""
    async with system(1, 2) as running:
        _, d, misfit = running.workers
        d.info = structs.replace(d.info, assigned="prefill")
        misfit.info = structs.replace(misfit.info, assigned="both")
        worker = await newcomer(running)
        worker.info = structs.replace(worker.info, assigned="both")
        await tell(running, "/internal/join", join(worker, "decode"))
        await running.look()
        roles = {name: report.role for name, report in (await reports(running)).items()}
        assert roles == {"p-0": "prefill", "d-0": "prefill", "d-1": "colocated", "new": "colocated"}
        await tell(running, "/internal/join", join(worker, "decode"))
        assert (await reports(running))["new"].role == "colocated"  # it says nothing new
        d.info = structs.replace(d.info, dtype="bfloat16", fingerprint="g", assigned="both")
        await running.look()
        d.info = structs.replace(d.info, assigned="decode")
        await running.look()
        assert (await reports(running))["d-0"].role == "colocated"
        await worker.stop()


async def test_a_heartbeat_that_was_asked_before_a_role_changed_does_not_change_it_back() -> None:
    async with system(1, 2) as running:
        d = running.workers[1]
        await tell(running, "/workers/d-0/role", Assign("prefill"))
        before, d.info_delay = d.info, 0.1
        looking = asyncio.create_task(running.look())
        await asyncio.sleep(0.02)
        assert (await tell(running, "/workers/d-0/role", Assign("decode")))[0] == 200
        d.info = before
        await looking
        assert running.router.registry.workers[1].pool == "decode"


async def test_a_role_of_a_worker_that_cannot_be_told_does_not_change() -> None:
    async with system(1, 2) as running:
        await running.workers[1].stop()
        assert (await tell(running, "/workers/d-0/role", Assign("prefill")))[0] == 502
        assert running.router.registry.workers[1].pool == "decode"


# -- the command line ----------------------------------------------------------------------------------------------


async def test_twostroke_workers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOSTROKE_SECRET", "s3cret")
    async with system(1, 1, secret="s3cret") as running:
        base = str(running.client._base_url)

        async def operate(*arguments: str) -> tuple[int, str]:
            code = await asyncio.to_thread(cli.run, ["workers", *arguments, "--url", base])
            said = capsys.readouterr()
            return code, said.out + said.err

        code, text = await operate("list")
        assert code == 0
        assert [line.split()[:3] for line in text.splitlines()[1:3]] == [
            ["p-0", "prefill", "ready"],
            ["d-0", "decode", "ready"],
        ]
        assert await operate("role", "p-0", "decode") == (0, "p-0 (decode): ready, serving\n")
        code, text = await operate("drain", running.workers[1].url, "--seconds", "3")
        assert (code, running.workers[1].drained) == (0, Drain(3))
        assert text.startswith("d-0 (decode): draining")
        code, text = await operate("drain", "nobody")
        assert code == 2
        assert text == "twostroke: there is no worker 'nobody'; there are: p-0, d-0\n"
        monkeypatch.setenv("TWOSTROKE_SECRET", "guess")
        code, text = await operate("drain", "p-0")
        assert code == 2
        assert "TWOSTROKE_SECRET" in text
