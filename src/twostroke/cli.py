"""The command line: ``up``, ``serve``, ``router``, ``store`` … Each verb fills a config and hands it on.

What a process needs is imported when its verb is chosen, so that ``--help`` and the router never wait for torch.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from twostroke import __version__, config
from twostroke.bench.commands import app as bench
from twostroke.config import RouterConfig, UpConfig, WorkerConfig, parse_size
from twostroke.errors import StartupError
from twostroke.messages import Role
from twostroke.options import DEFAULT_OPTIONS, EngineOptions
from twostroke.router.commands import app as workers
from twostroke.store.commands import app as kv

EXIT_USAGE = 2

app = App(
    name="twostroke",
    help="Serve a language model with prefill and decode on different workers.",
    help_epilogue="MODEL is a Hugging Face directory, a GGUF file or a hub id; without one, a small built-in model.",
    version=__version__,
    default_parameter=Parameter(negative=()),
)
app.command(bench)
app.command(kv)
app.command(workers)

Urls = Annotated[tuple[str, ...], Parameter(consume_multiple=True)]
ApiKeys = Annotated[tuple[str, ...], Parameter(name="--api-key", help="Key that clients may use; again for more.")]
ParentPid = Annotated[int | None, Parameter(show=False)]


@app.command
def up(
    model: str | None = None,
    /,
    *,
    prefill: int | None = None,
    decode: int | None = None,
    colocated: int | None = None,
    devices: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    schedule: config.Schedule = "concurrent",
    policy: config.Policy = "prefix-aware",
    on_loss: config.OnLoss = "continue",
    link: config.LinkChoice = "auto",
    link_device: str | None = None,
    api_key: ApiKeys = (),
    insecure: bool = False,
    options: EngineOptions = DEFAULT_OPTIONS,
    parent_pid: ParentPid = None,
) -> int:
    """Start the whole system on this machine: a router and its workers. Ctrl-C stops it.

    Parameters
    ----------
    model
        Hugging Face directory, GGUF file or hub id. [default: the built-in model]
    prefill
        Workers for prefill. [default: 1, or 0 beside other counts]
    decode
        Workers for decode. [default: 1, or 0 beside other counts]
    colocated
        Workers that do both. [default: 0]
    devices
        Devices to take in turn: cuda:0,cuda:1. [default: by --device]
    host
        Address that the router listens on.
    port
        Port that the router listens on.
    schedule
        Ask both workers at once, or decode after prefill.
    policy
        How workers are chosen.
    on_loss
        When a worker dies in mid-answer.
    link
        How KV blocks travel.
    link_device
        Network devices for NIXL: mlx5_2,mlx5_3. [default: all]
    insecure
        Listen beyond this machine without a secret.
    """
    _follow(parent_pid)
    from twostroke.up import run

    unset = prefill is None and decode is None and colocated is None
    counts = (1, 1, 0) if unset else (prefill or 0, decode or 0, colocated or 0)
    engine, places = options.config(), _devices(devices)
    if places and engine.device != "auto":
        raise StartupError("--devices is for each worker, --device for all: give one of them")
    settings = UpConfig(
        model,
        *counts,
        host,
        _port(port),
        schedule,
        policy,
        insecure,
        engine,
        places,
        on_loss=on_loss,
        link=link,
        link_devices=config.check_link_devices(link_device, link),
        store=config.parse_store(options.store),
        tenant_quota=options.quota(),
        eviction=options.eviction,
        api_keys=config.api_keys(api_key),
    )
    config.check_link(settings.link, settings.store)
    return run(settings)


@app.command
def serve(
    model: str | None = None,
    /,
    *,
    role: Role = "both",
    name: str = "worker-0",
    served_name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8100,
    bootstrap_hosts: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    max_queue: int = 1024,
    link: config.LinkChoice = "auto",
    link_device: str | None = None,
    router: Urls = (),
    drain_timeout: float = 30.0,
    lease_seconds: float = 30.0,
    api_key: ApiKeys = (),
    insecure: bool = False,
    options: EngineOptions = DEFAULT_OPTIONS,
    parent_pid: ParentPid = None,
) -> int:
    """Run one worker. It answers clients itself, or stands behind a router. SIGTERM drains it.

    Parameters
    ----------
    model
        Hugging Face directory, GGUF file or hub id. [default: the built-in model]
    role
        What the worker says it is for; it can do everything in any role.
    name
        Name in logs, the same after a restart.
    served_name
        Name of the model for clients. [default: after the model]
    host
        Address to listen on.
    port
        Port to listen on.
    bootstrap_hosts
        Prefill workers (host or host:port) that foreign routers may name.
    max_queue
        Waiting requests beyond which new ones get 429.
    link
        How KV blocks travel.
    link_device
        Network devices for NIXL: mlx5_2,mlx5_3. [default: all]
    router
        URLs of running routers to join.
    drain_timeout
        Seconds to finish in, once told to leave.
    lease_seconds
        Blocks that nobody fetches are kept for so long.
    insecure
        Listen beyond this machine without a secret.
    """
    _follow(parent_pid)
    config.check_bind(host, config.cluster_secret(), insecure)
    config.check_urls(router)
    if drain_timeout < 0:
        raise StartupError(f"--drain-timeout cannot be negative, such as {drain_timeout}")
    if lease_seconds <= 0:
        raise StartupError(f"--lease-seconds must be more than 0, not {lease_seconds}")
    settings = WorkerConfig(
        model=model,
        served_name=served_name,
        role=role,
        name=name,
        host=host,
        port=_port(port),
        bootstrap_hosts=config.check_hosts(bootstrap_hosts),
        engine=options.config(),
        max_queue=max_queue,
        link=link,
        store=config.parse_store(options.store),
        tenant_quota=options.quota(),
        eviction=options.eviction,
        api_keys=config.api_keys(api_key),
        link_devices=config.check_link_devices(link_device, link),
        routers=router,
        drain_timeout=drain_timeout,
        lease_seconds=lease_seconds,
    )
    config.check_link(settings.link, settings.store)
    from twostroke.worker.worker import run

    return run(settings)


@app.command
def router(
    *,
    prefill: Urls = (),
    decode: Urls = (),
    colocated: Urls = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    schedule: config.Schedule = "concurrent",
    policy: config.Policy = "prefix-aware",
    short_prompt: int = RouterConfig().short_prompt,
    max_queue: int = 1024,
    retries: int = 2,
    on_loss: config.OnLoss = "continue",
    api_key: ApiKeys = (),
    insecure: bool = False,
    parent_pid: ParentPid = None,
) -> int:
    """Run a router over workers that run already, or will, or join it (serve --router).

    TWOSTROKE_SECRET must be the same on all of them.

    Parameters
    ----------
    prefill
        URLs of workers to use for prefill, such as http://127.0.0.1:8100.
    decode
        URLs of workers to use for decode.
    colocated
        URLs of workers to use for both.
    host
        Address to listen on.
    port
        Port to listen on.
    schedule
        Ask both workers at once, or decode after prefill.
    policy
        How workers are chosen.
    short_prompt
        Tokens below which a decode worker prefills by itself.
    max_queue
        Requests without a first token, beyond which new ones get 429.
    retries
        Times that one request is sent elsewhere after a fault.
    on_loss
        When a worker dies in mid-answer.
    insecure
        Listen beyond this machine without a secret.
    """
    _follow(parent_pid)
    config.check_bind(host, config.cluster_secret(), insecure)
    config.check_urls((*prefill, *decode, *colocated))
    for name, value, least in (
        ("short-prompt", short_prompt, 0),
        ("max-queue", max_queue, 1),
        ("retries", retries, 0),
    ):
        if value < least:
            raise StartupError(f"--{name} must be at least {least}, not {value}")
    settings = RouterConfig(
        prefill,
        decode,
        colocated,
        schedule,
        policy,
        host,
        _port(port),
        on_loss=on_loss,
        short_prompt=short_prompt,
        max_queue=max_queue,
        retries=retries,
        api_keys=config.api_keys(api_key),
    )
    from twostroke.router.router import run

    return run(settings)


@app.command
def chat(
    *,
    url: str = "http://127.0.0.1:8000",
    system: str | None = None,
    temperature: float = 0.7,
    max_tokens: int | None = None,
) -> int:
    """Talk to a running server. /reset forgets, /exit or Ctrl-D leaves, Ctrl-C stops an answer.

    Parameters
    ----------
    url
        The router, or a worker.
    system
        System prompt. [default: the model's own]
    temperature
        Randomness of the answers; 0 is none.
    max_tokens
        Longest answer. [default: what the server allows]
    """
    from twostroke.chat import Chat

    return Chat(url, system=system, temperature=temperature, max_tokens=max_tokens).run()


def explain(arguments: Sequence[str]) -> dict[str, object]:
    """What a command line means, without running it: its parameters, and the engine's configuration as "engine".

    Raises:
        StartupError: it means nothing, or is refused.
    """
    try:
        _, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise StartupError(str(error)) from error
    options = bound.arguments.get("options", DEFAULT_OPTIONS)
    config.parse_store(options.store)
    return {**bound.arguments, "engine": options.config()}


@app.command
def store(
    *,
    memory: str | None = None,
    disk: str | None = None,
    ttl: str | None = None,
    layouts: int = 1,
    tenant_quota: str | None = None,
    eviction: config.EvictionPolicy = "lru",
    host: str = "127.0.0.1",
    port: int = 8300,
    insecure: bool = False,
    parent_pid: ParentPid = None,
) -> int:
    """Run a cache service, for --store service:HOST:PORT. TWOSTROKE_SECRET must be the same on all of its workers.

    Parameters
    ----------
    memory
        Memory for KV blocks, such as 8GiB; taken before it serves.
    disk
        Below that, files: PATH:SIZE.
    ttl
        Forget blocks that were not written again for so long: 90s, 30min, 1h. [default: keep them]
    layouts
        Most models whose blocks it keeps; they share memory and disk equally.
    tenant_quota
        Bytes that one cache_salt (or API key) may have of memory and of disk, for each model.
    eviction
        Which blocks go when it is full: s3-fifo keeps what is used again from being pushed out by what is not.
    host
        Address to listen on.
    port
        Port to listen on.
    insecure
        Listen beyond this machine without a secret.
    """
    _follow(parent_pid)
    config.check_bind(host, config.cluster_secret(), insecure)
    if layouts < 1:
        raise StartupError(f"--layouts must be at least 1, not {layouts}")
    settings = config.StoreConfig(
        memory=None if memory is None else parse_size(memory),
        disk=None if disk is None else config.parse_disk(disk),
        ttl=None if ttl is None else config.parse_seconds(ttl),
        layouts=layouts,
        tenant_quota=None if tenant_quota is None else parse_size(tenant_quota),
        eviction=eviction,
        host=host,
        port=_port(port),
    )
    if settings.memory is None and settings.disk is None:
        raise StartupError("a cache service keeps blocks somewhere: give --memory 8GiB, --disk PATH:SIZE, or both")
    from twostroke.store.process import run

    return run(settings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the verb and leave with its exit code: 2 if it could not start, with one line that says why."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the verb; its exit code."""
    try:
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        return _complain(f"{error}  (see `twostroke --help`)")
    except StartupError as error:
        return _complain(error.message)
    except KeyboardInterrupt:
        return 130
    return code if isinstance(code, int) else 0


def _complain(line: str) -> int:
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"twostroke: {line}")
    return EXIT_USAGE


def _port(port: int) -> int:
    if not 1 <= port <= 65535:
        raise StartupError(f"--port must be between 1 and 65535, not {port}")
    return port


def _devices(listed: str | None) -> tuple[str, ...]:
    if listed is None:
        return ()
    return tuple(config.check_device(device.strip(), auto=False) for device in listed.split(","))


def _follow(parent: int | None) -> None:
    if parent is not None:
        from twostroke.parent import follow

        follow(parent)
