"""Our kernels against plain arithmetic in float64."""

import pytest
import torch

from tests.cuda.case import DEVICE, FAR, LAYER, PROCESSORS, SHAPES, TOLERANCE, Case, distance, on_gpu, plain
from twostroke.engine.cuda_attention import Batch
from twostroke.engine.cuda_experts import few_experts, route
from twostroke.engine.cuda_kernels import attend_few, gather, store
from twostroke.engine.cuda_product import gated, multiply
from twostroke.engine.cuda_step import step_of

LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 200, 1000, 2049]
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# All shapes in blocks of 16, one in others: each is compiled anew.
CASES = pytest.mark.parametrize(("shape", "block"), [*((shape, 16) for shape in SHAPES), (SHAPES[0], 32)])
Shape = tuple[int, int, int]


def case_of(lengths: list[int], shape: Shape, block: int, dtype: torch.dtype, stored: bool = False) -> Case:
    heads, kv_heads, dim = shape
    chunks = [(length - 1, 1) for length in lengths]
    return Case(chunks, heads=heads, kv_heads=kv_heads, dim=dim, block=block, dtype=dtype, stored=stored)


def attended(case: Case, window: int = FAR, rows: int = 0, apart: bool = False) -> torch.Tensor:
    """What ``attend_few`` says; with ``rows``, filled up to as many."""
    step = step_of(case.asked(), case.block, {}, rows=rows, items=2 * PROCESSORS // case.kv_heads, apart=apart)
    _, _, places, lengths, work, sizes, tables, _ = (on_gpu(array) for array in step.arrays())
    query, key, value = (torch.cat([x, x[:1].expand(len(lengths) - len(x), -1, -1)]) for x in case.new())
    out, arrived = torch.full_like(query, torch.nan), torch.zeros(1000, dtype=torch.int32, device=DEVICE)
    attend_few(
        query, key, value, case.kv, LAYER, places, tables, sizes, lengths, work, arrived, out, rows=len(lengths),
        alone=not apart, scale=case.scale, window=window,
    )  # fmt: skip
    assert not arrived.any()
    return out


def expected(case: Case, window: int | None = None) -> torch.Tensor:
    """By plain attention on the CPU."""
    parts = zip(case.q, case.k, case.v, strict=True)
    return torch.cat(
        [plain(q.cpu(), k.cpu(), v.cpu(), scale=case.scale, window=window) for q, k, v in parts],
    )


# -- attention of single tokens --------------------------------------------------------------------------------------


@DTYPES
@CASES
def test_single_tokens_attend_to_their_whole_context(shape: Shape, block: int, dtype: torch.dtype) -> None:
    case = case_of(LENGTHS, shape, block, dtype)
    stored = case.kv.clone()
    for length, table, k, v in zip(LENGTHS, case.tables, case.k, case.v, strict=True):
        case.write(stored, table, k, v, length - 1, length)
    out = attended(case)
    assert out.dtype == dtype
    for row, right in zip(out.cpu(), expected(case), strict=True):
        assert distance(row, right) < TOLERANCE[dtype]
    assert torch.equal(case.kv.view(torch.uint8), stored.view(torch.uint8)), "its own K and V are stored, nothing else"


@DTYPES
@CASES
@pytest.mark.parametrize("window", [1, 7, 64, 100])
def test_single_tokens_attend_to_their_window(shape: Shape, block: int, dtype: torch.dtype, window: int) -> None:
    case = case_of(LENGTHS, shape, block, dtype)
    for row, right in zip(attended(case, window).cpu(), expected(case, window), strict=True):
        assert distance(row, right) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("lengths", [[1], [2049], [5, 300] * 70], ids=["one", "many splits", "no split"])
def test_however_the_context_is_split(lengths: list[int], dtype: torch.dtype) -> None:
    case = case_of(lengths, SHAPES[0], 16, dtype)
    for row, right in zip(attended(case).cpu(), expected(case), strict=True):
        assert distance(row, right) < TOLERANCE[dtype]


def test_rows_that_fill_up_get_what_the_first_gets() -> None:
    case = case_of([300, 5], SHAPES[1], 16, torch.float32)
    out = attended(case, rows=11)
    assert out.shape[0] == 11
    assert (out[2:] == out[0]).all()
    assert distance(out[:2].cpu(), expected(case)) < 1e-5


@DTYPES
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    case = case_of([300, 70, 1], SHAPES[1], 16, dtype)
    case.scale = 200.0
    out = attended(case)
    assert out.isfinite().all()
    assert distance(out.cpu(), expected(case)) < 100 * TOLERANCE[dtype]


# -- attention of few tokens of a sequence ---------------------------------------------------------------------------

FEW = [(40, 1), (0, 1), (0, 2), (0, 8), (3, 9), (60, 16), (1000, 17), (2049, 5)]


@DTYPES
@CASES
@pytest.mark.parametrize("window", [FAR, 1, 7, 100])
def test_few_tokens_attend_together(shape: Shape, block: int, dtype: torch.dtype, window: int) -> None:
    heads, kv_heads, dim = shape
    case = Case(FEW, heads=heads, kv_heads=kv_heads, dim=dim, block=block, dtype=dtype, stored=True)
    stored = case.kv.clone()
    out = attended(case, window, rows=70, apart=True)
    rows = sum(size for _, size in FEW)
    for row, right in zip(out[:rows].cpu(), expected(case, window), strict=True):
        assert distance(row, right) < TOLERANCE[dtype]
    assert (out[rows:] == out[0]).all(), "rows that fill up get what the first gets"
    assert torch.equal(case.kv.view(torch.uint8), stored.view(torch.uint8)), "nothing is stored"


# -- the pool --------------------------------------------------------------------------------------------------------


@DTYPES
@CASES
def test_rows_are_stored_at_their_places_and_nowhere_else(shape: Shape, block: int, dtype: torch.dtype) -> None:
    """Rows with a negative place are not stored at all. K comes as columns of a wider matrix."""
    heads, kv_heads, dim = shape
    chunks = [(40, 1), (16, 1), (0, 20), (30, 70)]
    case = Case(chunks, heads=heads, kv_heads=kv_heads, dim=dim, block=block, dtype=dtype)
    right = case.kv.clone()
    for (start, size), table, k, v in zip(case.chunks, case.tables, case.k, case.v, strict=True):
        case.write(right, table, k, v, start, start + size)
    _, key, value = case.new()
    nowhere = torch.full_like(value[:3], 7)
    key, value = torch.cat([key, nowhere]), torch.cat([value, nowhere])
    key = torch.cat([value, key, value], 1)[:, kv_heads : 2 * kv_heads]
    places = on_gpu(step_of(case.asked(), block, {}).places)
    places = torch.cat([places, torch.tensor([-1, -1, -1000], dtype=torch.int32, device=DEVICE)])
    store(key, value, case.kv, LAYER, places)
    assert torch.equal(case.kv.view(torch.uint8), right.view(torch.uint8))


@DTYPES
@CASES
@pytest.mark.parametrize("length", [1, 100, 512, 1000])
def test_blocks_are_copied_together(shape: Shape, block: int, dtype: torch.dtype, length: int) -> None:
    case = case_of([length, 50], shape, block, dtype, stored=True)
    table = torch.tensor(case.tables[0], dtype=torch.int32, device=DEVICE)
    out = gather(case.kv, LAYER, table)
    assert out.shape == (2, case.kv_heads, len(table) * block, case.dim)
    assert torch.equal(out[:, :, :length], torch.stack([case.k[0], case.v[0]]).transpose(1, 2))


# -- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [False, True])
def test_products_of_few_rows(biased: bool) -> None:
    """Where they are computed here at all, and not left to cuBLAS; whatever weight comes next."""
    generator = torch.Generator().manual_seed(5)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(DEVICE)

    following, computed = numbers(3584, 1001), 0
    for inner, outer in [(3584, 4608), (2048, 16896), (80, 4224), (1000, 16896), (512, 100)]:
        weight, bias = numbers(outer, inner), numbers(outer) if biased else None
        for rows in (1, 2, 16, 17, 32, 33, 64, 65):
            x = numbers(rows, inner)
            right = x.double() @ weight.double().T + (0 if bias is None else bias.double())
            for after in (None, following):
                y = multiply(x, weight, bias, alone=False, processors=PROCESSORS, following=after)
                if y is not None:
                    computed += 1
                    assert (y.shape, y.dtype) == ((rows, outer), torch.bfloat16)
                    assert distance(y, right) < 5e-3
        copies = x[:1].repeat(2, 1)
        for after in (None, following):
            y = multiply(copies, weight, bias, alone=True, processors=PROCESSORS, following=after)
            assert y is not None
            assert torch.equal(y[0], y[1])
            assert distance(y[:1], right[:1]) < 5e-3
    assert computed


@pytest.mark.parametrize("rows", [1, 3, 33, 64, 250, 256, 300, 512, 1000])
@pytest.mark.parametrize(("inner", "outer"), [(256, 512), (576, 1536), (100, 50)])
def test_gates(rows: int, inner: int, outer: int) -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(rows, inner, generator=generator).bfloat16().to(DEVICE)
    weight = torch.randn(2 * outer, inner, generator=generator).bfloat16().to(DEVICE)
    nothing = torch.empty(0)
    with Batch(nothing, nothing, None, [], [], False, PROCESSORS, nothing, {}).entered():
        y = gated(x[None], weight)
    gate, up = (x.double() @ weight.double().T).chunk(2, -1)
    assert (y.shape, y.dtype) == ((1, rows, outer), torch.bfloat16)
    assert distance(y[0], torch.nn.functional.silu(gate) * up) < 1e-2


# -- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("experts", "top"), [(128, 8), (60, 4), (16, 1)])
def test_the_most_probable_experts_are_chosen(experts: int, top: int, norm: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    for tokens in (1, 33, 1000):
        logits = torch.randn(tokens, experts, generator=generator).to(DEVICE)
        index, shares = route(logits, top, norm)
        values, right = logits.double().softmax(-1).topk(top, -1)
        values = values / values.sum(-1, keepdim=True) if norm else values
        assert torch.equal(index, right)
        assert distance(shares, values) < 1e-6


@pytest.mark.parametrize("tokens", [1, 3, 16, 33, 128])
def test_few_tokens_of_experts(tokens: int) -> None:
    """Fewer pairs than experts, and more; several tokens of one expert, and experts of none."""
    generator = torch.Generator().manual_seed(9)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(DEVICE)

    experts, hidden, inner, top = 128, 256, 128, 8
    x, gate_up, down = numbers(tokens, hidden), numbers(experts, 2 * inner, hidden), numbers(experts, hidden, inner)
    for most in (experts, 10):
        index = torch.stack([torch.randperm(most, generator=generator)[:top] for _ in range(tokens)]).to(DEVICE)
        shares = numbers(tokens, top).abs()
        parts = few_experts(x, index, shares, gate_up, down)
        gate, up = torch.einsum("th,tkoh->tko", x.double(), gate_up[index].double()).chunk(2, -1)
        middle = torch.nn.functional.silu(gate) * up
        right = torch.einsum("tki,tkhi->tkh", middle, down[index].double()) * shares.double()[..., None]
        assert distance(parts, right) < 1e-2
