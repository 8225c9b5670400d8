"""The tiny decoder against the public repository's own outputs, and through both backends that run here."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from causal_forcing.build_engines.builder import BuildJob, build, cut_networks, network_names
from causal_forcing.build_engines.cuda.tracing import write_tape
from causal_forcing.build_engines.cuda.weight_file import WeightFile
from causal_forcing.build_engines.model_loading import HollowModels, RandomModels, ReleasedModels
from causal_forcing.build_engines.models.taehv import TAEHV, TAEHVDecoder, TAEHVDecoderFirst, memory_shapes
from causal_forcing.build_engines.models.vae import LatentScale
from causal_forcing.build_engines.planner import make_job
from causal_forcing.build_engines.vae_networks import taehv_networks
from causal_forcing.build_engines.verification import verify
from causal_forcing.build_engines.weights import WeightFiles
from causal_forcing.runtime.engine import IOTensors
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.engines.cuda_engine import CudaEngine, DeviceWeights
from causal_forcing.runtime.loading import load_engines
from causal_forcing.runtime.model_spec import TINY, WAN21_T2V_1_3B, TAEHVSpec
from causal_forcing.runtime.resolution import resolve_engine
from causal_forcing.runtime.session import VideoSession
from causal_forcing.runtime.variant import VARIANTS

Run = Callable[..., subprocess.CompletedProcess[str]]
SIZE = ("--pixel-height", "32", "--pixel-width", "48")

DATA = Path(__file__).parents[1] / "data" / "taehv"
# Upstream's own ways of decoding, whole, frame by frame and streaming, differ by 1.2e-6 on [0, 1]; ours has [−1, 1].
TOLERANCE = 5e-6
CHUNKINGS = [[1, 1, 1, 1, 1], [3, 2], [2, 1, 2], [5]]
MADE: dict[str, Any] = json.loads((DATA / "taehv.json").read_text())
SPEC = TAEHVSpec(widths=tuple(MADE["widths"]))


@pytest.fixture(scope="module", autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def taehv() -> TAEHV:
    module = TAEHV(SPEC).eval()
    module.load_state_dict(load_file(DATA / "decoder.weights.safetensors"), strict=True)
    return module


@pytest.fixture(scope="module")
def case() -> dict[str, torch.Tensor]:
    return load_file(DATA / "decode.safetensors")


def decode(
    module: TAEHV, latent: torch.Tensor, chunks: list[int], scale: LatentScale | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    first, *rest = torch.split(latent, chunks, dim=1)
    pixels, *memories = TAEHVDecoderFirst(module, scale)(first)
    clip, decoder = [pixels], TAEHVDecoder(module, scale)
    for chunk in rest:
        pixels, *memories = decoder(chunk, *memories)
        clip.append(pixels)
    return torch.cat(clip, dim=1), memories


def as_frames(pixels: torch.Tensor) -> torch.Tensor:
    """What a session makes of a decoder's pixels: frames in [0, 1]."""
    return pixels.float().clamp(-1, 1).mul(0.5).add(0.5)


@pytest.mark.parametrize("chunks", CHUNKINGS, ids=str)
def test_decoder_in_any_chunks_equals_upstreams_whole_clip(
    taehv: TAEHV, case: dict[str, torch.Tensor], chunks: list[int]
) -> None:
    pixels, _ = decode(taehv, case["latents"], chunks)
    assert pixels.shape == (1, 17, 3, 16, 24)
    torch.testing.assert_close(as_frames(pixels), case["decoded"], atol=TOLERANCE, rtol=0)


def test_decoder_first_chunk_has_one_frame_for_its_first_latent(taehv: TAEHV, case: dict[str, torch.Tensor]) -> None:
    for frames in (1, 3):
        pixels = TAEHVDecoderFirst(taehv, None)(case["latents"][:, :frames])[0]
        assert pixels.shape[1] == 1 + 4 * (frames - 1)
    memories = [torch.zeros(shape) for shape in memory_shapes(SPEC, 1, 2, 3)]
    assert TAEHVDecoder(taehv, None)(case["latents"][:, :2], *memories)[0].shape[1] == 8


