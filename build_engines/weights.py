"""Where weights come from: the user's files, this package, the hub's cache, or a download at a pinned revision."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from causal_forcing.build_engines.checkpoint import SAFETENSORS_SUFFIX, TORCH_SUFFIXES
from causal_forcing.runtime.environment import DISTRIBUTION
from causal_forcing.runtime.errors import WeightsMissingError
from causal_forcing.runtime.variant import (
    CHECKPOINT_REPOSITORY,
    CHECKPOINT_REVISION,
    WAN_REPOSITORY,
    WAN_REVISION,
    Variant,
)

TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
VAE_FILE = "Wan2.1_VAE.pth"
TOKENIZER_FILE = "google/umt5-xxl/tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The files of one variant, all of them present."""

    dit: Path
    """The denoiser's checkpoint."""
    text_encoder: Path
    """The UMT5 encoder."""
    tokenizer: Path
    """Folder that holds `tokenizer.json`."""
    vae: Path | None = None
    """The Wan VAE; None where nothing is made of it."""
    taehv: Path | None = None
    """The tiny decoder; None for the Wan VAE's own."""

    def paths(self) -> dict[str, Path]:
        """Return the files by role."""
        roles = {
            "dit": self.dit,
            "text_encoder": self.text_encoder,
            "vae": self.vae,
            "taehv": self.taehv,
            "tokenizer": self.tokenizer / "tokenizer.json",
        }
        return {role: path for role, path in roles.items() if path is not None}


class PlannedDownload(NamedTuple):
    """A file that would come from the hub."""

    repo: str
    """Repository on the hub."""
    revision: str
    """Commit."""
    filename: str
    """Path in the repository."""
    cached: bool
    """Whether the hub's cache has it, so that nothing is downloaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One file that is wanted, and where."""

    repo: str
    revision: str
    filename: str
    given: Path | None
    """Where it lies if the user's option or the installation is right; None where it comes from the hub."""
    root: Path | None
    """The folder to which `filename` is relative; None where a file or nothing was given."""

    def local(self) -> Path | None:
        """Return the given file, or its safetensors sibling."""
        if self.given is None or self.given.is_file():
            return self.given
        sibling = self.given.with_suffix(SAFETENSORS_SUFFIX)
        return sibling if self.given.suffix in TORCH_SUFFIXES and sibling.is_file() else None

    def cached(self) -> Path | None:
        """Return the file in the hub's cache, without network."""
        import huggingface_hub

        path = huggingface_hub.try_to_load_from_cache(self.repo, self.filename, revision=self.revision)
        return Path(path) if isinstance(path, str) else None

    def download(self) -> Path:
        """Fetch the file into the hub's cache."""
        import huggingface_hub

        return Path(huggingface_hub.hf_hub_download(self.repo, self.filename, revision=self.revision))


def resolve_weights(
    variant: Variant,
    *,
    checkpoint: Path | None,
    wan_folder: Path | None,
    taehv: Path | None = None,
    allow_download: bool = True,
) -> WeightFiles:
    """Find all weights of a variant: what the user gave, else what comes with the package, else the hub's files.

    Args:
        variant: What is to be built.
        checkpoint: The DiT's file, or a folder with the released layout (`chunkwise/causal_forcing.pt`, …).
        wan_folder: The Wan2.1-T2V-1.3B folder: text encoder, VAE and tokenizer. `.safetensors` files of the same stems
            do as well.
        taehv: The tiny decoder's file, where that stands in for the Wan VAE's: the VAE is looked for then only if an
            image is to be encoded.
        allow_download: Whether what is neither given nor cached may be downloaded, at the pinned revision.

    Raises:
        WeightsMissingError: Something is missing; the message names every file, and the commands that bring them.
    """
    found: dict[str, Path] = {}
    missing: list[_Part] = []
    reason = None if allow_download else "downloads are switched off"
    for role, part in _parts(variant, checkpoint, wan_folder, has_taehv=taehv is not None).items():
        path = part.local() if part.given is not None else part.cached()
        if path is None and part.given is None and reason is None:
            try:
                path = part.download()
            except Exception as error:  # hub client, HTTP and transfer libraries raise their own kinds
                # One attempt is enough: the others would wait for the same timeout.
                reason = textwrap.shorten(f"{type(error).__name__}: {error}".rstrip(": "), 120, placeholder=" …")
        if path is None:
            missing.append(part)
        else:
            found[role] = path
    if missing:
        raise WeightsMissingError(_explain(variant, missing, reason, checkpoint, wan_folder))
    found["tokenizer"] = found["tokenizer"].parent
    return WeightFiles(**found, taehv=taehv)


def included_folder(variant: Variant) -> Path | None:
    """Return the folder of the variant's weights in this package, laid out as the released ones; None without any."""
    if variant.included_weights is None:
        return None
    return Path(__file__).parent / variant.included_weights.partition("@")[0] / "weights"


