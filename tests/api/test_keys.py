"""Who may ask, and whose blocks a request may use."""

import logging

import aiohttp
import openai
import pytest

from tests.api.conftest import ScriptedService, running
from twostroke.api.keys import tenant
from twostroke.messages import SECRET_HEADER, TENANT_HEADER

KEYS = ("sk-one", "sk-two")
BODY = {"prompt": "hello", "max_tokens": 2}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def post(http: aiohttp.ClientSession, url: str, headers: dict[str, str], **more: object) -> tuple[int, str]:
    async with http.post(f"{url}/v1/completions", json={**BODY, **more}, headers=headers) as reply:
        return reply.status, await reply.text()


async def test_only_who_has_a_key_is_answered(service: ScriptedService, caplog: pytest.LogCaptureFixture) -> None:
    """In OpenAI's words, so that its client knows what is wrong; and no key is ever written down."""
    caplog.set_level(logging.DEBUG)
    async with running(service, api_keys=KEYS) as server:
        with pytest.raises(openai.AuthenticationError) as refused:
            await server.openai.completions.create(model="tiny", prompt="hello")
        assert refused.value.code == "invalid_api_key"
        assert refused.value.type == "invalid_request_error"
        for headers in (
            {},
            bearer("sk-on"),
            bearer(""),
            {"authorization": "Basic sk-one"},
            {"authorization": "sk-one"},
        ):
            assert (await post(server.http, server.url, headers))[0] == 401
        for path in ("/generate", "/abort_request"):
            async with server.http.post(f"{server.url}{path}", json={"text": "x", "rid": "r"}) as reply:
                assert reply.status == 401
        async with server.http.get(f"{server.url}/v1/models") as reply:
            assert reply.status == 401
        for path in ("/health", "/ready", "/metrics"):
            async with server.http.get(f"{server.url}{path}") as reply:
                assert reply.status == 200, "whoever watches over it needs no key"
        assert not service.requests
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="sk-two", max_retries=0) as client:
            assert (await client.completions.create(model="tiny", prompt="hello")).choices[0].text
            assert (await client.models.list()).data
        async with server.http.get(f"{server.url}/metrics") as reply:
            metrics = await reply.text()
        assert not any(key in caplog.text + metrics for key in (*KEYS, "sk-on"))


async def test_each_key_has_a_salt_of_its_own_unless_the_request_names_one(service: ScriptedService) -> None:
    async with running(service, api_keys=KEYS) as server:
        for key in KEYS:
            assert (await post(server.http, server.url, bearer(key)))[0] == 200
        async with server.http.post(
            f"{server.url}/generate",
            json={"text": "x", "sampling_params": {"max_new_tokens": 1}},
            headers=bearer("sk-one"),
        ) as reply:
            assert reply.status == 200
        await post(server.http, server.url, bearer("sk-one"), cache_salt="ours")
        await post(server.http, server.url, {**bearer("sk-one"), TENANT_HEADER: tenant("sk-two")})
    salts = [request.salt for request in service.requests]
    assert salts == [tenant("sk-one"), tenant("sk-two"), tenant("sk-one"), "ours", tenant("sk-one")]
    assert len(set(salts)) == 3
    assert "sk-" not in "".join(salts)


@pytest.mark.parametrize("keys", [(), KEYS])
async def test_our_router_says_whose_a_request_is(
    service: ScriptedService, keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows the secret, and has seen the key. From anybody else the header means nothing."""
    monkeypatch.setenv("TWOSTROKE_SECRET", "s")
    async with running(service, api_keys=keys) as server:
        assert (await post(server.http, server.url, {SECRET_HEADER: "s", TENANT_HEADER: "whose"}))[0] == 200
        status, _ = await post(server.http, server.url, {SECRET_HEADER: "no", TENANT_HEADER: "whose"})
        assert status == (401 if keys else 200)
    assert [request.salt for request in service.requests] == ["whose"] if keys else ["whose", ""]


async def test_without_keys_nobody_is_asked_and_nothing_is_salted(service: ScriptedService) -> None:
    async with running(service) as server:
        assert (await post(server.http, server.url, bearer("anything")))[0] == 200
    assert [request.salt for request in service.requests] == [""]