def test_decoder_in_bf16_is_upstreams_to_the_eyes_limit(taehv: TAEHV, case: dict[str, torch.Tensor]) -> None:
    half = TAEHV(SPEC).eval()
    half.load_state_dict(taehv.state_dict())
    pixels, _ = decode(half.bfloat16(), case["latents"].bfloat16(), [3, 2])
    assert pixels.dtype == torch.bfloat16
    error = (as_frames(pixels) - case["decoded"]).abs()
    assert error.mean() < 1 / 255
    assert error.max() < 12 / 255


def test_decoder_memories_are_one_frame_a_block_and_own_their_storage(taehv: TAEHV) -> None:
    latent = torch.randn(2, 3, 16, 4, 6)
    _, memories = decode(taehv, latent, [2, 1])
    assert tuple(tuple(memory.shape) for memory in memories) == memory_shapes(SPEC, 2, 4, 6)
    assert [memory.shape[1:] for memory in memories[::3]] == [(16, 4, 6), (8, 8, 12), (8, 16, 24)]
    for memory in memories:
        assert memory.untyped_storage().nbytes() == memory.nbytes


def test_decoder_of_a_batch_decodes_every_clip_alone(taehv: TAEHV) -> None:
    latent = torch.randn(3, 4, 16, 2, 3, generator=torch.Generator().manual_seed(0))
    together, _ = decode(taehv, latent, [2, 2])
    for index in range(3):
        alone, _ = decode(taehv, latent[index : index + 1], [2, 2])
        torch.testing.assert_close(together[index : index + 1], alone, atol=TOLERANCE, rtol=0)


def test_decoder_of_lighttae_takes_the_latents_that_the_wan_vae_decodes(
    taehv: TAEHV, case: dict[str, torch.Tensor]
) -> None:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (TINY.vae.latent_mean, TINY.vae.latent_std))
    scale = LatentScale(TINY.vae, next(taehv.parameters()))
    pixels, _ = decode(taehv, (case["latents"] - mean) / std, [3, 2], scale)
    torch.testing.assert_close(as_frames(pixels), case["decoded"], atol=10 * TOLERANCE, rtol=0)


def test_released_files_fit_the_full_width_decoder_by_name_and_shape() -> None:
    assert WAN21_T2V_1_3B.taehv is not None
    with torch.device("meta"):
        own = {name: list(tensor.shape) for name, tensor in TAEHV(WAN21_T2V_1_3B.taehv).state_dict().items()}
    released = {name: shape for name, shape in MADE["full_width_tensors"].items() if name.startswith("decoder.")}
    assert own == released
    assert len(own) == 64


@pytest.mark.parametrize("name", ["taew2_1.pth", "lighttaew2_1.safetensors"])
def test_released_file_in_fp16_with_its_encoder_loads_in_the_wanted_dtype(
    tmp_path: Path, taehv: TAEHV, name: str
) -> None:
    state = {key: tensor.half() for key, tensor in taehv.state_dict().items()}
    whole = state | {"encoder.0.weight": torch.zeros(64, 3, 3, 3, dtype=torch.float16)}
    (torch.save if name.endswith(".pth") else save_file)(whole, tmp_path / name)
    files = WeightFiles(dit=tmp_path, text_encoder=tmp_path, tokenizer=tmp_path, taehv=tmp_path / name)
    loaded = ReleasedModels(variant=VARIANTS["tiny"], files=files, dtype=torch.bfloat16).taehv().state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], tensor.bfloat16()) for key, tensor in state.items())


@pytest.mark.parametrize("slug", ["tiny", "tiny-i2v"])
@pytest.mark.parametrize("decoder", ["taehv", "lighttae"])
def test_networks_of_a_tiny_decoder_have_the_wan_decoders_names_and_pixels(slug: str, decoder: str) -> None:
    def cut(decoder: str) -> dict[str, Any]:
        options = EngineOptions(slug=slug, backend="torch", precision="fp32", decoder=decoder)
        config = resolve_engine(options, weights="random:0", device="cpu")
        job = BuildJob(config=config, source=HollowModels(model=TINY, dtype=torch.float32), parts=("vae",))
        return {network.spec.name: network.spec for network in cut_networks(job)}

    ours, wan = cut(decoder), cut("wan")
    assert list(ours) == list(wan) == network_names(VARIANTS[slug], ("vae",))
    for name, spec in ours.items():
        assert (spec.inputs[0], spec.outputs[0]) == (wan[name].inputs[0], wan[name].outputs[0])
        if "encoder" in name:
            assert spec == wan[name], "images are encoded by the Wan VAE"
    memories = ours["vae_decoder"].inputs[1:]
    assert len(memories) == 9
    assert ours["vae_decoder_first"].outputs[1:] == memories
    assert ours["vae_decoder"].states == tuple((f"{io.name}_out", io.name) for io in memories)


