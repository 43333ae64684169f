"""Steps on a CUDA device.

A step of few tokens replays a CUDA graph for the next larger size; any other runs kernel by kernel. Either way the
host uploads one array, starts the kernels, and waits for nothing but the sampled tokens, one step later.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import prod

import torch
from torch._inductor import config as inductor
from transformers import PreTrainedModel

from twostroke.engine import cuda_attention
from twostroke.engine.cuda_attention import Batch, Bundle, Singles, mark_layers
from twostroke.engine.cuda_attention import Chunk as DeviceChunk
from twostroke.engine.cuda_experts import use_few_experts
from twostroke.engine.cuda_kernels import bring, early
from twostroke.engine.cuda_prefill import is_supported
from twostroke.engine.cuda_product import use_products
from twostroke.engine.cuda_step import Ints, Room, Step, prompts_of, step_of
from twostroke.engine.runner import Launched, Limits
from twostroke.engine.sampling import Drawn, Row, draw, is_plain
from twostroke.engine.scheduler import Chunk, Sequence
from twostroke.errors import DeviceLost, OutOfMemory, StartupError
from twostroke.kv.keys import root_key
from twostroke.kv.layout import Layout
from twostroke.kv.pool import Pool
from twostroke.messages import Request, Sampling, Token

log = logging.getLogger(__name__)
ATTENTION = cuda_attention.NAME  # of what the network is loaded with
DTYPES = ("bfloat16", "float32")
EXPERTS = {"bfloat16": "grouped_mm", "float32": "batched_mm"}  # neither loops over experts, nor waits for the device

_ALIGN = 32  # int32s; arrays of an upload start at multiples of it
_CONTEXT_BYTES = 600 << 20  # of the driver and of libraries, which torch does not count
_GRAPH_BYTES = 512 << 20  # of the captured graphs' own memory
_WAVE = 2  # programs of decode attention on a multiprocessor at once
_COUNTERS = 1 << 16  # results that programs of one kernel may share
_FIRST = -1  # priority of the engine's kernels, before those that move blocks
_TAILS = (16, 32, 64, 128)  # rows of steps with short prompts, or ends of those whose beginnings the pool has
_MIXED = (1, 1, 256, 256, 2048)  # tokens of a step that has chunks of each kind
_PROMPTS = 8  # short prompts that are captured as one step

_Result = tuple[torch.Tensor, torch.Tensor]  # logits, most probable tokens


def usual_dtype() -> str:
    """What computes fastest."""
    return "bfloat16"


class _Uploaded(Seq[torch.Tensor]):
    """Arrays in one tensor on the device. A view is made when it is asked for: a captured step needs none, and with
    each a thread gives up the interpreter, which others may want.
    """

    def __init__(self, whole: torch.Tensor, arrays: Seq[Ints]) -> None:
        self._whole = whole
        self._shapes = [array.shape for array in arrays]
        self.starts = [0, *accumulate(-(-array.size // _ALIGN) * _ALIGN for array in arrays)]

    @property
    def size(self) -> int:
        """Numbers up to the end of the last one."""
        return self.starts[-1]

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        start, shape = self.starts[index], self._shapes[index]
        return self._whole[start : start + prod(shape)].view(shape)


class _Upload:
    """One array of int32 on the device that each step's numbers go to together."""

    def __init__(self, device: torch.device, capacity: int) -> None:
        self._device = torch.empty(capacity, dtype=torch.int32, device=device)
        # By turns: the copy of the step before may still be under way.
        self._hosts = [torch.empty(capacity, dtype=torch.int32, pin_memory=True) for _ in range(2)]

    def put(self, arrays: Seq[Ints]) -> _Uploaded:
        """Start copying; where each array will be. Arrays of the same sizes always go to the same places."""
        self._hosts.reverse()
        host = self._hosts[0].numpy()
        places = _Uploaded(self._device, arrays)
        for start, array in zip(places.starts, arrays, strict=False):
            host[start : start + array.size] = array.reshape(-1)
        bring(self._device[: places.size], self._hosts[0][: places.size])
        return places


@dataclass(frozen=True)
class _UnderWay:
    """A step whose kernels are started."""

    drawn: Drawn  # in the host's memory, once ``computed``
    computed: torch.cuda.Event

    def tokens(self) -> list[Token]:
        """See ``Launched``."""
        try:
            self.computed.synchronize()
        except RuntimeError as error:
            raise DeviceLost(f"the GPU failed: {error}") from error
        return self.drawn.tokens()


