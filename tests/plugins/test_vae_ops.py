"""The VAE's fused ops on a CPU: what is kept whole, and the arithmetic that the CUDA kernels rely on."""

from __future__ import annotations

import importlib.util
import random
import re
from collections import Counter
from collections.abc import Iterator
from importlib import resources

import pytest
import torch
import torch.nn.functional as F

from causal_forcing.build_engines.models.vae import VAEDecoder, VAEDecoderFirst, WanVAE
from causal_forcing.build_engines.models.vae_stages import decoder_cache_shapes
from causal_forcing.plugins.fused_op import keep_fused_ops
from causal_forcing.plugins.kernels import vae_launch
from causal_forcing.plugins.kernels.cuda_source import compile_source
from causal_forcing.plugins.kernels.vae_weights import (
    COLUMNS,
    HEAD_COLUMNS,
    column_channels,
    pack_conv_weight,
    pack_head_weight,
    pack_upsample_weight,
    quarter_kernels,
    temporal_kernels,
)
from causal_forcing.plugins.vae_ops import vae_double_rate, vae_norm_conv, vae_norm_conv_in_place
from causal_forcing.runtime.model_spec import VAESpec

SMALL = VAESpec(base_dim=8, num_res_blocks=1)
HEIGHT, WIDTH = 4, 6
CACHES = decoder_cache_shapes(SMALL, 1, HEIGHT, WIDTH)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def vae() -> WanVAE:
    return WanVAE(SMALL).eval()


def draw_latent(frames: int) -> torch.Tensor:
    return torch.randn(1, frames, SMALL.latent_channels, HEIGHT, WIDTH)


@pytest.mark.parametrize("frames", [1, 3])
def test_decoder_of_whole_ops_equals_decoder(vae: WanVAE, frames: int) -> None:
    first, later = draw_latent(frames), draw_latent(frames)
    pixels, *caches = VAEDecoderFirst(vae)(first)
    next_pixels, *next_caches = VAEDecoder(vae)(later, *caches)
    with keep_fused_ops():
        whole_pixels, *whole_caches = VAEDecoderFirst(vae)(first)
        for got, want in zip(whole_caches, caches, strict=True):
            torch.testing.assert_close(got, want)
        whole_next_pixels, *whole_next_caches = VAEDecoder(vae)(later, *whole_caches)
    torch.testing.assert_close(whole_pixels, pixels)
    torch.testing.assert_close(whole_next_pixels, next_pixels)
    for got, want in zip(whole_next_caches, next_caches, strict=True):
        torch.testing.assert_close(got, want)


def test_whole_ops_write_caches_in_place(vae: WanVAE) -> None:
    caches = [torch.randn(shape) for shape in CACHES]
    with keep_fused_ops():
        _, *following = VAEDecoder(vae)(draw_latent(1), *caches)
    copied = [index for index, pair in enumerate(zip(following, caches, strict=True)) if pair[0] is not pair[1]]
    assert copied == [0], "only the convolution of the latents is not a fused op"


def test_traced_decoder_keeps_ops_whole_only_where_asked(vae: WanVAE) -> None:
    inputs = (draw_latent(1), *(torch.randn(shape) for shape in CACHES))
    plain = torch.export.export(VAEDecoder(vae), inputs, strict=False)
    with keep_fused_ops():
        whole = torch.export.export(VAEDecoder(vae), inputs, strict=False)
    assert not count_fused_ops(plain)
    # Middle has 4 convolutions, each of 4 stages 2 blocks of 2; and the head. Two stages double the rate.
    assert count_fused_ops(whole) == {
        "vae_norm_conv_in_place": 4 + 16 + 1,
        "vae_double_rate_in_place": 2,
        "vae_upsample_conv": 3,
        "vae_frame_attention": 1,
        "vae_pointwise": 3,
    }


def count_fused_ops(program: torch.export.ExportedProgram) -> Counter[str]:
    targets = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return Counter(target.split(".")[1] for target in targets if target.startswith("causal_forcing."))


@pytest.mark.parametrize("frames", [1, 2])
def test_op_in_place_leaves_the_next_past(frames: int) -> None:
    x, past = torch.randn(2, 8, frames, 3, 5), torch.randn(2, 8, 2, 3, 5)
    gamma, weight, bias = torch.randn(8, 1, 1, 1), torch.randn(4, 8, 3, 3, 3), torch.randn(4)
    y, next_past = vae_norm_conv(x, past, gamma, weight, bias, None)
    assert torch.equal(vae_norm_conv_in_place(x, past, gamma, weight, bias, None), y)
    assert torch.equal(past, next_past)


def test_no_past_is_a_past_of_zeros() -> None:
    x, zeros = torch.randn(1, 8, 3, 3, 5), torch.zeros(1, 8, 2, 3, 5)
    conv = torch.randn(8, 1, 1, 1), torch.randn(4, 8, 3, 3, 3), torch.randn(4), torch.randn(1, 4, 3, 3, 5)
    for got, want in zip(vae_norm_conv(x, None, *conv), vae_norm_conv(x, zeros, *conv), strict=True):
        torch.testing.assert_close(got, want)
    time_conv = torch.randn(16, 8, 3, 1, 1), torch.randn(16)
    for got, want in zip(vae_double_rate(x, None, *time_conv), vae_double_rate(x, zeros, *time_conv), strict=True):
        torch.testing.assert_close(got, want)


