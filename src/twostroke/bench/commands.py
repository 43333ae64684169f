"""The verbs of ``twostroke bench``. What they need is imported when one is chosen."""

from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

from cyclopts import App, Parameter

from twostroke.errors import StartupError

app = App(name="bench", help="Measure schemes, or any server, and show why one is faster.")

Preset = Literal["quick", "reference", "chat"]
ModeName = Literal["prefill-only", "decode-only", "pd", "all"]
DialectName = Literal["completions", "chat", "generate"]
Number = TypeVar("Number", int, float)
Words = Annotated[tuple[str, ...], Parameter(consume_multiple=True)]


@app.command
def run(
    model: str | None = None,
    /,
    *,
    output: Path,
    schemes: str | None = None,
    scheme_file: Path | None = None,
    preset: Preset = "quick",
    mode: ModeName = "pd",
    input_lens: str | None = None,
    num_prompts: int | None = None,
    request_rate: str | None = None,
    burstiness: float | None = None,
    output_len: int | None = None,
    seed: int | None = None,
    trace: Path | None = None,
    trace_scale: float = 1.0,
    repeat: int = 1,
    cold: Annotated[bool, Parameter(negative="--warm")] = True,
    goodput: Words = (),
    rate_sweep: bool = False,
    up: Annotated[str, Parameter(allow_leading_hyphen=True)] = "",
    timeout: float = 600.0,
    unavailable: Literal["skip", "refuse"] = "skip",
) -> int:
    """Start each scheme, measure it, stop it; then write a report. Run it again and it goes on where it was.

    Parameters
    ----------
    model
        As for up. [default: the built-in model]
    output
        Folder of the results, new or interrupted.
    schemes
        As in pd,colocated. [default: all]
    scheme_file
        More schemes (TOML): a table each, with up = "--prefill 2 ...".
    preset
        What is sent; the options below change it.
    mode
        Output 1, KV in place already, or the whole flow.
    input_lens
        Prompt lengths in tokens: 100,1000.
    num_prompts
        Requests of a run.
    request_rate
        Requests a second: 4, or 1,2,4; inf is all at once.
    burstiness
        1 is Poisson; less is burstier.
    output_len
        Tokens of every answer.
    seed
        Of prompts and arrivals.
    trace
        Requests of a file in Mooncake's format instead.
    trace_scale
        Shortens its prompts and answers.
    repeat
        Times, the schemes in turn.
    cold
        Each run finds caches without its prompts; or every prompt was sent once before.
    goodput
        Limits in ms that a good request meets: ttft:2000 tpot:40.
    rate_sweep
        Find the highest rate at which 90 % are good.
    up
        More arguments of up, for every scheme.
    timeout
        Seconds for one request.
    unavailable
        What becomes of schemes that cannot run here.
    """
    from msgspec.structs import replace

    from twostroke.bench import session, workload
    from twostroke.bench.plan import MODES, Settings

    base = workload.REFERENCE if preset == "reference" else workload.QUICK
    rates = _numbers(request_rate, float, "--request-rate") if request_rate else (base.request_rate,)
    changes = {
        "input_lens": _numbers(input_lens, int, "--input-lens") if input_lens else None,
        "num_prompts": num_prompts,
        "output_len": output_len,
        "burstiness": burstiness,
        "seed": seed,
        "request_rate": rates[0],
    }
    grid = replace(base, **{name: value for name, value in changes.items() if value is not None})
    numbers = (*grid.input_lens, grid.num_prompts, grid.output_len, repeat)
    if min(numbers) < 1 or not timeout > 0 or not trace_scale > 0:
        raise StartupError("lengths, numbers, --repeat, --timeout and --trace-scale must be above 0")
    workload.arrivals(1, min(rates), grid.burstiness, 0)
    goal = _goal(goodput)
    if rate_sweep and not goal:
        raise StartupError("--rate-sweep looks for the highest good rate: say what is good with --goodput")
    settings = Settings(
        model=model,
        grid=grid,
        modes=MODES if mode == "all" else (mode,),
        rates=rates,
        chat=workload.Chat() if preset == "chat" else None,
        trace=str(trace.resolve()) if trace else None,
        trace_scale=trace_scale,
        repeats=repeat,
        cold=cold,
        goal=goal,
        sweep=rate_sweep,
        up=up,
        timeout=timeout,
    )
    names = [name.strip() for name in schemes.split(",")] if schemes else None
    return session.run(settings, output, names, scheme_file, refuse=unavailable == "refuse")


