"""Plain attention, and steps over a pool of which nothing may be read but what belongs to them."""

import random
from collections.abc import Sequence as Seq

import torch

from twostroke.engine.cuda_attention import Batch, Bundle, Singles
from twostroke.engine.cuda_attention import Chunk as DeviceChunk
from twostroke.engine.cuda_step import Ints, Room, Step, prompts_of, step_of
from twostroke.engine.scheduler import Chunk, Sequence
from twostroke.kv.keys import root_key
from twostroke.kv.pool import Lease, Pool
from twostroke.messages import Request, Sampling

DEVICE = torch.device("cuda", 0)
LAYERS, LAYER = 3, 1
PROCESSORS = 132  # any number is right
FAR = 1 << 30  # a window that hides nothing
SHAPES = [(28, 4, 128), (9, 3, 64), (4, 4, 16), (8, 1, 80)]  # heads, kv_heads, dim
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative, in norm


def plain(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float, window: int | None = None
) -> torch.Tensor:
    """Attention of the last tokens of one sequence to all of it, in float64, where the tensors are.

    ``query`` is ``[rows, heads, dim]``, ``keys`` and ``values`` are ``[tokens, kv_heads, dim]``.
    """
    rows, tokens, group = len(query), len(keys), query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    at = torch.arange(tokens - rows, tokens, device=query.device)[:, None]
    column = torch.arange(tokens, device=query.device)
    hidden = column > at
    if window is not None:
        hidden |= column <= at - window
    scores = torch.einsum("rhd,thd->hrt", query.double(), keys) * scale
    return torch.einsum("hrt,thd->rhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the error, relative to what is expected; NaN if anything is."""
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm())


def on_gpu(array: Ints) -> torch.Tensor:
    return torch.from_numpy(array.copy()).to(DEVICE)


def batch_of(step: Step, kv: torch.Tensor, flash: bool) -> Batch:
    """What a runner makes of a step."""
    _, _, places, lengths, work, sizes, tables, _ = (on_gpu(array) for array in step.arrays()[:8])
    chunks = [DeviceChunk(one.first, one.tokens, one.start, on_gpu(one.table)) for one in step.longs]
    bundles = [Bundle(*(on_gpu(array) for array in one)) for one in step.shorts]
    singles = Singles(len(lengths), tables, sizes, lengths, work) if len(lengths) else None
    arrived = torch.zeros(1 << 12, dtype=torch.int32, device=DEVICE)
    return Batch(kv, places, singles, chunks, bundles, flash, PROCESSORS, arrived, {})


class Case:
    """A pool with the context of several sequences in random slots, and one step on top of that.

    Other slots and other layers are NaN. What is not written of a sequence's own blocks, and slot 0, which tables are
    filled up with, hold large numbers: tiles of them are read, but must count for nothing.
    """

    def __init__(
        self,
        chunks: Seq[tuple[int, int]],
        *,
        heads: int,
        kv_heads: int,
        dim: int,
        block: int,
        dtype: torch.dtype,
        stored: bool = False,
    ) -> None:
        """``chunks``: tokens before and tokens of the step. ``stored``: the step's own K and V are in the pool, too."""
        chance, generator = random.Random(7), torch.Generator().manual_seed(7)
        self.chunks = sorted(chunks, key=lambda chunk: chunk[1] > 1)
        self.heads, self.kv_heads, self.dim, self.block, self.dtype = heads, kv_heads, dim, block, dtype
        self.scale = dim**-0.5

        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

        ends = [start + size for start, size in self.chunks]
        needed = [-(-end // block) for end in ends]
        total = sum(needed) + 5
        free = chance.sample(range(total), total)
        self.tables = [[free.pop() for _ in range(count)] for count in needed]
        self.q = [numbers(size, heads, dim) for _, size in self.chunks]
        self.k = [numbers(end, kv_heads, dim) for end in ends]
        self.v = [numbers(end, kv_heads, dim) for end in ends]
        self.kv = torch.full((total, LAYERS, 2, kv_heads, block, dim), torch.nan, dtype=dtype, device=DEVICE)
        self.kv[[0, *(slot for table in self.tables for slot in table)], LAYER] = 1e4
        for (start, size), table, k, v in zip(self.chunks, self.tables, self.k, self.v, strict=True):
            self.write(self.kv, table, k, v, 0, start + size if stored else start)

    def write(self, kv: torch.Tensor, table: Seq[int], k: torch.Tensor, v: torch.Tensor, start: int, end: int) -> None:
        """Put the K and V of one sequence's tokens ``start .. end - 1`` where they belong."""
        at = torch.arange(start, end, device=DEVICE)
        slots, offsets = torch.tensor(table, device=DEVICE)[at // self.block], at % self.block
        kv[slots, LAYER, 0, :, offsets] = k[start:end]
        kv[slots, LAYER, 1, :, offsets] = v[start:end]

    def asked(self) -> list[Chunk]:
        """The step as the engine has it."""
        result = []
        for (start, size), table in zip(self.chunks, self.tables, strict=True):
            sequence = Sequence(Request("r/0/0", [0] * (start + size), Sampling(1, 0)), root_key("", ""))
            sequence.lease = Lease(Pool(1))
            sequence.lease.slots = list(table)
            result.append(Chunk(sequence, start, size, samples=True))
        return result

    def new(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Q, K and V of the step: ``[rows, heads, dim]``."""
        starts = [start for start, _ in self.chunks]
        k, v = ([x[start:] for x, start in zip(of, starts, strict=True)] for of in (self.k, self.v))
        return torch.cat(self.q), torch.cat(k), torch.cat(v)

    def run(self, flash: bool, *, window: int = FAR, room: Room | None = None, strided: bool = False) -> torch.Tensor:
        """``[rows, heads, dim]`` of the operator. ``room``: filled up as for a captured graph. ``strided``: Q, K and V
        are columns of one matrix, as a fused projection gives them.
        """
        step = (
            prompts_of(self.asked(), self.block, room)
            if room
            else step_of(self.asked(), self.block, {}, items=2 * PROCESSORS // self.kv_heads, together=flash)
        )
        batch = batch_of(step, self.kv, flash)
        q, k, v = self.new()
        rows = len(q)
        spare = len(step.ids) - rows
        q, k, v = (torch.cat([x, x[:1].expand(spare, *x.shape[1:])]) for x in (q, k, v))
        if strided:
            q, k, v = torch.split(torch.cat([q, k, v], 1), [self.heads, self.kv_heads, self.kv_heads], 1)
        with torch.inference_mode(), batch.entered():
            out: torch.Tensor = torch.ops.twostroke.attend(
                *(x[None].transpose(1, 2) for x in (q, k, v)), torch.tensor(LAYER), self.scale, window
            )
        assert out.shape == (1, len(step.ids), self.heads, self.dim)
        assert out.dtype == self.dtype
        return out[0, :rows]

    def expected(self, *, window: int | None = None) -> torch.Tensor:
        """The same, by plain attention."""
        parts = zip(self.q, self.k, self.v, strict=True)
        return torch.cat([plain(q, k, v, scale=self.scale, window=window) for q, k, v in parts])
