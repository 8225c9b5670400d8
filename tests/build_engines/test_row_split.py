"""The decoder, split over ranks by rows: every rank gets the pixels of the decoder that is not."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from causal_forcing.build_engines.cuda.tape_set import TapeSet, lay_out
from causal_forcing.build_engines.export import export_program
from causal_forcing.build_engines.models.row_split import split_rows, stage_halos
from causal_forcing.build_engines.models.vae import VAEDecoder, VAEDecoderFirst, WanVAE
from causal_forcing.build_engines.models.vae_stages import decoder_row_split
from causal_forcing.build_engines.networks import Network
from causal_forcing.build_engines.vae_networks import decoder_networks
from causal_forcing.plugins import row_ops
from causal_forcing.plugins.fused_op import keep_fused_ops
from causal_forcing.plugins.ranks import Ranks, rehearse
from causal_forcing.runtime.engine import IOTensors
from causal_forcing.runtime.engines.cuda_engine import CudaEngine, DeviceWeights
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.model_spec import WAN21_T2V_1_3B, VAESpec

T = TypeVar("T")
SPEC = VAESpec(base_dim=8, num_res_blocks=1)
# fp32 convolutions of other heights may sum in another order.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def random_vae(spec: VAESpec = SPEC) -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(spec).eval()


def draw_latents(chunks: int, frames: int, height: int, width: int, batch: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(frames)
    shape = (batch, frames, SPEC.latent_channels, height, width)
    return [torch.randn(shape, generator=generator) for _ in range(chunks)]


def decode(vae: WanVAE, latents: Sequence[torch.Tensor], ranks: int = 1) -> list[torch.Tensor]:
    split = None if ranks == 1 else decoder_row_split(vae.spec, latents[0].shape[-2], ranks)
    pixels, *caches = VAEDecoderFirst(vae, split)(latents[0])
    clip = [pixels]
    for latent in latents[1:]:
        pixels, *caches = VAEDecoder(vae, split)(latent, *caches)
        clip.append(pixels)
    return clip


# --- ranks in threads -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadRank:
    """One of several threads that stand for ranks."""

    index: int
    size: int
    blocks: list[Any]
    barrier: threading.Barrier

    def exchange(self, blocks: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        raise AssertionError("the decoder exchanges nothing")

    def gather(self, block: torch.Tensor) -> torch.Tensor:
        self.blocks[self.index] = block
        self.barrier.wait(timeout=60)
        gathered = torch.stack(self.blocks)
        self.barrier.wait(timeout=60)
        return gathered

    def share(self, x: torch.Tensor) -> None:
        raise AssertionError("the decoder shares nothing")

    def symmetric_buffer(self, use: str, shape: Sequence[int], like: torch.Tensor) -> None:
        raise AssertionError("the decoder's ranks do not write into each other's memory")

    def meet(self, like: torch.Tensor) -> None:
        raise AssertionError("the decoder's ranks meet nowhere else")


@pytest.fixture
def on_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], T]], list[T]]:
    """Run a function on several ranks at once; returns what it returned on each."""
    current = contextvars.ContextVar[Ranks]("current")

    def current_ranks(size: int) -> Ranks:
        assert current.get().size == size, "a network runs on as many ranks as it was built for"
        return current.get()

    def run(ranks: int, function: Callable[[], T]) -> list[T]:
        blocks, barrier = [None] * ranks, threading.Barrier(ranks)

        def as_rank(index: int) -> T:
            current.set(ThreadRank(index=index, size=ranks, blocks=blocks, barrier=barrier))
            with torch.no_grad():
                return function()

        with ThreadPoolExecutor(ranks) as pool:
            return list(pool.map(as_rank, range(ranks)))

    for name in ("current_ranks", "decoding_ranks"):
        monkeypatch.setattr(row_ops, name, current_ranks)
    return run


OnRanks = Callable[[int, Callable[[], list[torch.Tensor]]], list[list[torch.Tensor]]]


def assert_all_have(clips: Sequence[Sequence[torch.Tensor]], wanted: Sequence[torch.Tensor]) -> None:
    for clip in clips:
        for got, want in zip(clip, wanted, strict=True):
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("ranks", "size", "frames", "batch"),
    [
        (2, (24, 3), 3, 1),
        (3, (24, 3), 1, 2),
        (4, (40, 2), 1, 1),  # inner ranks, with a halo on both sides
        (3, (10, 2), 1, 1),  # own rows that overlap
        (2, (6, 10), 1, 1),  # windows of the whole picture
        (3, (2, 2), 1, 1),  # more ranks than rows
    ],
    ids=str,
)
def test_every_rank_decodes_the_whole_clip(
    on_ranks: OnRanks, ranks: int, size: tuple[int, int], frames: int, batch: int
) -> None:
    vae, latents = random_vae(), draw_latents(3, frames, *size, batch=batch)
    wanted = decode(vae, latents)
    assert_all_have(on_ranks(ranks, lambda: decode(vae, latents, ranks)), wanted)
    assert wanted[-1].std() > 0.01


def test_decoder_of_whole_ops_is_split_too(on_ranks: OnRanks) -> None:
    vae, latents = random_vae(), draw_latents(2, 1, 24, 3)

    def decode_whole_ops() -> list[torch.Tensor]:
        with keep_fused_ops():
            return decode(vae, latents, 2)

    assert_all_have(on_ranks(2, decode_whole_ops), decode(vae, latents))


def test_tapes_and_programs_on_several_ranks_equal_the_module(on_ranks: OnRanks, tmp_path: Path) -> None:
    ranks, latents = 3, draw_latents(3, 1, 24, 4)
    vae = random_vae()
    networks = [lay_out(network) for network in tiny_networks(vae, ranks)]
    tapes = TapeSet(tmp_path)
    artefacts = {network.spec.name: tapes.add(network) for network in networks}
    tapes.finish()
    program = export_program(networks[0])

    def play() -> list[torch.Tensor]:
        weights = DeviceWeights(tmp_path, torch.device("cpu"))
        io_tensors = IOTensors([network.spec for network in networks], torch.device("cpu"))
        engines = [CudaEngine(weights, n.spec, tmp_path / artefacts[n.spec.name]) for n in networks]
        clip = []
        for engine in engines:
            engine.bind(io_tensors)
        for index, latent in enumerate(latents):
            io_tensors["latent"].copy_(latent)
            engines[min(index, 1)].enqueue()
            clip.append(io_tensors["pixels" if index else "pixels_first"].clone())
        return clip

    wanted = decode(vae, latents)
    assert_all_have(on_ranks(ranks, play), wanted)
    assert_all_have(on_ranks(ranks, lambda: [program.module()(latents[0])[0]]), wanted[:1])


# --- shapes ---------------------------------------------------------------------------------------------------------


def tiny_networks(vae: WanVAE, ranks: int) -> list[Network]:
    geometry = Geometry(chunk_frames=1, pixel_height=192, pixel_width=32, window_frames=4)
    return decoder_networks(vae, geometry, precision="float32", ranks=ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_networks_of_a_rank_give_what_their_specifications_say(ranks: int) -> None:
    for network in tiny_networks(random_vae(), ranks):
        inputs = [torch.zeros(io.shape) for io in network.spec.inputs]
        with rehearse(ranks):
            outputs = network.module(*inputs)
        assert [tuple(output.shape) for output in outputs] == [io.shape for io in network.spec.outputs]


def test_network_of_one_rank_has_no_ops_of_rows() -> None:
    vae = random_vae()
    network = tiny_networks(vae, 1)[1]
    inputs = tuple(torch.zeros(io.shape) for io in network.spec.inputs)
    split, unsplit = (
        [(node.name, str(node.target)) for node in torch.export.export(module, inputs, strict=False).graph.nodes]
        for module in (network.module, VAEDecoder(vae))
    )
    assert split == unsplit


def test_cut_rows_stay_channels_last() -> None:
    x = torch.randn(2, 8, 3, 10, 5).contiguous(memory_format=torch.channels_last_3d)
    with rehearse(2):
        cut = row_ops.window_rows(x, [2, 5], 4)
    assert torch.equal(cut, x[:, :, :, 2:6])
    assert cut.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(("op", "arguments"), [("window_rows", ([1, 3], 4)), ("gather_rows", ([0, 5],))])
def test_ops_trace_with_shapes_alone(op: str, arguments: tuple[object, ...]) -> None:
    with rehearse(2):
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            getattr(torch.ops.causal_forcing, op).default, (torch.randn(1, 2, 3, 7, 5), *arguments), test_utils=tests
        )


# --- arithmetic -----------------------------------------------------------------------------------------------------


def neighbours(rows: set[int]) -> set[int]:
    return {row + step for row in rows for step in (-1, 0, 1)}


@pytest.mark.parametrize("convs", [[7], [6, 6, 6, 7], [4, 4, 4, 5], [2, 0, 1], [0, 0]], ids=str)
def test_halos_are_what_convolutions_reach(convs: list[int]) -> None:
    first = 1000
    rows = set(range(first << len(convs) - 1, (first + 1) << len(convs) - 1))  # what one row of the first stage becomes
    found = []
    for stage in reversed(range(len(convs))):
        after = (first << stage) - min(rows)
        for _ in range(convs[stage]):
            rows = neighbours(rows)
        found.append(((first << stage) - min(rows), after))
        assert max(rows) - ((first + 1) << stage) + 1 == found[-1][0], "halos are as high above as below"
        rows = {row // 2 for row in neighbours(rows)}
    assert stage_halos(convs) == found[::-1]


def right_rows(convs: Sequence[int], height: int, ranks: int, rank: int) -> set[int]:
    """Follow which rows a rank has right, convolution by convolution; returns the last ones."""
    split = split_rows(convs, height, ranks)
    rows = set(range(height))
    for stage, (entry, left) in enumerate(zip(split.entries, split.exits, strict=True)):
        window = range(entry.starts[rank], entry.starts[rank] + entry.height)
        kept = range(left.starts[rank], left.starts[rank] + left.height)
        assert 0 <= window.start <= kept.start < kept.stop <= window.stop <= height
        rows &= set(window)
        spoiling = convs[stage] + (stage > 0)
        for _ in range(spoiling):
            outside = {-1, height}  # there, zeros are right
            rows = {row for row in rows if neighbours({row}) <= rows | outside}
        rows &= set(kept)
        if stage < len(convs) - 1:
            rows, height = {2 * row + half for row in rows for half in (0, 1)}, 2 * height
    return rows


@pytest.mark.parametrize("convs", [[6, 6, 6, 7], [2, 0, 1]], ids=str)
@pytest.mark.parametrize("height", [1, 6, 10, 45, 60])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_own_rows_are_right_and_make_the_whole(convs: list[int], height: int, ranks: int) -> None:
    own = split_rows(convs, height, ranks).exits[-1]
    parts = [set(range(start, start + own.height)) for start in own.starts]
    for rank, part in enumerate(parts):
        assert right_rows(convs, height, ranks, rank) >= part
    assert set().union(*parts) == set(range(height << len(convs) - 1))


def test_windows_at_full_size_shrink_towards_the_own_rows() -> None:
    split = decoder_row_split(WAN21_T2V_1_3B.vae, 60, 2)
    assert [(entry.height, left.height) for entry, left in zip(split.entries, split.exits, strict=True)] == [
        *((43, 37), (74, 66), (132, 124), (248, 240))
    ]
