from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.hooks import RemovableHandle

from causal_forcing.build_engines.models.vae import VAEDecoder, VAEDecoderFirst, VAEEncoder, VAEEncoderFirst, WanVAE
from causal_forcing.build_engines.models.vae_stages import decoder_cache_shapes, encoder_cache_shapes
from causal_forcing.runtime.model_spec import TINY, WAN21_T2V_1_3B, VAESpec

# The golden data's own tolerance: weights jittered by 1e-7 move its outputs by up to 4e-6.
TOLERANCE = 2e-5
SMALL = VAESpec(base_dim=8, num_res_blocks=1)
HEIGHT, WIDTH = 4, 6


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def golden_vae(golden: Path) -> WanVAE:
    vae = WanVAE(TINY.vae).eval()
    vae.load_state_dict(load_file(golden / "vae.weights.safetensors"), strict=True)
    return vae


def random_vae(spec: VAESpec = SMALL) -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(spec).eval()


def random_latent(frames: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, frames, SMALL.latent_channels, HEIGHT, WIDTH, generator=generator)


def decode(vae: WanVAE, latent: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    first, *rest = torch.split(latent, chunks, dim=1)
    pixels, *caches = VAEDecoderFirst(vae)(first)
    clip = [pixels]
    decoder = VAEDecoder(vae)
    for chunk in rest:
        pixels, *caches = decoder(chunk, *caches)
        clip.append(pixels)
    return torch.cat(clip, dim=1)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm())


def shapes_of(tensors: list[torch.Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors)


@pytest.mark.parametrize("chunks", [[1, 1, 1, 1, 1], [3, 2], [5]], ids=str)
def test_decoder_in_any_chunks_equals_upstream(golden: Path, golden_vae: WanVAE, chunks: list[int]) -> None:
    case = load_file(golden / "vae_decode.safetensors")
    pixels = decode(golden_vae, case["latents"], chunks)
    torch.testing.assert_close(pixels, case["decoded_raw"], atol=TOLERANCE, rtol=TOLERANCE)


def test_decoder_layers_equal_upstream(golden: Path, golden_vae: WanVAE) -> None:
    expected = load_file(golden / "vae_decode_inner.safetensors")
    seen: dict[str, torch.Tensor] = {}
    names = {name.split(".", 1)[1] for name in expected}

    def record(name: str) -> RemovableHandle:
        return golden_vae.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output: seen.update({name: output})
        )

    hooks = [record(name) for name in names]
    VAEDecoderFirst(golden_vae)(load_file(golden / "vae_decode.safetensors")["latents"][:, :2])
    for hook in hooks:
        hook.remove()

    # We run both latent frames in one call, upstream one after the other.
    for name in names:
        in_two_calls = torch.cat([expected[f"latent_frame{frame}.{name}"] for frame in (0, 1)], dim=2)
        torch.testing.assert_close(seen[name], in_two_calls, atol=TOLERANCE, rtol=TOLERANCE)


def test_encoder_of_image_equals_upstream(golden: Path, golden_vae: WanVAE) -> None:
    case = load_file(golden / "vae_encode.safetensors")
    latent, *_ = VAEEncoderFirst(golden_vae)(case["image"])
    torch.testing.assert_close(latent, case["image_latent"], atol=TOLERANCE, rtol=TOLERANCE)


def test_encoder_of_video_equals_upstream(golden: Path, golden_vae: WanVAE) -> None:
    case = load_file(golden / "vae_encode.safetensors")
    first, *caches = VAEEncoderFirst(golden_vae)(case["video"][:, :, :1])
    second, *_ = VAEEncoder(golden_vae)(case["video"][:, :, 1:], *caches)
    latents = torch.cat((first, second), dim=1)
    torch.testing.assert_close(latents, case["video_latent"], atol=TOLERANCE, rtol=TOLERANCE)


def test_cache_shapes_at_full_size_are_as_many_as_upstream_slots() -> None:
    decoder = decoder_cache_shapes(WAN21_T2V_1_3B.vae, 1, 60, 104)
    encoder = encoder_cache_shapes(WAN21_T2V_1_3B.vae, 1, 60, 104)
    assert (len(decoder), len(encoder)) == (32, 24)
    assert (decoder[0], decoder[-1]) == ((1, 16, 2, 60, 104), (1, 96, 2, 480, 832))
    assert (encoder[0], encoder[-1]) == ((1, 3, 2, 480, 832), (1, 384, 2, 60, 104))


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize(
    "spec", [SMALL, VAESpec(base_dim=4, temporal_downsample=(True, False, True))], ids=["wan", "other"]
)
def test_decoder_caches_have_stated_shapes(spec: VAESpec, frames: int) -> None:
    vae = random_vae(spec)
    stated = decoder_cache_shapes(spec, 2, HEIGHT, WIDTH)
    _, *caches = VAEDecoderFirst(vae)(random_latent(frames, batch=2))
    assert shapes_of(caches) == stated
    _, *caches = VAEDecoder(vae)(random_latent(frames, batch=2), *caches)
    assert shapes_of(caches) == stated


