"""Finding, planning and inventing weights. Nothing here touches the network."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from causal_forcing.build_engines import weights
from causal_forcing.build_engines.weights import included_folder, planned_downloads, resolve_weights
from causal_forcing.runtime.errors import WeightsMissingError
from causal_forcing.runtime.variant import (
    CHECKPOINT_REPOSITORY,
    CHECKPOINT_REVISION,
    WAN_REPOSITORY,
    WAN_REVISION,
    find_variant,
)

CHUNKWISE = find_variant("causal-forcing-wan2.1-t2v-1.3b-chunkwise")
SHAPES = find_variant("shapes")
TINY = find_variant("tiny")
DIT_FILE = "chunkwise/causal_forcing.pt"
WAN_FILES = ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google/umt5-xxl/tokenizer.json")


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
        (CHECKPOINT_REPOSITORY, CHECKPOINT_REVISION, DIT_FILE),
        *((WAN_REPOSITORY, WAN_REVISION, name) for name in WAN_FILES),
    ]
    assert files.dit == hub.path(*hub.asked[0])
    assert files.text_encoder.name == WAN_FILES[0]
    assert (files.vae or Path()).name == WAN_FILES[1]
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
    assert {files.paths()[role].suffix for role in ("dit", "text_encoder", "vae")} == {".safetensors"}


def test_resolve_weights_with_a_tiny_decoder_leaves_the_vae_unless_an_image_is_encoded(
    hub: Hub, tmp_path: Path
) -> None:
    taehv = folder_with(tmp_path, "taew2_1.pth") / "taew2_1.pth"
    files = resolve_weights(CHUNKWISE, checkpoint=None, wan_folder=None, taehv=taehv)
    assert (files.vae, files.taehv) == (None, taehv)
    assert set(files.paths()) == {"dit", "text_encoder", "taehv", "tokenizer"}
    assert WAN_FILES[1] not in [name for _, _, name in hub.asked]
    planned = planned_downloads(CHUNKWISE, checkpoint=None, wan_folder=None, has_taehv=True)
    assert [download.filename for download in planned] == [DIT_FILE, WAN_FILES[0], WAN_FILES[2]]
    i2v = find_variant("causal-forcing-wan2.1-i2v-1.3b-framewise")
    files = resolve_weights(i2v, checkpoint=None, wan_folder=None, taehv=taehv)
    assert (files.vae or Path()).name == WAN_FILES[1]
    assert files.taehv == taehv


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
    assert f"{DIT_FILE} of {CHECKPOINT_REPOSITORY}@{CHECKPOINT_REVISION}" in message
    assert f"{', '.join(WAN_FILES)} of {WAN_REPOSITORY}@{WAN_REVISION}" in message
    assert (
        f"`hf download {CHECKPOINT_REPOSITORY} {DIT_FILE} --revision {CHECKPOINT_REVISION} "
        f"--local-dir Causal-Forcing "
        f"&& hf download {WAN_REPOSITORY} {' '.join(WAN_FILES)} --revision {WAN_REVISION} --local-dir Wan2.1-T2V-1.3B`"
    ) in message
    assert message.endswith("pass --checkpoint Causal-Forcing --wan-folder Wan2.1-T2V-1.3B")
    assert len(hub.asked) == 1, "a dead network is waited for once"


def test_resolve_weights_only_what_is_missing_is_named(hub: Hub) -> None:
    hub.add(CHECKPOINT_REPOSITORY, CHECKPOINT_REVISION, DIT_FILE)
    hub.add(WAN_REPOSITORY, WAN_REVISION, WAN_FILES[0])
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
        hub.add(
            WAN_REPOSITORY, WAN_REVISION, name
        )  # a gap is not filled from elsewhere: the folder's files belong together
    with pytest.raises(WeightsMissingError) as caught:
        resolve_weights(CHUNKWISE, checkpoint=checkpoint, wan_folder=wan)
    message = str(caught.value)
    assert f"missing {wan / WAN_FILES[1]}, {wan / WAN_FILES[2]};" in message
    assert (
        f"hf download {WAN_REPOSITORY} {WAN_FILES[1]} {WAN_FILES[2]} --revision {WAN_REVISION} --local-dir '{wan}'"
        in message
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


# --- included with the package --------------------------------------------------------------------------------------


def test_included_folder_is_known_for_the_variants_that_have_one() -> None:
    assert included_folder(SHAPES) == Path(weights.__file__).parent / "shapes" / "weights"
    assert included_folder(CHUNKWISE) is None
    assert included_folder(TINY) is None


def test_resolve_weights_included_need_no_hub(hub: Hub) -> None:
    files = resolve_weights(SHAPES, checkpoint=None, wan_folder=None)
    assert all(path.is_relative_to(included_folder(SHAPES) or "") for path in files.paths().values())
    assert planned_downloads(SHAPES, checkpoint=None, wan_folder=None) == []
    assert hub.asked == []


def test_resolve_weights_given_paths_win_over_the_included_ones_each_for_itself(hub: Hub, tmp_path: Path) -> None:
    own = folder_with(tmp_path / "own", "causal_forcing.safetensors", *WAN_FILES)
    included = resolve_weights(SHAPES, checkpoint=None, wan_folder=None)
    both = resolve_weights(SHAPES, checkpoint=own, wan_folder=own)
    assert all(path.is_relative_to(own) for path in both.paths().values())
    dit_alone = resolve_weights(SHAPES, checkpoint=own / "causal_forcing.safetensors", wan_folder=None)
    assert (dit_alone.dit, dit_alone.vae) == (both.dit, included.vae)
    wan_alone = resolve_weights(SHAPES, checkpoint=None, wan_folder=own)
    assert (wan_alone.dit, wan_alone.vae, wan_alone.tokenizer) == (included.dit, both.vae, both.tokenizer)
    assert planned_downloads(SHAPES, checkpoint=own, wan_folder=None) == []
    assert hub.asked == []


def test_resolve_weights_gap_in_a_folder_for_the_included_model_names_the_option(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(WeightsMissingError) as caught:
        resolve_weights(SHAPES, checkpoint=tmp_path, wan_folder=None)
    assert str(caught.value) == (
        f"weights of shapes not found: missing {tmp_path / 'causal_forcing.safetensors'}; name existing ones, or leave "
        "out --checkpoint for those that come with the package"
    )
    with pytest.raises(WeightsMissingError, match="or leave out --checkpoint and --wan-folder for those that come"):
        resolve_weights(SHAPES, checkpoint=tmp_path / "absent.pt", wan_folder=tmp_path)
    assert hub.asked == []


@pytest.mark.parametrize("checkpoint", [None, Path("absent.pt")])
def test_resolve_weights_incomplete_installation_says_to_install_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path | None
) -> None:
    monkeypatch.setattr(weights, "__file__", str(tmp_path / "weights.py"))
    folder_with(tmp_path / "shapes" / "weights", "causal_forcing.safetensors", *WAN_FILES[1:])
    with pytest.raises(WeightsMissingError) as caught:
        resolve_weights(SHAPES, checkpoint=checkpoint, wan_folder=None)
    message = str(caught.value)
    assert str(tmp_path / "shapes" / "weights" / WAN_FILES[0]) in message
    assert WAN_FILES[1] not in message
    assert message.endswith("; they come with the package: install causal-forcing-engine again")
    assert hub.asked == []


# --- planning -------------------------------------------------------------------------------------------------------


def test_planned_downloads_lists_what_is_not_given_and_what_is_cached(hub: Hub, tmp_path: Path) -> None:
    hub.add(WAN_REPOSITORY, WAN_REVISION, WAN_FILES[1])
    checkpoint = folder_with(tmp_path, "mine.pt") / "mine.pt"
    assert planned_downloads(CHUNKWISE, checkpoint=checkpoint, wan_folder=None) == [
        (WAN_REPOSITORY, WAN_REVISION, name, name == WAN_FILES[1]) for name in WAN_FILES
    ]
    first, *_ = planned_downloads(CHUNKWISE, checkpoint=None, wan_folder=None)
    assert first == (CHECKPOINT_REPOSITORY, CHECKPOINT_REVISION, DIT_FILE, False)
    assert hub.asked == []