@app.command
def client(
    *,
    base_url: str,
    dialect: DialectName = "completions",
    model: str | None = None,
    input_len: int = 1000,
    output_len: int = 10,
    num_prompts: int = 16,
    request_rate: float = 4.0,
    burstiness: float = 1.0,
    seed: int = 45,
    vocab_size: int = 32_000,
    preset: Literal["random", "chat"] = "random",
    trace: Path | None = None,
    trace_scale: float = 1.0,
    text: bool = False,
    ignore_eos: Annotated[bool, Parameter(negative="--stop-at-eos")] = True,
    cache_salt: str | None = None,
    api_key_file: Path | None = None,
    timeout: float = 600.0,
    goodput: Words = (),
    label: str | None = None,
    output: Path | None = None,
) -> int:
    """Put load on a server that runs already: ours, vLLM, SGLang, Ollama, or any with an OpenAI API.

    Parameters
    ----------
    base_url
        As in http://127.0.0.1:8000, without /v1.
    dialect
        Endpoint: /v1/completions, /v1/chat/completions or /generate.
    model
        Name of the model. [default: what /v1/models says first]
    input_len
        Tokens of a prompt (words, with --text or chat).
    output_len
        Tokens of an answer.
    num_prompts
        Requests.
    request_rate
        Requests a second; inf is all at once.
    burstiness
        1 is Poisson; less is burstier.
    seed
        Of prompts and arrivals.
    vocab_size
        Token ids are of its middle three quarters.
    preset
        Random prompts, or conversations with shared prefixes.
    trace
        Requests of a file in Mooncake's format instead.
    trace_scale
        Shortens its prompts and answers.
    text
        Prompts as words, for servers that take no token ids.
    ignore_eos
        Ask for answers of full length.
    cache_salt
        Keeps the prompts out of the server's prefix cache.
    api_key_file
        File that holds the key, if the server wants one.
    timeout
        Seconds for one request.
    goodput
        Limits in ms that a good request meets: ttft:2000 tpot:40.
    label
        What the result is called. [default: the URL's host and port]
    output
        Result file to write.
    """
    from twostroke.bench import session
    from twostroke.bench.dialect import Asking
    from twostroke.bench.plan import Settings
    from twostroke.bench.workload import Chat, Grid

    if min(input_len, output_len, num_prompts) < 1 or vocab_size < 2 or not timeout > 0 or not trace_scale > 0:
        raise StartupError("lengths, numbers, --timeout and --trace-scale must be above 0")
    grid = Grid((input_len,), output_len, num_prompts, request_rate, burstiness, seed)
    settings = Settings(
        grid=grid,
        chat=Chat() if preset == "chat" else None,
        trace=str(trace) if trace else None,
        trace_scale=trace_scale,
        goal=_goal(goodput),
        timeout=timeout,
    )
    asking = Asking(dialect, model, text or dialect == "chat", cache_salt, ignore_eos)
    return session.load(base_url, asking, settings, vocab_size, api_key_file, label, output)


@app.command
def report(*folders: Path, base: str | None = None, output: Path | None = None) -> int:
    """Write report.html and charts of one or more result folders, or of result files of vllm bench serve or aiperf.

    Parameters
    ----------
    folders
        Result folders or files, side by side.
    base
        Scheme that the others are compared with. [default: the first]
    output
        Folder to write to. [default: the result folder, if there is one]
    """
    from twostroke.bench import session

    if not folders:
        raise StartupError("name at least one result folder")
    return session.report(folders, base, output)


def _numbers(text: str, kind: type[Number], option: str) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise StartupError(f"{option} takes numbers with commas between, not {text!r}") from error


def _goal(words: tuple[str, ...]) -> dict[str, float]:
    from twostroke.bench.results import Metric

    goal: dict[str, float] = {}
    for word in words:
        metric, _, limit = word.partition(":")
        try:
            goal[metric] = float(limit)
        except ValueError as error:
            raise StartupError(f"--goodput takes limits in ms such as ttft:2000, not {word!r}") from error
        if metric not in get_args(Metric) or not goal[metric] > 0:
            raise StartupError(f"--goodput knows {', '.join(get_args(Metric))}, with limits above 0; not {word!r}")
    return goal