@dataclass(frozen=True)
class _Graph:
    """A captured step."""

    room: Room  # of prompts; for single tokens, how many
    graph: torch.cuda.CUDAGraph


class CudaRunner:
    """Runs up to two steps at once: the second is started while the first computes."""

    depth = 2

    def __init__(self, network: PreTrainedModel, layout: Layout, device: torch.device) -> None:
        if layout.block_tokens % 16:
            raise StartupError(f"--block-size {layout.block_tokens}: on a GPU it must be a multiple of 16")
        self._network = network
        self._layout = layout
        self._device = device
        self._dtype = getattr(torch, layout.dtype)
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        mark_layers(network)
        self._flash = is_supported(layout.head_dim, self._dtype, device)
        if not self._flash and self._dtype != torch.float32:
            log.warning(
                "prefill attention falls back to torch's: FlashAttention wants flash-attn-4, Hopper or Blackwell, "
                "and heads of 16, 32, .. 128 or 256"
            )
        experts = getattr(network.config.get_text_config(), "num_experts_per_tok", 0) or 0
        self._following: Mapping[int, torch.Tensor] = {}
        if self._dtype == torch.bfloat16:
            self._following = use_products(network)
            use_few_experts(network, experts)
        # Its rule for when a kernel must wait overlooks what the one before it scatters, as grouped experts do.
        inductor.triton.enable_pdl = early() and not experts
        for layer in network.base_model.layers:
            layer.compile(dynamic=True)
        network.base_model.norm.compile(dynamic=True)
        self._decodes: list[_Graph] = []  # smallest first
        self._tails: list[_Graph] = []
        self._prompts: list[_Graph] = []
        self._kv = torch.empty(0)
        self._arrived = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
        self._limits = Limits(0, 0, 0)
        self._row_of: dict[Sequence, int] = {}  # of each sequence that the latest step sampled for

    # -- start ---------------------------------------------------------------------------------------------------

    def measure(self, limits: Limits) -> int:
        """See ``Runner``."""
        with torch.cuda.device(self._device):
            self._prepare(limits)
            blocks = self._layout.blocks(limits.token_budget) + 1
            self._set_pool(torch.zeros(blocks, self._layout.block_bytes, dtype=torch.uint8, device=self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
            self._try(limits.token_budget)
            peak = torch.cuda.max_memory_allocated(self._device)
            self._kv = torch.empty(0)
            torch.cuda.empty_cache()
            return peak + _CONTEXT_BYTES + _GRAPH_BYTES

    def bind(self, slots: torch.Tensor, limits: Limits, say: Callable[[str], None]) -> None:
        """See ``Runner``."""
        with torch.cuda.device(self._device):
            slots.zero_()  # attention reads whole tiles, and nothing in them may be not a number
            self._set_pool(slots)
            self._prepare(limits)
            say("compiling")
            most = min(len(slots) * self._layout.block_tokens, limits.token_budget)
            self._try(most)  # the largest first: kernels are tuned for the size that they are compiled at
            if most >= sum(_MIXED):
                self._try(*_MIXED)
            say("capturing graphs")
            self._capture(limits)

    def _prepare(self, limits: Limits) -> None:
        if limits == self._limits:
            return
        self._limits = limits
        pages = self._layout.blocks(limits.context)
        most = max(_PROMPTS, *_TAILS, limits.max_batch)
        tokens = limits.token_budget + most
        # Tables, of single tokens and of bundles, as wide as their longest.
        capacity = 8 * tokens + 4 * (most + 64) * (pages + 2 * _ALIGN) + 4 * self._items(most)
        self._upload = _Upload(self._device, capacity)
        self._sampled = torch.zeros(most, dtype=torch.int64, device=self._device)  # by the latest step launched
        hosts = (torch.empty(most, dtype=torch.int64, pin_memory=True) for _ in range(self.depth + 1))
        self._answers = deque(hosts)
        self._ids = torch.zeros_like(self._sampled)  # the most probable ones; the step may yet fail
        head = self._network.get_output_embeddings().weight
        self._logits = torch.zeros(most, len(head), dtype=self._dtype, device=self._device)

    def _set_pool(self, slots: torch.Tensor) -> None:
        self._kv = slots.view(self._dtype).view(-1, *self._layout.shape)

    def _try(self, *lengths: int) -> None:
        """Compute prompts of these lengths, of anything, for their memory and for what is built on the way."""
        self.forward([_anything(tokens, self._layout) for tokens in lengths])

    @torch.inference_mode()
    def _capture(self, limits: Limits) -> None:
        """Graphs of decode steps and of short prompts, largest first, so that smaller ones fit into their memory."""
        block = self._layout.block_tokens
        stream = torch.cuda.Stream(self._device, priority=_FIRST)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        memory = torch.cuda.graph_pool_handle()

        def captured(room: Room, step: Step, compute: Callable[[Seq[torch.Tensor]], _Result]) -> _Graph:
            arrays = self._upload.put(step.arrays())
            compute(arrays)  # once outside: what is built when it is first used cannot be captured
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
                logits, ids = compute(arrays)
                # Into memory that all graphs share: they would keep 800 MiB of their own.
                self._logits[: len(logits)] = logits
                self._ids[: len(ids)] = ids
            return _Graph(room, graph)

        with torch.cuda.stream(stream):
            self._brought(self._ids)  # so that it is compiled
            if self._flash:
                for room in reversed(_prompt_rooms(len(self._kv), limits, block)):
                    step = prompts_of([_anything(room.rows, self._layout)], block, room)
                    self._prompts.insert(0, captured(room, step, partial(self._prefill, step)))
            for rows in reversed(_decode_sizes(limits.max_batch)):
                some = max(2, rows)
                step = step_of([_anything(1, self._layout)], block, {}, rows=some, items=self._items(some))
                self._decodes.insert(0, captured(Room(rows, rows, 0), step, partial(self._decode, alone=rows == 1)))
            for rows in reversed(_TAILS):
                step = step_of([_anything(1, self._layout)], block, {}, rows=rows, items=self._items(rows))
                self._tails.insert(0, captured(Room(rows, rows, 0), step, partial(self._decode, apart=True)))
        stream.synchronize()

    # -- steps ---------------------------------------------------------------------------------------------------

    def enter_thread(self) -> None:
        """See ``Runner``."""
        torch.cuda.set_device(self._device)
        torch.cuda.set_stream(torch.cuda.Stream(self._device, priority=_FIRST))  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def launch(self, chunks: Seq[Chunk], rows: Seq[Row]) -> Launched:
        """See ``Runner``."""
        try:
            logits, ids = self._compute(chunks)
            drawn = Drawn(ids, {}) if is_plain(rows) else draw(logits, rows)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemory("the GPU has not enough memory left for a step of this request") from error
        except torch.AcceleratorError as error:
            raise DeviceLost(f"the GPU failed: {error}") from error
        self._sampled[: len(rows)] = drawn.ids
        self._row_of = {sequence: row for row, sequence in enumerate(c.sequence for c in chunks if c.samples)}
        drawn = replace(drawn, ids=self._brought(drawn.ids)).to_host()
        computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        computed.record()
        return _UnderWay(drawn, computed)

    def _brought(self, ids: torch.Tensor) -> torch.Tensor:
        """The same in the host's memory, once the stream has come that far; until as many steps more are launched."""
        self._answers.rotate()
        answer = self._answers[0][: len(ids)]
        bring(answer, ids)
        return answer

    @torch.inference_mode()
    def forward(self, chunks: Seq[Chunk]) -> torch.Tensor:
        """See ``Runner``."""
        with torch.cuda.device(self._device):
            logits, _ = self._compute(chunks)
            logits = logits.clone()
            torch.cuda.synchronize(self._device)
        return logits

    def _compute(self, chunks: Seq[Chunk]) -> _Result:
        """Logits ``[chunks that sample, vocabulary]`` and the most probable tokens, until the next step."""
        block = self._layout.block_tokens
        sampled, tokens = sum(chunk.samples for chunk in chunks), sum(chunk.size for chunk in chunks)
        if chunks[-1].size == 1:
            one = next((graph for graph in self._decodes if graph.room.rows >= len(chunks)), None)
            rows = max(2, one.room.rows) if one else len(chunks)
            step = step_of(chunks, block, self._row_of, rows=rows, items=self._items(rows))
        elif tails := next((graph for graph in self._tails if graph.room.rows >= tokens), None):
            return self._compute_apart(chunks, tails)
        elif chunks[0].size > 1 and (one := next((g for g in self._prompts if g.room.holds(chunks, block)), None)):
            step = prompts_of(chunks, block, one.room)
        else:
            items = self._items(sum(chunk.size == 1 for chunk in chunks))
            one = None
            step = step_of(chunks, block, self._row_of, items=items, together=self._flash)
        arrays = self._upload.put(step.arrays())
        if one is None:
            return self._prefill(step, arrays)
        one.graph.replay()
        return self._logits[:sampled], self._ids[:sampled]

    def _compute_apart(self, chunks: Seq[Chunk], graph: _Graph) -> _Result:
        """Few tokens of any chunks, of which some that follow each other attend together."""
        rows = graph.room.rows
        step = step_of(chunks, self._layout.block_tokens, self._row_of, rows=rows, items=self._items(rows), apart=True)
        ends = self._upload.put(step.arrays())[7]
        graph.graph.replay()
        return self._logits[ends], self._ids[ends]

    def _decode(self, arrays: Seq[torch.Tensor], *, alone: bool = False, apart: bool = False) -> _Result:
        """A step of single tokens, or of some that are ``apart``; logits of all."""
        ids, positions, places, lengths, work, sizes, tables, _ = arrays
        singles = Singles(len(ids), tables, sizes, lengths, work)
        return self._run(self._batch(places, singles, alone=alone, apart=apart), ids, positions)

    def _prefill(self, step: Step, arrays: Seq[torch.Tensor]) -> _Result:
        """Any step, from where its arrays were uploaded to."""
        ids, positions, places, lengths, work, sizes, tables, ends, *rest = arrays
        more = iter(rest)
        chunks = [DeviceChunk(c.first, c.tokens, c.start, next(more)) for c in step.longs]
        bundles = [Bundle(*(next(more) for _ in range(4))) for _ in step.shorts]
        singles = Singles(len(lengths), tables, sizes, lengths, work) if len(lengths) else None
        return self._run(self._batch(places, singles, chunks, bundles), ids, positions, ends)

    def _batch(
        self,
        places: torch.Tensor,
        singles: Singles | None,
        chunks: Seq[DeviceChunk] = (),
        bundles: Seq[Bundle] = (),
        *,
        alone: bool = False,
        apart: bool = False,
    ) -> Batch:
        return Batch(
            self._kv,
            places,
            singles,
            chunks,
            bundles,
            self._flash,
            self._processors,
            self._arrived,
            self._following,
            alone,
            apart,
        )

    def _items(self, rows: int) -> int:
        """Into how many parts the contexts of so many single tokens are split: one wave of programs, or a row each."""
        return max(rows, _WAVE * self._processors // self._layout.kv_heads)

    def _run(
        self, batch: Batch, ids: torch.Tensor, positions: torch.Tensor, ends: torch.Tensor | None = None
    ) -> _Result:
        """The network on these rows; logits, and the most probable tokens, of the rows in ``ends`` (``None``: all)."""
        tokens = torch.where(ids < 0, self._sampled[(-1 - ids).clamp(min=0)], ids)
        with batch.entered():
            hidden = self._network.base_model(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False
            ).last_hidden_state[0]
            if ends is not None:
                hidden = hidden[ends]
            logits: torch.Tensor = self._network.get_output_embeddings()(hidden)
        return logits, logits.argmax(-1)


def make_runner(network: PreTrainedModel, layout: Layout, device: torch.device, threads: int) -> CudaRunner:
    """A runner of this kind of device."""
    del threads
    return CudaRunner(network, layout, device)


def _decode_sizes(most: int) -> list[int]:
    """Batches that are captured; the last one holds ``most``."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, *range(128, most + 32, 32)]
    return [*(size for size in sizes if size < most), most]


def _prompt_rooms(slots: int, limits: Limits, block: int) -> list[Room]:
    """Steps of short prompts that are captured, smallest first: these would take longer to launch than to compute."""
    most = min(1024, limits.token_budget, slots * block)
    rows = sorted({min(most, rows) for rows in (256, 512, 1024) if most > _TAILS[-1]})
    near, far = 2048 // block, min(-(-limits.context // block), slots)
    rooms = [Room(count, sequences, near) for count in rows for sequences in (1, _PROMPTS)]
    return rooms + [Room(count, 1, far) for count in rows if far > near]


def _anything(tokens: int, layout: Layout) -> Chunk:
    """A prompt whose KV goes to the first slots."""
    sequence = Sequence(Request("anything", [0] * tokens, Sampling(1, 0)), root_key("", ""))
    pool = Pool(layout.blocks(tokens))
    sequence.lease = pool.lease()
    sequence.lease.grow(pool.total)
    return Chunk(sequence, 0, tokens, samples=True)
