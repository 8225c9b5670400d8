"""Checkpoints and weight folders that cannot be used; nothing in them is run, and no build is begun in vain."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from causal_forcing.build_engines.model_loading import RandomModels
from causal_forcing.build_engines.models.text_encoder import upstream_names
from causal_forcing.build_engines.tiny_tokenizer import write_byte_tokenizer
from causal_forcing.runtime.variant import find_variant

Refuses = Callable[..., str]
CHUNKWISE = "causal-forcing-wan2.1-t2v-1.3b-chunkwise"
GIVEN = ("--checkpoint", "dit.pt", "--wan-folder", "wan", "--output", "engines", "--device", "cpu")
TINY_DECODER = ("--decoder", "taehv")
DIT, VAE, TEXT = Path("dit.pt"), Path("wan/Wan2.1_VAE.pth"), Path("wan/models_t5_umt5-xxl-enc-bf16.pth")
TAEHV = Path("wan/taew2_1.pth")
TOKENIZER = Path("wan/google/umt5-xxl/tokenizer.json")


class Bomb:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def whole_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good weights of `tiny`, laid out as the released ones."""
    folder = tmp_path_factory.mktemp("weights")
    model = find_variant("tiny").model
    source = RandomModels(model=model, seed=1, dtype=torch.float32)
    (folder / TOKENIZER).parent.parent.mkdir(parents=True)
    torch.save(source.dit().state_dict(), folder / DIT)
    torch.save(source.vae().state_dict(), folder / VAE)
    torch.save(source.taehv().state_dict(), folder / TAEHV)
    own = source.text_encoder().state_dict()
    torch.save({theirs: own[ours] for theirs, ours in upstream_names(model.text).items()}, folder / TEXT)
    write_byte_tokenizer((folder / TOKENIZER).parent)
    return folder


@pytest.fixture
def weights(whole_weights: Path, tmp_path: Path) -> Path:
    """A copy of them to spoil, in the working folder."""
    return Path(shutil.copytree(whole_weights, tmp_path, dirs_exist_ok=True))


def spoil_truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def spoil_emptied(path: Path) -> None:
    os.truncate(path, 0)


def spoil_of_another_model(path: Path) -> None:
    torch.save({"blocks.0.weight": torch.zeros(3, 3)}, path)


def spoil_with_code(path: Path) -> None:
    torch.save({"weight": Bomb(path.parent / "ran")}, path)


def spoil_no_checkpoint(path: Path) -> None:
    path.write_text("<html>404</html>")