def planned_downloads(
    variant: Variant, *, checkpoint: Path | None, wan_folder: Path | None, has_taehv: bool = False
) -> list[PlannedDownload]:
    """List what `resolve_weights` would take from the hub, without touching the network.

    Raises:
        WeightsMissingError: The variant has no released weights, and none were given.
    """
    return [
        PlannedDownload(part.repo, part.revision, part.filename, part.cached() is not None)
        for part in _parts(variant, checkpoint, wan_folder, has_taehv=has_taehv).values()
        if part.given is None
    ]


def _parts(variant: Variant, checkpoint: Path | None, wan_folder: Path | None, *, has_taehv: bool) -> dict[str, _Part]:
    """Return the wanted files by the field of `WeightFiles` that they fill."""
    included = included_folder(variant)
    checkpoint, wan_folder = checkpoint or included, wan_folder or included
    is_file = checkpoint is not None and checkpoint.suffix in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX)
    if variant.checkpoint_file is None and (not is_file or wan_folder is None):
        raise WeightsMissingError(
            f"{variant.slug} has no released weights, they are random by design: pass --random-weights 0, or a .pt "
            "file with --checkpoint and a folder with --wan-folder"
        )
    dit_file = variant.checkpoint_file or ""
    dit_root = None
    if checkpoint is not None and not is_file:
        checkpoint, dit_root = checkpoint / dit_file, checkpoint
    parts = {
        "dit": _Part(
            repo=CHECKPOINT_REPOSITORY,
            revision=CHECKPOINT_REVISION,
            filename=dit_file,
            given=checkpoint,
            root=dit_root,
        )
    }
    wan_files = {"text_encoder": TEXT_ENCODER_FILE, "vae": VAE_FILE, "tokenizer": TOKENIZER_FILE}
    if has_taehv and not variant.takes_image:
        del wan_files["vae"]
    for role, filename in wan_files.items():
        parts[role] = _Part(
            repo=WAN_REPOSITORY,
            revision=WAN_REVISION,
            filename=filename,
            given=wan_folder and wan_folder / filename,
            root=wan_folder,
        )
    return parts


def _explain(
    variant: Variant, missing: list[_Part], reason: str | None, checkpoint: Path | None, wan_folder: Path | None
) -> str:
    """Return one line: what is missing, why, and how to get it."""
    if variant.included_weights is not None:
        return _explain_included(variant, missing)
    facts = []
    given = [str(part.given) for part in missing if part.given is not None]
    if given:
        facts.append(f"missing {', '.join(given)}")
    absent = [part for part in missing if part.given is None]
    for (repo, revision), files in _by_repo(absent):
        facts.append(f"{', '.join(files)} of {repo}@{revision} not in the hub's cache")
    if absent and reason:
        facts.append(f"no download ({reason})")
    folders = {CHECKPOINT_REPOSITORY: Path("Causal-Forcing"), WAN_REPOSITORY: Path("Wan2.1-T2V-1.3B")}
    folders |= {part.repo: part.root for part in missing if part.root is not None}
    commands = [
        f"hf download {repo} {shlex.join(files)} --revision {revision} --local-dir {shlex.quote(str(folders[repo]))}"
        for (repo, revision), files in _by_repo(part for part in missing if part.filename)
    ]
    repos = {part.repo for part in missing}
    dit = folders[CHECKPOINT_REPOSITORY] if CHECKPOINT_REPOSITORY in repos or checkpoint is None else checkpoint
    wan = folders[WAN_REPOSITORY] if WAN_REPOSITORY in repos or wan_folder is None else wan_folder
    options = []
    if CHECKPOINT_REPOSITORY in repos or checkpoint is not None:
        options.append(f"--checkpoint {shlex.quote(str(dit))}")
    if WAN_REPOSITORY in repos or wan_folder is not None:
        options.append(f"--wan-folder {shlex.quote(str(wan))}")
    if not commands:
        return f"weights of {variant.slug} not found: {'; '.join(facts)}; pass an existing file with --checkpoint"
    return (
        f"weights of {variant.slug} not found: {'; '.join(facts)}; where there is network run "
        f"`{' && '.join(commands)}`, then pass {' '.join(options)}"
    )


def _explain_included(variant: Variant, missing: list[_Part]) -> str:
    """Return the same for weights that come with the package, of which the hub has none."""
    paths = [part.given for part in missing if part.given is not None]
    said = f"weights of {variant.slug} not found: missing {', '.join(map(str, paths))}"
    if any(part.root == included_folder(variant) for part in missing):
        return f"{said}; they come with the package: install {DISTRIBUTION} again"
    options = {"--checkpoint" if part.repo == CHECKPOINT_REPOSITORY else "--wan-folder": None for part in missing}
    return f"{said}; name existing ones, or leave out {' and '.join(options)} for those that come with the package"


def _by_repo(parts: Iterable[_Part]) -> Iterator[tuple[tuple[str, str], list[str]]]:
    files: dict[tuple[str, str], list[str]] = {}
    for part in parts:
        files.setdefault((part.repo, part.revision), []).append(part.filename)
    yield from files.items()
