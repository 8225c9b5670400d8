"""The DiT's parts, where a formula can be written down without upstream; its numbers as a whole are golden cases."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from causal_forcing.build_engines.model_loading import RandomModels
from causal_forcing.build_engines.models.dit import CausalDiT, DiTContext, DiTStep, PromptKV, TimestepModulation
from causal_forcing.build_engines.models.dit_layers import RMSNorm
from causal_forcing.runtime.model_spec import TINY, DiTSpec, ModelSpec
from causal_forcing.runtime.rope import RopePhases

SPEC = DiTSpec(dim=24, ffn_dim=40, num_heads=2, num_layers=2, freq_dim=8, text_dim=10, text_len=5, latent_channels=3)
FRAMES, ROWS, COLUMNS, WINDOW = 2, 2, 3, 5
TOKENS = ROWS * COLUMNS

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def dit() -> CausalDiT:
    model = ModelSpec(name="test", dit=SPEC, vae=TINY.vae, text=TINY.text)
    return RandomModels(model=model, seed=0, dtype=torch.float32).dit()


def inputs(start_frame: int = 1, seed: int = 0) -> Tensors:
    """Make a chunk's inputs; the caches hold other frames already."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    cos, sin = torch.zeros(FRAMES * TOKENS, 6), torch.zeros(FRAMES * TOKENS, 6)
    RopePhases(cos, sin, frames=FRAMES, rows=ROWS, columns=COLUMNS).place(start_frame)
    tensors = {
        "latent": randn(1, FRAMES, 3, 2 * ROWS, 2 * COLUMNS),
        "layer_modulation": randn(2, 6, 24),
        "head_modulation": randn(2, 24),
        "rope_cos": cos,
        "rope_sin": sin,
        "slots": torch.arange(start_frame, start_frame + FRAMES, dtype=torch.int32) * TOKENS,
        "valid_slots": torch.tensor([(start_frame + FRAMES) * TOKENS], dtype=torch.int32),
    }
    tensors |= {f"cross_{kind}_{layer}": randn(1, 2, 5, 12) for layer in range(2) for kind in "kv"}
    return tensors | {f"cache_{kind}_{layer}": randn(1, 2, WINDOW * TOKENS, 12) for layer in range(2) for kind in "kv"}


def step(dit: CausalDiT, tensors: Tensors) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        outputs: tuple[torch.Tensor, ...] = DiTStep(dit)(*(tensor.clone() for tensor in tensors.values()))
    return outputs


def context(dit: CausalDiT, tensors: Tensors) -> tuple[torch.Tensor, ...]:
    left_out = ("head_modulation", "cross_k_1", "cross_v_1")
    with torch.inference_mode():
        outputs: tuple[torch.Tensor, ...] = DiTContext(dit)(
            *(tensor.clone() for name, tensor in tensors.items() if name not in left_out)
        )
    return outputs


def test_context_pass_leaves_the_caches_that_a_denoising_pass_would(dit: CausalDiT) -> None:
    _, *caches = step(dit, inputs())
    for written, want in zip(context(dit, inputs()), caches, strict=True):
        assert torch.equal(written, want)


def test_passes_write_their_own_slots_and_no_others(dit: CausalDiT) -> None:
    tensors = inputs(start_frame=1)
    before = [tensor for name, tensor in tensors.items() if name.startswith("cache")]
    own = slice(TOKENS, 3 * TOKENS)
    for written, cache in zip(context(dit, tensors), before, strict=True):
        assert not torch.equal(written[:, :, own], cache[:, :, own])
        assert torch.equal(written[:, :, : own.start], cache[:, :, : own.start])
        assert torch.equal(written[:, :, own.stop :], cache[:, :, own.stop :])


@pytest.mark.parametrize(
    "name", ["latent", "layer_modulation", "head_modulation", "rope_cos", "cross_k_0", "cross_v_1", "cache_k_0"]
)
def test_flow_depends_on_every_input(name: str, dit: CausalDiT) -> None:
    tensors = inputs()
    flow, *_ = step(dit, tensors)
    # Not the same everywhere: softmax would not notice a shift of all keys.
    other = tensors[name] + torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))
    changed, *_ = step(dit, {**tensors, name: other})
    assert (changed - flow).abs().max() > 1e-4


def test_flow_does_not_depend_on_what_lies_beyond_the_valid_slots(dit: CausalDiT) -> None:
    tensors = inputs()
    other = {name: t.clone() for name, t in tensors.items()}
    for name in other:
        if name.startswith("cache"):
            other[name][:, :, 3 * TOKENS :] = 1e20
    torch.testing.assert_close(step(dit, other)[0], step(dit, tensors)[0], atol=1e-5, rtol=1e-5)


def test_flow_of_each_frame_sees_the_chunks_other_frame(dit: CausalDiT) -> None:
    """There is no mask inside a chunk."""
    tensors = inputs()
    changed = {**tensors, "latent": tensors["latent"].clone()}
    changed["latent"][:, 1] += 1
    difference = (step(dit, changed)[0] - step(dit, tensors)[0]).abs().amax(dim=(2, 3, 4))[0]
    assert (difference > 1e-4).all()


def test_flow_does_not_depend_on_the_order_of_slots(dit: CausalDiT) -> None:
    """Keys carry their position, so a ring may hold frames in any order."""
    tensors = inputs(start_frame=1)
    moved = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in tensors:
        if name.startswith("cache"):
            moved[name][:, :, 2 * TOKENS : 3 * TOKENS] = tensors[name][:, :, :TOKENS]
    moved["slots"] = torch.tensor([TOKENS, 0], dtype=torch.int32)
    torch.testing.assert_close(step(dit, moved)[0], step(dit, tensors)[0], atol=2e-6, rtol=1e-5)