def test_four_products_make_two_output_frames() -> None:
    d = torch.randn(1, 5, 4, 6, 7)
    weight = torch.randn(3, 5, 3, 3, 3)
    sources = (d[:, :, 1] + d[:, :, 2], d[:, :, 2] - d[:, :, 1], d[:, :, 0] - d[:, :, 2], d[:, :, 3] - d[:, :, 1])
    m1, m2, m0, m3 = (
        F.conv2d(source, kernel, padding=1) for source, kernel in zip(sources, temporal_kernels(weight), strict=True)
    )
    got = torch.stack((m0 + m1 + m2, m1 - m2 + m3), dim=2)
    torch.testing.assert_close(got, F.conv3d(d, weight, padding=(0, 1, 1)), atol=1e-4, rtol=1e-4)


def test_quarters_make_the_convolution_of_the_doubled_image() -> None:
    image, weight = torch.randn(1, 5, 6, 7), torch.randn(3, 5, 3, 3)
    want = F.conv2d(F.interpolate(image, scale_factor=2.0, mode="nearest"), weight, padding=1)
    padded, kernels = F.pad(image, (1, 1, 1, 1)), quarter_kernels(weight)
    for row in range(2):
        for column in range(2):
            window = padded[:, :, row : row + 7, column : column + 8]
            quarter = F.conv2d(window, kernels[row, column])
            torch.testing.assert_close(quarter, want[:, :, row::2, column::2], atol=1e-4, rtol=1e-4)


def test_columns_of_a_tile_are_its_channels_and_a_thread_has_runs_of_eight() -> None:
    channels = column_channels().tolist()
    assert sorted(channels) == list(range(COLUMNS))
    for q in range(4):
        held = [channels[8 * j + 2 * q + element] for j in range(COLUMNS // 8) for element in range(2)]
        runs = [held[start : start + 8] for start in range(0, len(held), 8)]
        assert all(run == list(range(run[0], run[0] + 8)) and run[0] % 8 == 0 for run in runs)


def test_packed_weights_lie_where_the_kernels_read_them() -> None:
    choose = random.Random(0).randrange
    conv, head, upsample = torch.randn(192, 96, 3, 3, 3), torch.randn(3, 96, 3, 3, 3), torch.randn(192, 96, 3, 3)
    packed_conv, packed_head = pack_conv_weight(conv), pack_head_weight(head)
    packed_upsample = pack_upsample_weight(upsample)
    conv_kernels, head_kernels = temporal_kernels(conv), temporal_kernels(head)
    quarters = quarter_kernels(upsample)
    columns = column_channels()
    assert all(packed.is_contiguous() for packed in (packed_conv, packed_head, packed_upsample))
    for _ in range(200):
        tile, step, plane, half, two = choose(2), choose(2), choose(2), choose(2), choose(2)
        dy, dx, chunk, column, channel = choose(3), choose(3), choose(6), choose(96), choose(8)
        output, taps = 96 * tile + int(columns[column]), (16 * chunk + 8 * half + channel, dy, dx)
        assert (
            packed_conv[tile, step, dy, chunk, plane, dx, half, column, channel]
            == (conv_kernels[(2 * step + plane, output, *taps)])
        )
        output = column % HEAD_COLUMNS
        want = head_kernels[(2 * step + plane, output, *taps)] if output < 3 else 0.0
        assert packed_head[0, step, dy, chunk, plane, dx, half, output, channel] == want
        output, chunk, dy, dx = 96 * tile + int(columns[column]), choose(3), choose(2), choose(2)
        assert (
            packed_upsample[tile, step, dy, chunk, half, plane, dx, two, column, channel]
            == (quarters[step, plane, output, 32 * chunk + 16 * half + 8 * two + channel, dy, dx])
        )


@pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="needs NVRTC, which comes with torch for CUDA")
def test_kernels_compile() -> None:
    assert compile_source("vae_conv.cu").startswith(b"\x7fELF")


def test_launches_ask_for_the_shared_memory_of_the_source() -> None:
    source = resources.files("causal_forcing.plugins.kernels").joinpath("vae_conv.cu").read_text(encoding="utf-8")
    for name, shared_bytes in vae_launch.STAGE_MEMORY.items():
        found = re.search(rf"using {name} = Shape<(\d+), (\d+), (\d+)>;", source)
        assert found, f"the source has a shape called {name}"
        columns, taps, stages = (int(group) for group in found.groups())
        assert shared_bytes == stages * (4 * 264 * 16 + taps * columns * 32)
        assert shared_bytes + 1024 <= 227 * 1024


@pytest.mark.parametrize(("height", "width"), [(60, 104), (480, 832), (1, 1), (16, 15), (7, 300)])
def test_plane_holds_all_that_its_tiles_read(height: int, width: int) -> None:
    pitch, rows = width + 1, vae_launch.ROWS
    last_tile = (height * pitch - 1) // rows * rows
    assert last_tile + 2 * pitch + rows + 2 <= vae_launch.plane_positions(height, width)
