"""The verbs of ``twostroke bench``. What they need is imported when one is chosen."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, get_args

from cyclopts import App, Parameter

from twostroke.errors import StartupError

if TYPE_CHECKING:
    from twostroke.bench.plan import Settings
    from twostroke.bench.workload import Chat, Grid

app = App(name="bench", help="Measure schemes, or any server, and show why one is faster.")

Preset = Literal["quick", "reference", "chat"]
ModeName = Literal["prefill-only", "decode-only", "pd", "all"]
DialectName = Literal["completions", "chat", "generate"]
Number = TypeVar("Number", int, float)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What is sent, the same for ``run`` and ``client``. What is not given is the preset's."""

    num_prompts: int | None = None
    "Requests of a run; of a trace, at most so many. [default: the preset's; a trace whole]"
    prompt_tokens: int | None = None
    "At most so many in a run: fewer prompts where they are long."
    request_rate: str | None = None
    "Requests a second: 4, or for run 1,2,4; inf is all at once."
    burstiness: float | None = None
    "1 is Poisson; less is burstier."
    output_len: int | None = None
    "Tokens of every answer."
    seed: int | None = None
    "Of prompts and arrivals."
    trace: Path | None = None
    "Requests of a file in Mooncake's format instead."
    trace_scale: float = 1.0
    "Shortens its prompts and answers."
    goodput: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ()
    "Limits in ms that a good request meets: ttft:2000 tpot:40."
    timeout: float = 600.0
    "Seconds for one request."

    def settings(self, base: "Grid", input_lens: tuple[int, ...] | None, chat: "Chat | None") -> "Settings":
        """What these options make of a preset.

        Raises:
            StartupError: a number is out of range.
        """
        from msgspec.structs import replace

        from twostroke.bench import workload
        from twostroke.bench.plan import Settings

        rates = _numbers(self.request_rate, float, "--request-rate") if self.request_rate else (base.request_rate,)
        if self.trace and self.request_rate:
            raise StartupError("a trace has times of its own: leave out --request-rate")
        changes = {
            "input_lens": input_lens,
            "num_prompts": self.num_prompts or (workload.MAX_TRACE if self.trace else None),
            "prompt_tokens": self.prompt_tokens,
            "output_len": self.output_len,
            "burstiness": self.burstiness,
            "seed": self.seed,
            "request_rate": rates[0],
        }
        grid = replace(base, **{name: value for name, value in changes.items() if value is not None})
        if min(*grid.input_lens, grid.num_prompts, grid.output_len, grid.prompt_tokens or 1) < 1:
            raise StartupError("lengths and numbers of requests must be above 0")
        if not self.timeout > 0 or not self.trace_scale > 0:
            raise StartupError("--timeout and --trace-scale must be above 0")
        workload.arrivals(1, min(rates), grid.burstiness, 0)
        return Settings(
            grid=grid,
            rates=rates,
            chat=chat,
            trace=str(self.trace.resolve()) if self.trace else None,
            trace_scale=self.trace_scale,
            goal=_goal(self.goodput),
            timeout=self.timeout,
        )


DEFAULT_LOAD = LoadOptions()


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
    load: LoadOptions = DEFAULT_LOAD,
    repeat: int = 1,
    cold: Annotated[bool, Parameter(negative="--warm")] = True,
    rate_sweep: bool = False,
    up: Annotated[str, Parameter(allow_leading_hyphen=True)] = "",
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
        What is sent; other options change it.
    mode
        Output 1, KV in place already, or the whole flow.
    input_lens
        Prompt lengths in tokens: 100,1000.
    repeat
        Times, the schemes in turn.
    cold
        Each run finds caches without its prompts; or every prompt was sent once before.
    rate_sweep
        Find the highest rate at which 90 % are good.
    up
        More arguments of up, for every scheme.
    unavailable
        What becomes of schemes that cannot run here.
    """
    from msgspec.structs import replace

    from twostroke.bench import session, workload
    from twostroke.bench.plan import MODES

    base = workload.REFERENCE if preset == "reference" else workload.QUICK
    lengths = _numbers(input_lens, int, "--input-lens") if input_lens else None
    settings = load.settings(base, lengths, workload.Chat() if preset == "chat" else None)
    if repeat < 1:
        raise StartupError(f"--repeat must be above 0, not {repeat}")
    if rate_sweep and settings.trace:
        raise StartupError("a trace has times of its own: leave out --rate-sweep")
    if rate_sweep and not settings.goal:
        raise StartupError("--rate-sweep looks for the highest good rate: say what is good with --goodput")
    modes = MODES if mode == "all" else (mode,)
    settings = replace(settings, model=model, modes=modes, repeats=repeat, cold=cold, sweep=rate_sweep, up=up)
    names = [name.strip() for name in schemes.split(",")] if schemes else None
    return session.run(settings, output, names, scheme_file, refuse=unavailable == "refuse")


@app.command
def client(
    *,
    base_url: str,
    dialect: DialectName = "completions",
    model: str | None = None,
    preset: Literal["random", "chat"] = "random",
    input_len: int = 1000,
    load: LoadOptions = DEFAULT_LOAD,
    vocab_size: int = 32_000,
    text: bool = False,
    ignore_eos: Annotated[bool, Parameter(negative="--stop-at-eos")] = True,
    cache_salt: str | None = None,
    api_key_file: Path | None = None,
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
    preset
        Random prompts, or conversations with shared prefixes.
    input_len
        Tokens of a prompt (words, with --text or chat).
    vocab_size
        Token ids are of its middle three quarters.
    text
        Prompts as words, for servers that take no token ids.
    ignore_eos
        Ask for answers of full length.
    cache_salt
        Keeps the prompts out of the server's prefix cache.
    api_key_file
        File that holds the key, if the server wants one.
    label
        What the result is called. [default: the URL's host and port]
    output
        Result file to write.
    """
    from twostroke.bench import session
    from twostroke.bench.dialect import Asking
    from twostroke.bench.workload import CLIENT, Chat

    settings = load.settings(CLIENT, (input_len,), Chat() if preset == "chat" else None)
    if len(settings.rates) > 1:
        raise StartupError("the client sends at one --request-rate")
    if vocab_size < 2:
        raise StartupError(f"--vocab-size must be at least 2, not {vocab_size}")
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