def test_timestep_modulation_of_each_timestep_is_its_own_and_adds_the_tables(dit: CausalDiT) -> None:
    module = TimestepModulation(dit)
    embedding = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        layers, head = module(embedding)
        alone = module(embedding[1:2])
        e = dit.time_embedding(embedding)
        e0 = dit.time_projection(e).reshape(3, 6, 24)
    assert layers.shape == (3, 2, 6, 24)
    assert head.shape == (3, 2, 24)
    torch.testing.assert_close(layers[1:2], alone[0])
    torch.testing.assert_close(head[1:2], alone[1])
    for layer, block in enumerate(dit.layers):
        torch.testing.assert_close(layers[:, layer], block.modulation + e0)
    # The head takes the embedding from before the projection.
    torch.testing.assert_close(head, dit.head.modulation + e[:, None])


def test_prompt_kv_of_padding_is_not_zero_and_belongs_to_its_layer(dit: CausalDiT) -> None:
    with torch.inference_mode():
        outputs = PromptKV(dit)(torch.zeros(1, 5, 10))
        text = dit.text_embedding(torch.zeros(1, 5, 10))
        want = [tensor for layer in dit.layers for tensor in layer.cross_attn.keys_values(text)]
    assert len(outputs) == 4
    for output, tensor in zip(outputs, want, strict=True):
        assert output.shape == (1, 2, 5, 12)
        assert output.abs().max() > 1e-4, "padding rows of a prompt are attended to"
        assert torch.equal(output, tensor)


def test_rms_norm_spans_all_heads_and_counts_epsilon() -> None:
    norm = RMSNorm(4, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        small = norm(torch.tensor([1e-3, 0.0, 0.0, 0.0]))
        got = norm(torch.tensor([3.0, 4.0, 0.0, 0.0]))
    torch.testing.assert_close(got, torch.tensor([3 / 2.5, 2 * 4 / 2.5, 0.0, 0.0]))
    # Mean square 2.5e-7: an epsilon of 1e-6 weighs four times as much.
    assert small[0].item() == pytest.approx(1e-3 / (1.25e-6**0.5), rel=1e-5)


def test_rms_norm_of_bf16_keeps_statistics_in_fp32() -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = RMSNorm(2000, eps=1e-6).bfloat16()
    want = (x.float() / (x.float().square().mean() + 1e-6).sqrt()).bfloat16()
    with torch.no_grad():
        assert torch.equal(norm(x), want)


def test_head_takes_shift_before_scale_and_layers_take_shift_scale_gate_twice(dit: CausalDiT) -> None:
    x, modulation = torch.randn(1, TOKENS, 24, generator=torch.Generator().manual_seed(0)), inputs()["head_modulation"]
    normed = torch.nn.functional.layer_norm(x, (24,), eps=1e-6)
    with torch.no_grad():
        want = dit.head.head(normed * (1 + modulation[1]) + modulation[0])
        torch.testing.assert_close(dit.head(x, modulation), want)
        layer, table = dit.layers[0], inputs()["layer_modulation"][0]
        cross = (torch.zeros(1, 2, 5, 12), torch.zeros(1, 2, 5, 12))
        attention = torch.randn(1, 2, TOKENS, 12, generator=torch.Generator().manual_seed(1))
        merged = attention.transpose(1, 2).reshape(1, TOKENS, 24)
        after = x + table[2] * layer.self_attn.o(merged) + layer.cross_attn.o.bias
        normed = torch.nn.functional.layer_norm(after, (24,), eps=1e-6)
        want = after + table[5] * layer.ffn(normed * (1 + table[4]) + table[3])
        torch.testing.assert_close(layer.finish(x, attention, table, cross), want)


def test_embed_orders_tokens_by_frame_row_column(dit: CausalDiT) -> None:
    latent = torch.zeros(1, FRAMES, 3, 2 * ROWS, 2 * COLUMNS)
    with torch.no_grad():
        nothing = dit.embed(latent)
        latent[0, 1, 0, 2, 4] = 1.0
        changed = (dit.embed(latent) - nothing).abs().amax(dim=(0, 2)) > 0
    assert changed.nonzero().flatten().tolist() == [1 * TOKENS + 1 * COLUMNS + 2]


def test_unpatchify_reads_patch_row_patch_column_channel_with_channel_fastest(dit: CausalDiT) -> None:
    latent = torch.zeros(1, FRAMES, 3, 2 * ROWS, 2 * COLUMNS)
    patches = torch.arange(FRAMES * TOKENS * 12, dtype=torch.float32).reshape(1, FRAMES * TOKENS, 12)
    got = dit.unpatchify(patches, latent)
    for frame, channel, row, column in [(0, 0, 0, 0), (0, 2, 1, 0), (1, 1, 3, 4), (1, 2, 2, 5)]:
        token = frame * TOKENS + (row // 2) * COLUMNS + column // 2
        assert got[0, frame, channel, row, column] == patches[0, token, (row % 2) * 6 + (column % 2) * 3 + channel]


def test_parameters_have_upstreams_names(golden: object) -> None:
    weights = load_file(f"{golden}/dit_a.weights.safetensors")
    with torch.device("meta"):
        names = set(CausalDiT(SPEC).state_dict())
    layers = {name.split(".")[2] for name in weights if name.startswith("model.blocks.")}
    assert len(layers) >= 2
    kept = {n.removeprefix("model.") for n in weights if ".blocks." not in n or n.split(".")[2] in ("0", "1")}
    assert names == kept
