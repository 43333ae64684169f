"""Which workers may serve side by side, and how a refusal names both."""

import pytest
from msgspec import structs

from tests.router.scripted import ScriptedWorker
from twostroke.messages import WorkerInfo
from twostroke.router.agreement import disagreement
from twostroke.router.policy import Pool


def info(name: str, **changes: object) -> WorkerInfo:
    return structs.replace(ScriptedWorker(name, []).info, url=f"http://{name}:1", **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "other"}, ("model other", "has scripted")),
        ({"dtype": "bfloat16"}, ("dtype bfloat16", "has float32")),
        ({"block_tokens": 32}, ("block size 32", "has 16")),
        ({"fingerprint": "g"}, ("layout (shape or weights) g", "has f")),
    ],
)
@pytest.mark.parametrize("pools", [("decode", "prefill"), ("prefill", "decode"), ("prefill", "prefill")])
def test_both_sides_are_named(changes: dict[str, object], words: tuple[str, str], pools: tuple[Pool, Pool]) -> None:
    why = disagreement(info("new", **changes), pools[0], [(info("ok"), pools[0]), (info("old"), pools[1])])
    assert why
    assert f"worker new at http://new:1 has {words[0]}, worker ok at http://ok:1 {words[1]}" in why


def test_equals_agree_and_so_does_who_still_starts() -> None:
    starting = info("s", model="", dtype="", block_tokens=0, fingerprint="")
    assert disagreement(info("a"), "decode", [(info("b"), "prefill"), (starting, "prefill")]) is None
    assert disagreement(starting, "decode", [(info("b"), "prefill")]) is None


@pytest.mark.parametrize("pools", [("colocated", "prefill"), ("decode", "colocated"), ("colocated", "colocated")])
def test_who_hands_nothing_over_may_have_another_layout_but_not_another_model(pools: tuple[Pool, Pool]) -> None:
    other = info("b", dtype="bfloat16", block_tokens=8, fingerprint="g")
    assert disagreement(info("a"), pools[0], [(other, pools[1])]) is None
    assert disagreement(info("a"), pools[0], [(structs.replace(other, model="m"), pools[1])])
