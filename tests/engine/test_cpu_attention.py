"""Paged attention against plain attention, over pools whose slots are in any order."""

from collections.abc import Sequence as Seq

import numpy as np
import pytest
import torch
from torch import nn

from twostroke.engine.cpu_attention import Batch, Prefill, attention

LAYERS, LAYER = 3, 1
Chunk = tuple[int, int]  # tokens of context before, tokens of the step


class Case:
    """A pool with the context of several sequences in it, in random slots, and one step on top of that."""

    def __init__(
        self, chunks: Seq[Chunk], *, heads: int, kv_heads: int, dim: int, block_tokens: int, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        self.chunks = sorted(chunks, key=lambda chunk: chunk[1] > 1)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        ends = [start + size for start, size in self.chunks]
        needed = [-(-end // block_tokens) for end in ends]
        order = torch.randperm(sum(needed) + 3, generator=generator).tolist()
        tables = [[order.pop() for _ in range(count)] for count in needed]
        self.k = [random(end, kv_heads, dim) for end in ends]
        self.v = [random(end, kv_heads, dim) for end in ends]
        self.q = [random(size, heads, dim) for _, size in self.chunks]
        # What was never written is not zero but large: whoever reads it gets it wrong.
        self.kv = torch.full((sum(needed) + 3, LAYERS, 2, kv_heads, block_tokens, dim), 1e4, dtype=dtype)
        slots, offsets, prefills, row = [], [], [], 0
        for (start, size), table, k, v in zip(self.chunks, tables, self.k, self.v, strict=True):
            for at in range(start):
                self.kv[table[at // block_tokens], LAYER, 0, :, at % block_tokens] = k[at]
                self.kv[table[at // block_tokens], LAYER, 1, :, at % block_tokens] = v[at]
            slots += [table[at // block_tokens] for at in range(start, start + size)]
            offsets += [at % block_tokens for at in range(start, start + size)]
            if size > 1:
                prefills.append(Prefill(row, start, size, torch.tensor(table)))
            row += size
        singles = [index for index, (_, size) in enumerate(self.chunks) if size == 1]
        decode_tables = np.zeros((len(singles), max((needed[i] for i in singles), default=0)), np.int32)
        for index in singles:
            decode_tables[index, : needed[index]] = tables[index]
        lengths = np.array([self.chunks[index][0] + 1 for index in singles], np.int32)
        self.batch = Batch(self.kv, torch.tensor(slots), torch.tensor(offsets), decode_tables, lengths, prefills)
        self.tables, self.block_tokens = tables, block_tokens

    def run(self, scaling: float, window: int | None) -> torch.Tensor:
        """``[rows, heads, head_dim]``."""
        module = nn.Module()
        module.layer_idx = LAYER  # type: ignore[assignment]
        new = [(start, k, v) for (start, _), k, v in zip(self.chunks, self.k, self.v, strict=True)]
        out, weights = attention(
            module,
            torch.cat(self.q).transpose(0, 1)[None],
            torch.cat([k[start:] for start, k, _ in new]).transpose(0, 1)[None],
            torch.cat([v[start:] for start, _, v in new]).transpose(0, 1)[None],
            None,
            twostroke=self.batch,
            scaling=scaling,
            sliding_window=window,
        )
        assert weights is None
        return out[0]

    def expected(self, scaling: float, window: int | None) -> torch.Tensor:
        """Each row by itself, in float64."""
        rows = []
        for (start, size), q, k, v in zip(self.chunks, self.q, self.k, self.v, strict=True):
            group = q.shape[1] // k.shape[1]
            for index in range(size):
                last = start + index + 1
                first = max(0, last - window) if window else 0
                keys = k[first:last].double().repeat_interleave(group, 1)
                values = v[first:last].double().repeat_interleave(group, 1)
                scores = torch.einsum("hd,thd->ht", q[index].double(), keys) * scaling
                rows.append(torch.einsum("ht,thd->hd", scores.softmax(-1), values))
        return torch.stack(rows)


MIXED = [(0, 1), (5, 1), (31, 1), (32, 1), (90, 1), (0, 9), (0, 40), (13, 6), (32, 17), (50, 2)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block_tokens", [1, 8, 16, 32])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 7, 40])
def test_a_mixed_step_is_plain_attention(
    dtype: torch.dtype, block_tokens: int, heads: int, kv_heads: int, window: int | None
) -> None:
    case = Case(MIXED, heads=heads, kv_heads=kv_heads, dim=16, block_tokens=block_tokens, dtype=dtype)
    out = case.run(0.3, window)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), case.expected(0.3, window), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], check_dtype=False
    )


@pytest.mark.parametrize("chunks", [[(20, 1)], [(0, 20)], [(20, 1)] * 5, [(3, 4), (0, 3)]])
@pytest.mark.parametrize("dim", [8, 12, 64])
def test_steps_of_one_kind(chunks: list[Chunk], dim: int) -> None:
    case = Case(chunks, heads=4, kv_heads=2, dim=dim, block_tokens=16, dtype=torch.float32)
    torch.testing.assert_close(case.run(0.2, None).double(), case.expected(0.2, None), atol=1e-5, rtol=1e-5)


def test_the_step_is_stored_where_the_batch_says_and_nowhere_else() -> None:
    case = Case(MIXED, heads=4, kv_heads=2, dim=8, block_tokens=8, dtype=torch.float32)
    before = case.kv.clone()
    case.run(0.3, None)
    for (start, size), table, k, v in zip(case.chunks, case.tables, case.k, case.v, strict=True):
        for at in range(start, start + size):
            stored = case.kv[table[at // 8], LAYER, :, :, at % 8]
            assert torch.equal(stored, torch.stack([k[at], v[at]]))
            before[table[at // 8], LAYER, :, :, at % 8] = stored
    assert torch.equal(case.kv, before)


def test_large_scores_do_not_overflow() -> None:
    """Online softmax: the highest score is taken off before it is raised to a power, in every block anew."""
    case = Case([(40, 1), (0, 30)], heads=2, kv_heads=1, dim=8, block_tokens=4, dtype=torch.float32)
    out = case.run(200.0, None)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), case.expected(200.0, None), atol=1e-3, rtol=1e-3)


def test_a_chunked_prompt_gets_what_the_whole_prompt_gets() -> None:
    whole = Case([(0, 33)], heads=4, kv_heads=2, dim=8, block_tokens=8, dtype=torch.float32)
    expected = whole.run(0.3, None)
    kv = whole.kv.clone()
    whole.kv[:] = 1e4
    module = nn.Module()
    module.layer_idx = LAYER  # type: ignore[assignment]
    (table,), (q,), (k,), (v,) = whole.tables, whole.q, whole.k, whole.v
    got = []
    for start, end in [(0, 5), (5, 24), (24, 31), (31, 33)]:
        at = torch.arange(start, end)
        blocks = torch.tensor(table)
        batch = Batch(
            whole.kv, blocks[at // 8], at % 8, np.zeros((0, 0), np.int32), np.zeros(0, np.int32),
            [Prefill(0, start, end - start, blocks[: (end - 1) // 8 + 1])],
        )  # fmt: skip
        q_, k_, v_ = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        got.append(attention(module, q_, k_, v_, None, twostroke=batch, scaling=0.3)[0][0])
    torch.testing.assert_close(torch.cat(got), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(whole.kv, kv)
