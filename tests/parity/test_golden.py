"""Parity with upstream's own code, on every golden case that is here, through torch and through ONNX Runtime."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "golden"
GOLDEN = SHARED if SHARED.is_dir() else ROOT / "tests" / "data" / "golden"
MANIFEST: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text())

REQUIRED = {
    "dit_call_sequence": ["call*.flow", "call*.x0", "latents"],
    "pipeline": ["latents", "pixels_fp16"],
    "text": ["prompt_embeds"],
    "vae": ["decoded_raw", "image_latent", "video_latent"],
    "scheduler": ["timesteps", "sigmas", "warped.*", "add_noise.out", "flow_to_x0.out"],
    "functions": ["rope.*.out.*", "sinusoid.*.f64"],
}
# Stored in fp16, so compared at its resolution.
FP16_TOLERANCE = 1e-3

CASES = [
    name
    for name, case in MANIFEST["cases"].items()
    if case["kind"] in REQUIRED and case["dtype"] != "bfloat16" and "inner" not in name and "demo" not in name
]
# What between them runs all networks: passes over a window with a sink, a clip from an image to pixels, and a prompt.
TAPED = ["dit_b_local6_sink1_chunkwise", "pipeline_framewise_i2v", "text_ids"]
# fp32 without TF32 on a GPU: sums of another order, other exp and tanh, through all passes of a clip.
GPU_TOLERANCE = 1e-4
WINDOWED = [name for name in CASES if MANIFEST["cases"][name].get("local_attn_size", -1) != -1]


def assert_reproduced(case: dict[str, Any], got: dict[str, torch.Tensor], least: float = 0.0) -> None:
    """Compare a case's outputs with what upstream's code gave, within the case's tolerance or the `least` one."""
    tensors = load_file(GOLDEN / case["file"])
    patterns = REQUIRED[case["kind"]] + (["input_ids", "attention_mask"] if "texts" in case else [])
    wanted = {key: t for key, t in tensors.items() if any(fnmatch.fnmatchcase(key, p) for p in patterns)}
    assert wanted
    for key, want in wanted.items():
        atol = max(case["tolerance"]["atol"], FP16_TOLERANCE if key.endswith("_fp16") else 0, least)
        rtol = max(case["tolerance"]["rtol"], least)
        excess = ((got[key].cpu().double() - want.double()).abs() - rtol * want.double().abs()).max()
        assert got[key].shape == want.shape, key
        assert excess <= atol, f"{key} is off by {excess:.1e} beyond its relative tolerance, allowed {atol:.0e}"


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
@pytest.mark.parametrize("name", CASES)
def test_golden_case_is_reproduced(name: str, engine: str, adapter: ModuleType) -> None:
    case = MANIFEST["cases"][name]
    assert_reproduced(case, adapter.run_case(name, case, MANIFEST["weights"], GOLDEN, engine))


@pytest.mark.parametrize("name", TAPED)
def test_golden_case_is_reproduced_by_tapes(name: str, adapter: ModuleType) -> None:
    case = MANIFEST["cases"][name]
    assert_reproduced(case, adapter.run_case(name, case, MANIFEST["weights"], GOLDEN, "cuda-on-cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", TAPED)
def test_golden_case_is_reproduced_on_a_gpu(name: str, adapter: ModuleType) -> None:
    """The `cuda` backend's kernels and captured graphs in fp32, which only a test asks them for."""
    case = MANIFEST["cases"][name]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        got = adapter.run_case(name, case, MANIFEST["weights"], GOLDEN, "cuda")
    assert_reproduced(case, got, GPU_TOLERANCE)


@pytest.mark.parametrize(
    "engine",
    [
        "cuda-on-cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
        ),
    ],
)
def test_golden_clip_is_reproduced_by_joint_passes(engine: str, adapter: ModuleType) -> None:
    """Context pass and next chunk's first pass in one, where the recorder of the cases above keeps them apart."""
    case = MANIFEST["cases"][TAPED[0]]
    chunks, passes = adapter.generate_clip(case, MANIFEST["weights"], GOLDEN, engine)
    latents = torch.cat([chunk.latents.cpu() for chunk in chunks], dim=1)
    least = GPU_TOLERANCE if engine == "cuda" else 0.0
    tolerance = {kind: max(bound, least) for kind, bound in case["tolerance"].items()}
    torch.testing.assert_close(latents, load_file(GOLDEN / case["file"])["latents"], **tolerance)
    joint = case["local_attn_size"] // case["num_frame_per_block"] - 1
    assert passes.count("dit_context_step") == joint > 0
    assert passes.count("dit_context") == len(chunks) - 1 - joint


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
@pytest.mark.parametrize("name", WINDOWED)
def test_golden_windowed_cache_holds_upstreams_frames(name: str, engine: str, adapter: ModuleType) -> None:
    """The ring holds the keys and values that upstream's shifted cache holds, in an order of its own."""
    case = MANIFEST["cases"][name]
    tensors = load_file(GOLDEN / case["file"])
    _, recorder = adapter.record_clip(case, MANIFEST["weights"], GOLDEN, engine)
    tokens = case["tokens_per_latent_frame"]
    sink, window, chunk = case["sink_size"], case["local_attn_size"], case["num_frame_per_block"]
    compared = 0
    for index, caches in enumerate(recorder.caches):
        end_frame = int(tensors[f"call{index:03}.current_start"]) // tokens + chunk
        # Upstream's order: the sink frames, then the latest ones by age.
        held = list(range(min(sink, end_frame)))
        held += range(max(len(held), end_frame - (window - len(held))), end_frame)
        ring = [frame if frame < sink else sink + (frame - sink) % (window - sink) for frame in held]
        for layer in range(MANIFEST["weights"][case["weights"]]["model_config"]["num_layers"]):
            for kind in ("k", "v"):
                want = tensors.get(f"call{index:03}.cache.layer{layer}.{kind}.valid")
                if want is None:
                    continue
                ours = caches[f"{kind}_cache_{layer:02}"].transpose(1, 2)
                frames = [ours[:, slot * tokens : (slot + 1) * tokens] for slot in ring]
                torch.testing.assert_close(torch.cat(frames, dim=1), want, **case["tolerance"])
                compared += 1
    assert compared > 0


def test_golden_tolerance_catches_a_wrong_epsilon(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parity tests can fail: the least of upstream's details, an epsilon, is seen."""
    name = WINDOWED[0]
    weights = json.loads(json.dumps(MANIFEST["weights"]))
    weights[MANIFEST["cases"][name]["weights"]]["model_config"]["eps"] = 1e-5
    case = MANIFEST["cases"][name]
    want = load_file(GOLDEN / case["file"])["latents"]
    got = adapter.run_case(name, case, weights, GOLDEN, "torch")["latents"]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(got, want, **case["tolerance"])
