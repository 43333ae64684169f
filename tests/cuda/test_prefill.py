"""Attention of steps with prompts in them: FlashAttention's and torch's way, against plain attention."""

import pytest
import torch

from tests.cuda.case import DEVICE, SHAPES, TOLERANCE, Case, distance
from twostroke.engine.cuda_prefill import is_supported, masked_attention
from twostroke.engine.cuda_step import Room

BF16, F32 = torch.bfloat16, torch.float32
HAS_FLASH = torch.cuda.is_available() and is_supported(64, BF16, DEVICE)
needs_flash = pytest.mark.skipif(not HAS_FLASH, reason="flash-attn-4 is not installed, or not for this GPU")
WAYS = pytest.mark.parametrize(
    ("dtype", "flash"), [pytest.param(BF16, True, marks=needs_flash), (F32, False), (BF16, False)], ids=str
)
STEPS: dict[str, list[tuple[int, int]]] = {
    "one short": [(0, 2)],
    "one whole": [(0, 300)],
    "one of whole tiles": [(0, 256)],
    "one of a regular size": [(0, 1024)],
    "one with context": [(37, 300)],
    "one of a regular size with context": [(2048, 1024)],
    "one with a long context": [(3001, 3)],
    "several": [(0, 5), (0, 100), (0, 128)],
    "several with contexts": [(0, 5), (100, 20), (33, 90), (250, 128), (15, 2), (16, 16)],
    "several of all sizes": [(0, 5), (100, 20), (33, 200), (0, 2100), (500, 150), (16, 700), (1024, 1024)],
    "single tokens alone": [(0, 1), (16, 1), (300, 1)],
    "single tokens beside one": [(0, 1), (16, 1), (300, 1), (40, 60)],
    "single tokens beside several": [(0, 1), (70, 1), (0, 5), (100, 20), (33, 200), (500, 300), (10, 2048)],
}


def case_of(step: str, shape: tuple[int, int, int], block: int, dtype: torch.dtype) -> Case:
    heads, kv_heads, dim = shape
    return Case(STEPS[step], heads=heads, kv_heads=kv_heads, dim=dim, block=block, dtype=dtype)


def check(case: Case, out: torch.Tensor, right: torch.Tensor) -> None:
    """Chunk by chunk, so that a small one does not hide behind a large one."""
    sizes = [size for _, size in case.chunks]
    for size, ours, theirs in zip(sizes, torch.split(out, sizes), torch.split(right, sizes), strict=True):
        assert distance(ours, theirs) < TOLERANCE[case.dtype], f"{size} tokens of {case.chunks}"


@WAYS
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("window", [None, 50])
def test_a_step_is_plain_attention(step: str, window: int | None, dtype: torch.dtype, flash: bool) -> None:
    shape = SHAPES[1]
    case = case_of(step, shape, 16, dtype)
    out = case.run(flash) if window is None else case.run(flash, window=window)
    check(case, out, case.expected(window=window))


@WAYS
@pytest.mark.parametrize(
    ("shape", "block"), [*((shape, 16) for shape in SHAPES), (SHAPES[0], 32), (SHAPES[3], 64), ((8, 4, 256), 16)]
)
def test_in_every_shape(shape: tuple[int, int, int], block: int, dtype: torch.dtype, flash: bool) -> None:
    for step in ("several of all sizes", "single tokens beside several", "one with context"):
        case = case_of(step, shape, block, dtype)
        check(case, case.run(flash), case.expected())


@WAYS
@pytest.mark.parametrize("step", ["one whole", "one with context", "several with contexts", "single tokens alone"])
def test_queries_keys_and_values_may_be_columns_of_one_matrix(step: str, dtype: torch.dtype, flash: bool) -> None:
    case = case_of(step, SHAPES[0], 16, dtype)
    check(case, case.run(flash, strided=True), case.expected())


@WAYS
def test_a_window_larger_than_everything_hides_nothing(dtype: torch.dtype, flash: bool) -> None:
    case = case_of("single tokens beside several", SHAPES[1], 16, dtype)
    check(case, case.run(flash, window=4096), case.expected())


@needs_flash
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunks", [[(0, 2)], [(0, 300)], [(0, 512)], [(700, 100)], [(0, 5), (100, 20), (64, 128)]])
def test_prompts_filled_up_as_for_a_graph(shape: tuple[int, int, int], chunks: list[tuple[int, int]]) -> None:
    """One shape for all of them: what is left of it counts for nothing."""
    heads, kv_heads, dim = shape
    case = Case(chunks, heads=heads, kv_heads=kv_heads, dim=dim, block=16, dtype=BF16)
    for sequences in {1, 8} if len(chunks) == 1 else {8}:
        check(case, case.run(True, room=Room(512, sequences, 64)), case.expected())


@WAYS
def test_a_chunked_prompt_gets_what_the_whole_prompt_gets(dtype: torch.dtype, flash: bool) -> None:
    heads, kv_heads, dim = SHAPES[0]
    case = Case([(0, 1500)], heads=heads, kv_heads=kv_heads, dim=dim, block=16, dtype=dtype)
    whole, right = (case.q[0], case.k[0], case.v[0]), case.expected()
    parts = []
    for start, end in [(0, 700), (700, 701), (701, 1213), (1213, 1500)]:
        case.chunks = [(start, end - start)]
        (case.q[0], _, _), case.k[0], case.v[0] = ([x[start:end] for x in whole], whole[1][:end], whole[2][:end])
        parts.append(case.run(flash))
    assert distance(torch.cat(parts), right) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("window", [None, 1, 20])
def test_masked_attention(rows: int, window: int | None) -> None:
    """By itself: the last rows of a sequence, its first query aligned with no tile."""
    case = Case([(64 - rows, rows)], heads=9, kv_heads=3, dim=64, block=16, dtype=F32)
    keys, values = (x[0].transpose(0, 1) for x in (case.k, case.v))
    out = masked_attention(case.q[0], keys, values, scale=case.scale, window=window)
    assert distance(out, case.expected(window=window)) < 1e-5
