"""Finding, planning and inventing weights. Nothing here touches the network."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from causal_forcing.build_engines import weights
from causal_forcing.build_engines.weights import (
    CAUSAL_FORCING_REPO,
    CAUSAL_FORCING_REVISION,
    WAN_REPO,
    WAN_REVISION,
    planned_downloads,
    random_state_dict,
    randomise,
    resolve_weights,
)
from causal_forcing.runtime.errors import WeightsMissingError
from causal_forcing.runtime.spec import find_variant

CHUNKWISE = find_variant("causal-forcing-wan2.1-t2v-1.3b-chunkwise")
TINY = find_variant("tiny")
DIT_FILE = "chunkwise/causal_forcing.pt"
WAN_FILES = ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google/umt5-xxl/tokenizer.json")


# Seed 1, `bias`, two elements: 0.02 × the first two sums of the Philox stream.
PINNED_BIAS = ["0x1.f5885a0000000p-9", "0x1.0d05aa0000000p-6"]


class Hub:
    """A hub that has what `error` allows, and a cache with what was downloaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: Exception | None = None
        self.asked: list[tuple[str, str, str]] = []

    def path(self, repo: str, revision: str, filename: str) -> Path:
        return self.folder / repo / revision / filename

    def add(self, repo: str, revision: str, filename: str) -> Path:
        path = self.path(repo, revision, filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
        return path

    def download(self, repo_id: str, filename: str, *, revision: str) -> str:
        self.asked.append((repo_id, revision, filename))
        if self.error is not None:
            raise self.error
        return str(self.add(repo_id, revision, filename))

    def cached(self, repo_id: str, filename: str, *, revision: str) -> str | None:
        path = self.path(repo_id, revision, filename)
        return str(path) if path.exists() else None


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", hub.cached)
    return hub


def folder_with(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"weights")
    return folder


# --- resolving ------------------------------------------------------------------------------------------------------


def test_resolve_weights_downloads_all_at_the_pinned_revisions(hub: Hub) -> None:
    files = resolve_weights(CHUNKWISE, checkpoint=None, wan_folder=None)
    assert hub.asked == [
        (CAUSAL_FORCING_REPO, CAUSAL_FORCING_REVISION, DIT_FILE),
        *((WAN_REPO, WAN_REVISION, name) for name in WAN_FILES),
    ]
    assert files.dit == hub.path(*hub.asked[0])
    assert files.text_encoder.name == WAN_FILES[0]
    assert files.vae.name == WAN_FILES[1]
    assert (files.tokenizer / "tokenizer.json").is_file()


def test_resolve_weights_cache_is_used_without_asking_the_hub(hub: Hub) -> None:
    resolve_weights(CHUNKWISE, checkpoint=None, wan_folder=None)
    hub.asked.clear()
    hub.error = AssertionError("asked the hub")
    resolve_weights(CHUNKWISE, checkpoint=None, wan_folder=None, allow_download=False)
    assert hub.asked == []


def test_resolve_weights_given_paths_win(hub: Hub, tmp_path: Path) -> None:
    resolve_weights(CHUNKWISE, checkpoint=None, wan_folder=None)
    hub.asked.clear()
    checkpoint = folder_with(tmp_path, "mine.pt") / "mine.pt"
    wan = folder_with(tmp_path / "wan", *WAN_FILES)
    files = resolve_weights(CHUNKWISE, checkpoint=checkpoint, wan_folder=wan)
    assert files.dit == checkpoint
    assert files.text_encoder == wan / WAN_FILES[0]
    assert files.vae == wan / WAN_FILES[1]
    assert files.tokenizer == wan / "google/umt5-xxl"
    assert hub.asked == []


def test_resolve_weights_checkpoint_folder_has_the_released_layout(tmp_path: Path) -> None:
    root = folder_with(tmp_path / "cf", DIT_FILE)
    assert resolve_weights(CHUNKWISE, checkpoint=root, wan_folder=None).dit == root / DIT_FILE


def test_resolve_weights_safetensors_siblings_are_taken(tmp_path: Path) -> None:
    root = folder_with(tmp_path / "cf", "chunkwise/causal_forcing.safetensors")
    wan = folder_with(
        tmp_path / "wan",
        "models_t5_umt5-xxl-enc-bf16.safetensors",
        "Wan2.1_VAE.safetensors",
        "google/umt5-xxl/tokenizer.json",
    )
    files = resolve_weights(CHUNKWISE, checkpoint=root, wan_folder=wan)
    assert {files.dit.suffix, files.text_encoder.suffix, files.vae.suffix} == {".safetensors"}


@pytest.mark.parametrize(
    "error",
    [LocalEntryNotFoundError("offline\nmode"), ConnectionError("no route to host"), RuntimeError("transfer broke")],
)
def test_resolve_weights_unreachable_hub_says_how_to_get_each_file(hub: Hub, error: Exception) -> None:
    hub.error = error
    with pytest.raises(WeightsMissingError) as caught:
        resolve_weights(CHUNKWISE, checkpoint=None, wan_folder=None)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 3
    assert type(error).__name__ in message
    assert f"{DIT_FILE} of {CAUSAL_FORCING_REPO}@{CAUSAL_FORCING_REVISION}" in message
    assert f"{', '.join(WAN_FILES)} of {WAN_REPO}@{WAN_REVISION}" in message
    assert (
        f"`hf download {CAUSAL_FORCING_REPO} {DIT_FILE} --revision {CAUSAL_FORCING_REVISION} "
        f"--local-dir Causal-Forcing "
        f"&& hf download {WAN_REPO} {' '.join(WAN_FILES)} --revision {WAN_REVISION} --local-dir Wan2.1-T2V-1.3B`"
    ) in message
    assert message.endswith("pass --checkpoint Causal-Forcing --wan-folder Wan2.1-T2V-1.3B")
    assert len(hub.asked) == 1, "a dead network is waited for once"


def test_resolve_weights_only_what_is_missing_is_named(hub: Hub) -> None:
    hub.add(CAUSAL_FORCING_REPO, CAUSAL_FORCING_REVISION, DIT_FILE)
    hub.add(WAN_REPO, WAN_REVISION, WAN_FILES[0])
    with pytest.raises(WeightsMissingError, match="downloads are switched off") as caught:
        resolve_weights(CHUNKWISE, checkpoint=None, wan_folder=None, allow_download=False)
    message = str(caught.value)
    assert DIT_FILE not in message
    assert WAN_FILES[0] not in message
    assert WAN_FILES[1] in message
    assert message.endswith("pass --wan-folder Wan2.1-T2V-1.3B")
    assert hub.asked == []


def test_resolve_weights_gap_in_a_given_folder_names_each_file_and_never_downloads(hub: Hub, tmp_path: Path) -> None:
    checkpoint = folder_with(tmp_path, "mine.pt") / "mine.pt"
    wan = folder_with(tmp_path / "my wan", WAN_FILES[0])
    for name in WAN_FILES:
        hub.add(WAN_REPO, WAN_REVISION, name)  # a gap is not filled from elsewhere: the folder's files belong together
    with pytest.raises(WeightsMissingError) as caught:
        resolve_weights(CHUNKWISE, checkpoint=checkpoint, wan_folder=wan)
    message = str(caught.value)
    assert f"missing {wan / WAN_FILES[1]}, {wan / WAN_FILES[2]};" in message
    assert (
        f"hf download {WAN_REPO} {WAN_FILES[1]} {WAN_FILES[2]} --revision {WAN_REVISION} --local-dir '{wan}'" in message
    )
    assert message.endswith(f"pass --checkpoint {checkpoint} --wan-folder '{wan}'")
    assert hub.asked == []


@pytest.mark.parametrize("name", ["absent.pt", "absent"])
def test_resolve_weights_given_checkpoint_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsMissingError, match=f"missing {tmp_path / name}"):
        resolve_weights(CHUNKWISE, checkpoint=tmp_path / name, wan_folder=None)