SPOILS: dict[Callable[[Path], None], str] = {
    spoil_truncated: "is damaged or truncated; download it again",
    spoil_emptied: "is empty; download it again",
    spoil_of_another_model: "; pass the file that belongs to this slug with --checkpoint or --wan-folder",
    spoil_with_code: "contains Python code (posix.system), which was not run; expected tensors only",
    spoil_no_checkpoint: "is not a checkpoint: got neither torch's zip archive nor a pickle",
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("file", [DIT, VAE, TEXT])
def test_weights_spoilt_are_refused_before_the_build_begins(
    refuses: Refuses, weights: Path, file: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(weights / file)
    said = refuses("cf-build", "tiny", *GIVEN)
    assert SPOILS[spoil] in said
    assert file.name in said
    assert not list(weights.rglob("ran"))
    assert not (weights / "engines").exists()


@pytest.mark.parametrize("spoil", SPOILS)
def test_weights_of_a_tiny_decoder_spoilt_are_refused_before_the_build_begins(
    refuses: Refuses, weights: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(weights / TAEHV)
    said = refuses("cf-build", "tiny", *GIVEN, *TINY_DECODER)
    assert SPOILS[spoil].replace("--checkpoint or --wan-folder", "--taehv") in said
    assert TAEHV.name in said
    assert not list(weights.rglob("ran"))
    assert not (weights / "engines").exists()


def test_weights_of_another_tiny_decoder_are_counted(refuses: Refuses, weights: Path) -> None:
    shutil.copy(weights / VAE, weights / "mine.pth")
    said = refuses("cf-build", "tiny", *GIVEN, *TINY_DECODER, "--taehv", "mine.pth")
    assert "mine.pth does not fit TAEHV: got " in said
    assert "missing (decoder.1.weight, " in said
    assert said.endswith("--taehv")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--decoder", "taehv"],
            "decoder taehv not found: no wan/taew2_1.pth or wan/taew2_1.safetensors; where there is network run "
            "`curl -LO https://github.com/madebyollin/taehv/raw/1f14a568f24bf8811e0a0ac601613e04fc1581e8/taew2_1.pth`, "
            "then pass --taehv taew2_1.pth",
        ),
        (
            ["--decoder", "lighttae"],
            "decoder lighttae not found: no wan/lighttaew2_1.pth or wan/lighttaew2_1.safetensors; where there is "
            "network run `hf download lightx2v/Autoencoders lighttaew2_1.pth --local-dir .`, then pass --taehv "
            "lighttaew2_1.pth",
        ),
        (["--decoder", "taehv", "--taehv", "nothing.pth"], "decoder taehv not found: no nothing.pth; where there is"),
        (["--decoder", "taehv", "--taehv", "wan"], "decoder taehv not found: no wan; where there is network run"),
    ],
)
@pytest.mark.parametrize("command", ["build", "plan", "verify"])
def test_weights_of_a_tiny_decoder_missing_are_named_with_the_command_that_brings_them(
    refuses: Refuses, weights: Path, command: str, arguments: list[str], said: str
) -> None:
    (weights / TAEHV).unlink()
    assert said in refuses("cf-build", command, "tiny", *GIVEN, *arguments, code=3)


@pytest.mark.parametrize("program", ["cf-build", "cf-generate"])
def test_weights_of_a_tiny_decoder_are_missed_before_any_download(refuses: Refuses, program: str) -> None:
    ask = ("--prompt", "a fox") if program == "cf-generate" else ()
    said = refuses(program, CHUNKWISE, *TINY_DECODER, "--device", "cpu", *ask, code=3)
    assert "weights of the decoder taehv not found: no file was named; where there is network run `curl " in said


@pytest.mark.parametrize("program", ["cf-build", "cf-generate"])
@pytest.mark.parametrize("extra", [[], ["--random-weights", "0"], ["--taehv", "taew2_1.pth"]])
def test_weights_of_a_tiny_decoder_for_shapes_do_not_exist(refuses: Refuses, program: str, extra: list[str]) -> None:
    said = refuses(program, "shapes", "--decoder", "taehv", *extra)
    assert said.endswith("no taehv was trained for the latents of shapes: leave out --decoder and --taehv")


def test_weights_of_a_tiny_decoder_alone_do_not_make_tiny_whole(refuses: Refuses, weights: Path) -> None:
    said = refuses("cf-build", "tiny", *TINY_DECODER, "--taehv", str(TAEHV), code=3)
    assert "tiny has no released weights, they are random by design: pass --random-weights 0" in said


def test_weights_of_another_model_are_counted(refuses: Refuses, weights: Path) -> None:
    shutil.copy(weights / VAE, weights / DIT)
    said = refuses("cf-build", "tiny", *GIVEN)
    assert "dit.pt does not fit the DiT of tiny: got " in said
    assert "missing (" in said
    assert "extra (" in said


def test_weights_with_nan_stop_the_build_without_a_trace(refuses: Refuses, weights: Path) -> None:
    content = torch.load(weights / DIT)
    next(iter(content.values())).view(-1)[0] = float("nan")
    torch.save(content, weights / DIT)
    said = refuses("cf-build", "tiny", *GIVEN, begun=True)
    assert "1 non-finite (" in said
    assert not [
        path for path in weights.joinpath("engines").rglob("*") if path.suffix != ".lock" and path.name != "tiny"
    ]