def test_encoder_caches_have_stated_shapes() -> None:
    vae = random_vae()
    stated = encoder_cache_shapes(SMALL, 2, HEIGHT, WIDTH)
    latent, *caches = VAEEncoderFirst(vae)(torch.zeros(2, 3, 1, 8 * HEIGHT, 8 * WIDTH))
    assert shapes_of(caches) == stated
    assert latent.shape == (2, 1, 16, HEIGHT, WIDTH)
    latent, *caches = VAEEncoder(vae)(torch.zeros(2, 3, 4, 8 * HEIGHT, 8 * WIDTH), *caches)
    assert shapes_of(caches) == stated
    assert latent.shape == (2, 1, 16, HEIGHT, WIDTH)


@pytest.mark.parametrize("chunks", [[1, 1, 1, 1], [2, 2], [1, 3], [3, 1]], ids=str)
def test_decoder_pixels_do_not_depend_on_chunks(chunks: list[int]) -> None:
    vae, latent = random_vae(), random_latent(4, batch=2)
    whole = decode(vae, latent, [4])
    assert whole.shape == (2, 13, 3, 8 * HEIGHT, 8 * WIDTH)
    torch.testing.assert_close(decode(vae, latent, chunks), whole, atol=1e-5, rtol=1e-5)


def test_decoder_caches_are_no_views_of_larger_tensors() -> None:
    _, *caches = VAEDecoderFirst(random_vae())(random_latent(3))
    assert all(cache.untyped_storage().nbytes() == cache.nbytes for cache in caches)


def test_decoder_given_too_few_caches_fails_with_counts() -> None:
    vae = random_vae()
    _, *caches = VAEDecoderFirst(vae)(random_latent(1))
    with pytest.raises(AssertionError, match=str(len(caches) - 1)):
        VAEDecoder(vae)(random_latent(1), *caches[:-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_networks_in_half_precision_stay_near_fp32(dtype: torch.dtype) -> None:
    vae, latent = random_vae(), random_latent(3)
    image = torch.rand(1, 3, 1, 8 * HEIGHT, 8 * WIDTH) * 2 - 1
    pixels, encoded = decode(vae, latent, [2, 1]), VAEEncoderFirst(vae)(image)[0]
    vae = vae.to(dtype)
    half_pixels, half_encoded = decode(vae, latent.to(dtype), [2, 1]), VAEEncoderFirst(vae)(image.to(dtype))[0]
    assert half_pixels.dtype == half_encoded.dtype == dtype
    assert relative_error(half_pixels, pixels) < 3e-2
    assert relative_error(half_encoded, encoded) < 3e-2


def test_channel_norm_of_zero_vector_in_fp16_is_zero() -> None:
    vae = random_vae().half()
    norm = vae.get_submodule("decoder.head.0")
    zeros = torch.zeros(1, SMALL.base_dim, 1, 2, 2, dtype=torch.float16)
    assert torch.equal(norm(zeros), zeros)


def test_networks_hold_only_their_half_of_the_parameters() -> None:
    vae = random_vae()
    decoder = {name.split(".")[0] for name in VAEDecoder(vae).state_dict()}
    encoder = {name.split(".")[0] for name in VAEEncoder(vae).state_dict()}
    assert decoder == {"conv2", "decoder"}
    assert encoder == {"conv1", "encoder"}


@pytest.mark.parametrize("network", ["decoder_first", "decoder", "encoder_first", "encoder"])
def test_exported_network_in_onnxruntime_equals_torch(network: str, tmp_path: Path) -> None:
    vae = random_vae()
    video = torch.rand(1, 3, 5, 8 * HEIGHT, 8 * WIDTH) * 2 - 1
    module: torch.nn.Module
    inputs: tuple[torch.Tensor, ...]
    if network.startswith("decoder"):
        module, inputs = VAEDecoderFirst(vae), (random_latent(3),)
        if network == "decoder":
            module, inputs = VAEDecoder(vae), (random_latent(2), *module(*inputs)[1:])
    else:
        module, inputs = VAEEncoderFirst(vae), (video[:, :, :1],)
        if network == "encoder":
            module, inputs = VAEEncoder(vae), (video[:, :, 1:], *module(*inputs)[1:])
    expected = module(*inputs)

    program = torch.export.export(module, inputs)
    exported = torch.onnx.export(program, dynamo=True, opset_version=24, verbose=False)
    assert exported is not None
    path = tmp_path / f"{network}.onnx"
    exported.save(path)

    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_inputs()]
    got = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    assert len(got) == len(expected)
    for ours, theirs in zip(expected, got, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=TOLERANCE, rtol=0)
