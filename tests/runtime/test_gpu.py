"""What only a CUDA GPU can show: the torch backend there gives what it gives on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from causal_forcing.plugins import reference
from causal_forcing.plugins.torch_op import kv_cache_attention_in_place
from causal_forcing.runtime.engine import Engine
from causal_forcing.runtime.loading import load_engines
from causal_forcing.runtime.session import VideoSession

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_op_on_gpu_equals_reference_on_cpu(dtype: torch.dtype, tolerance: float) -> None:
    """bf16: 8 bits of mantissa in probabilities and values, summed in fp32."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 2, 48, 32)] * 3 + [(1, 2, 160, 32)] * 2
    q, k, v, k_cache, v_cache = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    slots, valid = torch.tensor([32, 48, 16], dtype=torch.int32), torch.tensor([96], dtype=torch.int32)
    on_gpu = [tensor.cuda() for tensor in (q, k, v, k_cache, v_cache, slots, valid)]
    got = kv_cache_attention_in_place(*on_gpu, 32**-0.5)
    want = reference.kv_cache_attention(q, k, v, k_cache, v_cache, slots, valid, 32**-0.5)
    torch.testing.assert_close(got.cpu(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(on_gpu[3].cpu(), k_cache, atol=0, rtol=0)


@pytest.mark.parametrize("use", ["free", "keep"])
def test_text_encoder_leaves_the_gpu_once_a_prompt_is_encoded_unless_it_is_kept(
    use: str, tiny_torch_engine: Path
) -> None:
    engines = load_engines(tiny_torch_engine, device="cuda", text_encoder=use)
    assert engines.text_encoder is not None
    sizes: list[int] = []
    load = engines.text_encoder.load

    def measure(name: str) -> Engine:
        before = torch.cuda.memory_allocated()
        engine = load(name)
        sizes.append(torch.cuda.memory_allocated() - before)
        return engine

    engines.text_encoder.load = measure
    with VideoSession(engines) as session:
        before = torch.cuda.memory_allocated()
        session.generate("a red kite", total_blocks=1)
        left = torch.cuda.memory_allocated() - before
    assert sizes[0] > 2**18
    assert left < sizes[0] / 2 if use == "free" else left >= sizes[0] / 2


def test_clip_on_gpu_equals_clip_on_cpu(tiny_i2v_engine: Path) -> None:
    """fp32 without TF32: sums in another order, through a clip's passes."""
    latents = {}
    image = torch.zeros(1, 3, 1, 32, 48).numpy()
    for device in ("cpu", "cuda"):
        with VideoSession(load_engines(tiny_i2v_engine, device=device)) as session:
            chunks = session.generate("a red kite", total_blocks=6, seed=1, image=image)
            latents[device] = torch.cat([chunk.latents.cpu() for chunk in chunks], dim=1)
    torch.testing.assert_close(latents["cuda"], latents["cpu"], atol=1e-4, rtol=1e-4)
