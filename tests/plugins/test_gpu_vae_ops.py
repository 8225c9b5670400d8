"""The VAE's kernels on a Hopper GPU against their ops' bodies in fp32, and the decoder made of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from causal_forcing.build_engines.models.vae import VAEDecoder, VAEDecoderFirst, WanVAE
from causal_forcing.build_engines.models.vae_stages import decoder_cache_shapes
from causal_forcing.plugins import vae_ops
from causal_forcing.plugins.fused_op import keep_fused_ops
from causal_forcing.runtime.model_spec import WAN21_T2V_1_3B

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]

TOLERANCE = 5e-3
"""‖got - want‖ / ‖want‖ over fp32 of the same inputs; bf16 rounds by about 1e-3 to 3e-3."""


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    torch.manual_seed(0)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad(), torch.device("cuda"):
        yield
    torch.backends.cudnn.allow_tf32 = tf32


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return float((got.float() - want.float()).norm() / want.float().norm())


def draw(*shape: int) -> torch.Tensor:
    x = torch.randn(shape).bfloat16()
    return x.contiguous(memory_format=torch.channels_last_3d) if len(shape) == 5 else x


def widened(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.float() for tensor in tensors]


def draw_conv(channels: int, outputs: int, frames: int, height: int, width: int) -> list[torch.Tensor]:
    """Return x, past, gamma, weight, bias, residual."""
    weight = (torch.randn(outputs, channels, 3, 3, 3) / (27 * channels) ** 0.5).bfloat16()
    x, past = draw(1, channels, frames, height, width), draw(1, channels, 2, height, width)
    return [x, past, draw(channels, 1, 1, 1), weight, draw(outputs), draw(1, outputs, frames, height, width)]


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 9])
@pytest.mark.parametrize(
    ("channels", "outputs", "height", "width"), [(96, 96, 17, 30), (192, 384, 5, 41), (384, 384, 60, 104)]
)
def test_norm_conv_equals_its_body(channels: int, outputs: int, frames: int, height: int, width: int) -> None:
    x, past, gamma, weight, bias, residual = draw_conv(channels, outputs, frames, height, width)
    for own_past, own_residual in ((past, residual), (None, None)):
        arguments = (x, own_past, gamma, weight, bias, own_residual)
        want = vae_ops.vae_norm_conv(*widened(*arguments))  # type: ignore[arg-type]
        with keep_fused_ops():
            got = vae_ops.vae_norm_conv(*arguments)
        assert error(got[0], want[0]) < TOLERANCE
        assert error(got[1], want[1]) < TOLERANCE
        assert got[0].is_contiguous(memory_format=torch.channels_last_3d)
    with keep_fused_ops():
        want = vae_ops.vae_norm_conv(x, past, gamma, weight, bias, residual)
        y = vae_ops.vae_norm_conv_in_place(x, past, gamma, weight, bias, residual)
    assert torch.equal(y, want[0])
    assert torch.equal(past, want[1])


def test_norm_conv_takes_any_memory_and_batch() -> None:
    x, past, gamma, weight, bias, residual = draw_conv(96, 96, 3, 9, 14)
    x, past, residual = (torch.cat((tensor, -tensor)).contiguous() for tensor in (x, past, residual))
    want = vae_ops.vae_norm_conv(*widened(x, past, gamma, weight, bias, residual))  # type: ignore[arg-type]
    with keep_fused_ops():
        y = vae_ops.vae_norm_conv_in_place(x, past, gamma, weight, bias, residual)
    assert error(y, want[0]) < TOLERANCE
    assert error(past, want[1]) < TOLERANCE


def test_norm_conv_of_other_sizes_and_types_runs_its_body() -> None:
    for channels, dtype in ((40, torch.bfloat16), (96, torch.float32)):
        arguments = [tensor.to(dtype) for tensor in draw_conv(channels, channels, 2, 5, 6)]
        with keep_fused_ops():
            got, _ = vae_ops.vae_norm_conv(*arguments)
        assert torch.equal(got, vae_ops.vae_norm_conv(*arguments)[0])


def test_norm_conv_to_pixels_equals_its_body() -> None:
    for frames in (1, 4):
        x, past, gamma, weight, bias, _ = draw_conv(96, 3, frames, 33, 50)
        want = vae_ops.vae_norm_conv(*widened(x, past, gamma, weight, bias, None))  # type: ignore[arg-type]
        with keep_fused_ops():
            got = vae_ops.vae_norm_conv(x, past, gamma, weight, bias, None)
        assert error(got[0], want[0]) < TOLERANCE
        assert error(got[1], want[1]) < TOLERANCE


@pytest.mark.parametrize(("count", "channels", "height", "width"), [(1, 192, 13, 21), (4, 384, 30, 52)])
def test_upsample_conv_equals_its_body(count: int, channels: int, height: int, width: int) -> None:
    frames, bias = draw(count, channels, height, width), draw(channels // 2)
    weight = (torch.randn(channels // 2, channels, 3, 3) / (9 * channels) ** 0.5).bfloat16()
    want = vae_ops.vae_upsample_conv(frames.float(), weight.float(), bias.float())
    with keep_fused_ops():
        got = vae_ops.vae_upsample_conv(frames, weight, bias)
    assert error(got, want) < TOLERANCE


def test_double_rate_equals_its_body() -> None:
    x, past, weight, bias = draw(1, 96, 3, 9, 11), draw(1, 96, 2, 9, 11), draw(192, 96, 3, 1, 1), draw(192)
    for own_past in (past, None):
        want = vae_ops.vae_double_rate(*widened(x, own_past, weight, bias))  # type: ignore[arg-type]
        with keep_fused_ops():
            got = vae_ops.vae_double_rate(x, own_past, weight, bias)
        assert error(got[0], want[0]) < TOLERANCE
        assert error(got[1], want[1]) == 0.0
    with keep_fused_ops():
        frames, next_past = vae_ops.vae_double_rate(x, past, weight, bias)
        assert torch.equal(vae_ops.vae_double_rate_in_place(x, past, weight, bias), frames)
    assert torch.equal(past, next_past)


def test_pointwise_and_attention_equal_their_bodies() -> None:
    qkv = draw(2, 1152, 13, 16)
    want = vae_ops.vae_frame_attention(qkv.float(), 384**-0.5)
    with keep_fused_ops():
        assert error(vae_ops.vae_frame_attention(qkv, 384**-0.5), want) < 2 * TOLERANCE
        for x in (draw(1, 96, 3, 5, 7), draw(2, 96, 5, 7)):
            weight, bias = draw(384, 96, *(1,) * (x.dim() - 2)), draw(384)
            got = vae_ops.vae_pointwise(x, weight, bias)
            assert error(got, vae_ops.vae_pointwise(x.float(), weight.float(), bias.float())) < TOLERANCE


@pytest.fixture(scope="module")
def full_width_vae() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(WAN21_T2V_1_3B.vae).eval().cuda()


@pytest.mark.parametrize("frames", [1, 3])
def test_decoder_in_bf16_is_as_near_to_fp32_as_the_plain_one(full_width_vae: WanVAE, frames: int) -> None:
    height, width = 12, 20
    vae = copy.deepcopy(full_width_vae).bfloat16()
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    latents = torch.randn(2, 1, frames, 16, height, width)
    caches = [torch.nn.functional.silu(torch.randn(s)) for s in decoder_cache_shapes(vae.spec, 1, height, width)]
    half_caches = [cache.bfloat16().contiguous(memory_format=torch.channels_last_3d) for cache in caches]
    first, later = (kind(full_width_vae) for kind in (VAEDecoderFirst, VAEDecoder))
    half_first, half_later = (kind(vae) for kind in (VAEDecoderFirst, VAEDecoder))
    half_latents = latents.bfloat16()
    with keep_fused_ops():
        fused = [half_first(half_latents[0])[0], half_later(half_latents[1], *(c.clone() for c in half_caches))[0]]
    plain = [half_first(half_latents[0])[0], half_later(half_latents[1], *half_caches)[0]]
    exact = [first(latents[0])[0], later(latents[1], *caches)[0]]
    for got, reference, want in zip(fused, plain, exact, strict=True):
        assert error(got, want) < 1.2 * error(reference, want)


def test_captured_decoder_repeats_itself(full_width_vae: WanVAE) -> None:
    vae = copy.deepcopy(full_width_vae).bfloat16()
    latent = torch.randn(1, 1, 16, 8, 12).bfloat16()
    start = [
        torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last_3d)
        for shape in decoder_cache_shapes(vae.spec, 1, 8, 12)
    ]
    caches = [cache.clone() for cache in start]
    decoder, stream = VAEDecoder(vae), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with keep_fused_ops(), torch.cuda.stream(stream):
        want = decoder(latent, *caches)[0].clone()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            got = decoder(latent, *caches)[0]
        for _ in range(2):
            for cache, value in zip(caches, start, strict=True):
                cache.copy_(value)
            got.fill_(torch.nan)
            graph.replay()
            stream.synchronize()
            assert torch.equal(got, want)