@pytest.mark.parametrize(
    ("slug", "backend", "precision", "decoder"),
    [
        ("tiny", "onnxruntime", "fp32", "taehv"),
        ("tiny-i2v", "onnxruntime", "fp32", "lighttae"),
        ("tiny", "torch", "bf16", "lighttae"),
        ("tiny-i2v", "torch", "bf16", "taehv"),
    ],
)
def test_engines_of_a_tiny_decoder_equal_their_modules(
    slug: str, backend: str, precision: str, decoder: str, tmp_path: Path
) -> None:
    options = EngineOptions(
        slug=slug, backend=backend, precision=precision, decoder=decoder, pixel_height=32, pixel_width=48
    )
    whole = make_job(options, device="cpu")
    job = BuildJob(config=whole.config, source=whole.source, parts=("vae",))
    build(job, tmp_path / "engine")
    comparisons = list(verify(job, tmp_path / "engine", device="cpu"))
    assert {comparison.network for comparison in comparisons} == set(network_names(VARIANTS[slug], ("vae",)))
    assert all(comparison.passed for comparison in comparisons), comparisons


def test_tapes_of_a_tiny_decoder_played_equal_their_modules(tmp_path: Path) -> None:
    geometry = EngineOptions(slug="tiny", pixel_height=32, pixel_width=48).geometry()
    module = RandomModels(model=TINY, seed=0, dtype=torch.float32).taehv()
    networks = taehv_networks(module, geometry, precision="float32")
    weights = WeightFile("vae_decoder.safetensors")
    for network in networks:
        write_tape(network, weights).write(tmp_path / f"{network.spec.name}.json")
    weights.write(tmp_path)
    io_tensors = IOTensors([network.spec for network in networks], torch.device("cpu"))
    on_cpu = DeviceWeights(tmp_path, torch.device("cpu"))
    latent = torch.randn(1, 6, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    clip = []
    for network, chunk, output in zip(networks, torch.split(latent, 3, dim=1), ("pixels_first", "pixels"), strict=True):
        engine = CudaEngine(on_cpu, network.spec, tmp_path / f"{network.spec.name}.json")
        engine.bind(io_tensors)
        io_tensors["latent"].copy_(chunk)
        engine.enqueue()
        clip.append(io_tensors[output].clone())
    torch.testing.assert_close(torch.cat(clip, dim=1), decode(module, latent, [3, 3])[0], atol=1e-5, rtol=0)


def test_clip_with_a_tiny_decoder_has_the_latents_of_any_and_pixels_of_its_own(
    run: Run, tiny_engine: Path, tmp_path: Path
) -> None:
    ask = ("--prompt", "a fox", "--seed", "7", "--total-blocks", "2", "--output", "a.mp4", "--json")
    made = run("cf-generate", "tiny", *SIZE, "--decoder", "taehv", *ask, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    record = json.loads(made.stdout)
    assert record["engine_config"]["decoder"] == "taehv"
    assert (record["status"], record["frames"]) == ("complete", 21)
    assert record["engine"] != str(tiny_engine)
    again = run("cf-generate", "--from-record", "a.json", "--output", "b.mp4", cwd=tmp_path)
    assert "repeated bit for bit: 21 frames" in again.stderr, again.stderr

    clips = {}
    for folder in (tiny_engine, Path(record["engine"])):
        with VideoSession(load_engines(folder, device="cpu")) as session:
            clips[folder] = list(session.generate("a fox", total_blocks=2, seed=7))
    wan, tiny = clips.values()
    for ours, theirs in zip(tiny, wan, strict=True):
        assert torch.equal(ours.latents, theirs.latents)
        assert ours.pixels.shape == theirs.pixels.shape
    module = RandomModels(model=TINY, seed=0, dtype=torch.float32).taehv()
    whole, _ = decode(module, torch.cat([chunk.latents for chunk in tiny], dim=1), [6])
    got = torch.cat([chunk.pixels for chunk in tiny], dim=1)
    torch.testing.assert_close(got, as_frames(whole), atol=1e-4, rtol=0)