def test_weights_tokenizer_unfit_is_refused(refuses: Refuses, weights: Path) -> None:
    (weights / TOKENIZER).write_text("{}")
    assert "tokenizer.json is damaged or no tokenizer" in refuses("cf-build", "tiny", *GIVEN)


@pytest.mark.parametrize("file", [DIT, VAE, TEXT, TOKENIZER])
def test_weights_missing_piece_is_named_with_the_command_that_brings_it(
    refuses: Refuses, weights: Path, file: Path
) -> None:
    (weights / file).unlink()
    said = refuses("cf-build", "tiny", *GIVEN, code=3)
    assert f"missing {file}" in said
    # No DiT of `tiny` is on the hub.
    assert (
        "pass an existing file with --checkpoint"
        if file == DIT
        else f"hf download Wan-AI/Wan2.1-T2V-1.3B {file.relative_to('wan')}"
    ) in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint", "nothing.pt"], "pass --random-weights 0, or a .pt file with --checkpoint and a folder with"),
        (["--wan-folder", "nothing"], "pass --random-weights 0, or a .pt file with --checkpoint and a folder with"),
    ],
)
def test_weights_of_tiny_half_given_are_refused(refuses: Refuses, arguments: list[str], said: str) -> None:
    assert said in refuses("cf-build", "tiny", *arguments, code=3)
    assert said in refuses("cf-build", "plan", "tiny", *arguments, code=3)
    assert said in refuses("cf-build", "verify", "tiny", *arguments, code=3)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--checkpoint", "nothing"], 3, "missing nothing/causal_forcing.safetensors; name existing ones, or leave ou"),
        (["--checkpoint", "nothing.pt"], 3, "missing nothing.pt; name existing ones, or leave out --checkpoint for th"),
        (["--wan-folder", "nothing"], 3, "google/umt5-xxl/tokenizer.json; name existing ones, or leave out --wan-fol"),
        (["--checkpoint", "dit.pt"], 2, "dit.pt does not fit the DiT of shapes: got "),
    ],
)
def test_weights_in_place_of_the_included_ones_unfit_are_refused(
    refuses: Refuses, weights: Path, arguments: list[str], code: int, said: str
) -> None:
    assert said in refuses("cf-build", "shapes", *arguments, code=code)


def test_weights_included_missing_is_an_installation_to_repair(
    refuses: Refuses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("causal_forcing.build_engines.weights.__file__", str(tmp_path / "weights.py"))
    said = refuses("cf-build", "shapes", code=3)
    assert f"weights of shapes not found: missing {tmp_path}/shapes/weights/causal_forcing.safetensors, " in said
    assert said.endswith("they come with the package: install causal-forcing-engine again")


def test_weights_of_a_full_size_slug_spoilt_fail_quickly_and_small(refuses: Refuses, weights: Path) -> None:
    said = refuses("cf-build", CHUNKWISE, *GIVEN, alone=True)
    assert f"dit.pt does not fit the DiT of {CHUNKWISE}: got " in said
    largest_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert largest_kib < 2**21, "the largest child so far took 2 GiB or more"


def test_weights_released_missing_offline_say_what_to_download_and_where_to_put_it(
    refuses: Refuses, tmp_path: Path
) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    said = refuses("cf-generate", CHUNKWISE, "--prompt", "a fox", code=3, begun=True, env=environment)
    assert f"weights of {CHUNKWISE} not found: chunkwise/causal_forcing.pt of zhuhz22/Causal-Forcing@" in said
    assert "where there is network run `hf download zhuhz22/Causal-Forcing chunkwise/causal_forcing.pt" in said
    assert "--local-dir Wan2.1-T2V-1.3B`, then pass --checkpoint Causal-Forcing --wan-folder Wan2.1-T2V-1.3B" in said


def test_build_without_room_is_refused_before_writing(
    refuses: Refuses, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(weights)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    said = refuses("cf-build", "tiny", *GIVEN, code=3, begun=True)
    assert "cannot write timestep_modulation into " in said
    assert "it takes 0.00 GiB and 0.00 GiB are free; free some, or choose another" in said