def test_resolve_weights_random_by_design_says_so(hub: Hub) -> None:
    with pytest.raises(WeightsMissingError, match=r"tiny has no released weights.*--random-weights"):
        resolve_weights(TINY, checkpoint=None, wan_folder=None)
    assert hub.asked == []


# --- planning -------------------------------------------------------------------------------------------------------


def test_planned_downloads_lists_what_is_not_given_and_what_is_cached(hub: Hub, tmp_path: Path) -> None:
    hub.add(WAN_REPO, WAN_REVISION, WAN_FILES[1])
    checkpoint = folder_with(tmp_path, "mine.pt") / "mine.pt"
    assert planned_downloads(CHUNKWISE, checkpoint=checkpoint, wan_folder=None) == [
        (WAN_REPO, WAN_REVISION, name, name == WAN_FILES[1]) for name in WAN_FILES
    ]
    first, *_ = planned_downloads(CHUNKWISE, checkpoint=None, wan_folder=None)
    assert first == (CAUSAL_FORCING_REPO, CAUSAL_FORCING_REVISION, DIT_FILE, False)
    assert hub.asked == []


# --- random weights -------------------------------------------------------------------------------------------------


class Part(torch.nn.Module):
    """One of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 64)
        self.linear = torch.nn.Linear(64, 400)
        self.conv = torch.nn.Conv3d(8, 40, 3)
        self.norm = torch.nn.LayerNorm(300)
        self.gamma = torch.nn.Parameter(torch.empty(300, 1, 1, 1))
        self.modulation = torch.nn.Parameter(torch.empty(1, 6, 256))


def test_random_state_dict_scales_fit_the_kind_of_parameter() -> None:
    drawn = random_state_dict(Part(), 0)
    assert set(drawn) == set(Part().state_dict())
    expected = {
        "embedding.weight": (0.0, 0.5),
        "linear.weight": (0.0, 64**-0.5),
        "linear.bias": (0.0, 0.02),
        "conv.weight": (0.0, (8 * 27) ** -0.5),
        "norm.weight": (1.0, 0.1),
        "norm.bias": (0.0, 0.02),
        "gamma": (1.0, 0.1),
        "modulation": (0.0, 256**-0.5),
    }
    for name, (mean, deviation) in expected.items():
        tensor = drawn[name]
        assert abs(float(tensor.mean()) - mean) < 5 * deviation / tensor.numel() ** 0.5, name
        assert float(tensor.std()) == pytest.approx(deviation, rel=0.2), name


def test_random_state_dict_is_the_same_on_every_machine() -> None:
    with torch.device("meta"):
        layer = torch.nn.Linear(4, 2)
    # Integer sums times one float32 factor: any machine gets these bits.
    drawn = random_state_dict(layer, 1)
    assert [value.hex() for value in drawn["bias"].tolist()] == PINNED_BIAS
    assert torch.equal(drawn["weight"], random_state_dict(torch.nn.Linear(4, 2), 1)["weight"])


def test_random_state_dict_depends_on_seed_and_name_only() -> None:
    one = random_state_dict(torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)}), 0)
    other = random_state_dict(torch.nn.ModuleDict({"b": torch.nn.Linear(4, 4)}), 0)
    assert torch.equal(one["b.weight"], other["b.weight"])
    assert not torch.equal(one["a.weight"], one["b.weight"])
    again = random_state_dict(torch.nn.ModuleDict({"b": torch.nn.Linear(4, 4)}), 1)
    assert not torch.equal(other["b.weight"], again["b.weight"])


def test_random_state_dict_parts_of_a_large_tensor_are_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random_state_dict(torch.nn.Linear(100, 100), 0)["weight"]
    monkeypatch.setattr(weights, "_DRAW_PART", 1024)
    assert torch.equal(random_state_dict(torch.nn.Linear(100, 100), 0)["weight"], whole)
    assert len(set(whole.flatten().tolist())) > 9000


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_randomise_gives_the_drawn_weights(device: str) -> None:
    with torch.device(device):
        module = Part()
    randomise(module, 3, dtype=torch.bfloat16)
    for name, tensor in random_state_dict(module, 3).items():
        assert torch.equal(module.state_dict()[name], tensor.bfloat16()), name
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_randomise_deep_stack_keeps_activations_near_one() -> None:
    with torch.device("meta"):
        stack = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(10)))
    randomise(stack, 0)
    out = stack(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)))
    assert 0.3 < float(out.std()) < 3
