"""Wrong options: one line, nothing begun, and the nearest right word where a name is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

Refuses = Callable[..., str]
ASK = ("--prompt", "a fox", "--total-blocks", "1")


@pytest.mark.parametrize(
    ("program", "arguments", "said"),
    [
        ("cf-generate", ["tinny"], "unknown slug 'tinny': did you mean 'tiny'? valid: shapes"),
        ("cf-generate", ["shape"], "unknown slug 'shape': did you mean 'shapes'? "),
        ("cf-generate", ["tinny", "a red star"], "unknown slug 'tinny': did you mean 'tiny'? "),
        ("cf-generate", ["a red star", "tiny"], "unknown slug 'a red star': "),
        (
            "cf-generate",
            ["causal-forcing-wan2.1-t2v-1.3b-chunkwize"],
            "did you mean 'causal-forcing-wan2.1-t2v-1.3b-ch",
        ),
        ("cf-generate", ["tiny", "--promt", "x"], "no such option --promt: did you mean --prompt? (see --help)"),
        ("cf-generate", ["tiny", "--total-block", "3"], "no such option --total-block: did you mean --total-blocks?"),
        ("cf-generate", ["tiny", "--qqqqqq"], "no such option --qqqqqq (see --help)"),
        ("cf-generate", ["tiny", "tiny", "tiny"], "extra argument"),
        ("cf-generate", ["a", "red", "star"], "extra argument(s) (star): put a text of several words in quotes"),
        ("cf-generate", ["tiny", "--output"], "'--output' requires an argument"),
        ("cf-build", ["doctr"], "unknown command or slug 'doctr': did you mean 'doctor'?"),
        ("cf-build", ["tinny"], "did you mean 'tiny'?"),
        ("cf-build", ["plan", "tinny"], "did you mean 'tiny'?"),
        (
            "cf-build",
            ["plan", "tiny", "--pixel-heigth", "32"],
            "no such option --pixel-heigth: did you mean --pixel-hei",
        ),
        ("cf-build", ["tiny", "--prompt", "x"], "no such option --prompt"),
        ("cf-build", ["tiny", "a red star"], "extra argument"),
        ("cf-build", ["inspect"], "Missing argument 'FOLDER'"),
    ],
)
def test_options_unknown_name_is_answered_with_the_nearest(
    refuses: Refuses, program: str, arguments: list[str], said: str
) -> None:
    assert said in refuses(program, *arguments)


def test_options_unknown_use_of_the_text_encoder_names_the_known_ones(refuses: Refuses) -> None:
    said = refuses("cf-generate", "tiny", *ASK, "--text-encoder", "fre")
    assert "unknown use of the text encoder 'fre': did you mean 'free'? valid: free, keep" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pixel-height", "40"], "pixel height 40 is not a positive multiple of 16: use --pixel-height 32"),
        (["--pixel-width", "0"], "pixel width 0 is not a positive multiple of 16: use --pixel-width 16"),
        (["--pixel-height", "-16"], "pixel height -16 is not a positive multiple of 16"),
        (["--pixel-height", "100000"], "pixel height 100000 is above 4096"),
        (["--pixel-height", "tall"], "--pixel-height 'tall' is not valid"),
        (["--window-frames", "0"], "window_frames 0"),
        (["--window-frames", "2"], "use --window-frames 3 or more"),
        (["--sink-frames", "-1"], "sink_frames -1"),
        (["--precision", "fp4"], "unknown precision 'fp4': did you mean 'fp"),
        (["--decoder", "tae"], "unknown decoder 'tae': did you mean 'taehv'? valid: wan, taehv, lighttae"),
        (["--taehv", "taew2_1.pth"], "--taehv is for the tiny decoders: add --decoder taehv or lighttae"),
        (["--decoder", "wan", "--taehv", "taew2_1.pth"], "add --decoder taehv or lighttae"),
        (
            ["--decoder", "taehv", "--taehv", "a/lighttaew2_1.safetensors"],
            "takes other latents than taehv: use --decoder lighttae",
        ),
        (["--decoder", "lighttae", "--taehv", "taew2_1.pth"], "other latents than lighttae: use --decoder taehv"),
        (
            ["--decoder", "taehv", "--taehv", "taew2_1.pth", "--random-weights", "1"],
            "--random-weights excludes --checkpoint, --wan-folder and --taehv",
        ),
        (["--backend", "onnx"], "unknown backend 'onnx': did you mean 'onnxruntime'?"),
        (["--device", "gpu"], "unknown device 'gpu': did you mean 'cpu'?"),
        (["--device", "cuda:first"], "unknown device 'cuda:first'"),
        (["--device", "cpu", "--precision", "bf16"], "backend 'onnxruntime' does not run bf16: use --precision fp32"),
        (["--random-weights", "1", "--checkpoint", "x.pt"], "--random-weights excludes --checkpoint"),
    ],
)
@pytest.mark.parametrize("program", ["cf-generate", "cf-build"])
def test_options_of_an_engine_wrong_value_names_it_and_the_fix(
    refuses: Refuses, program: str, arguments: list[str], said: str
) -> None:
    assert said in refuses(program, "tiny", *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--total-blocks", "0"], "--total-blocks 0 makes no video: use 1 or more"),
        (["--total-blocks", "-3"], "--total-blocks -3 makes no video"),
        (["--total-blocks", "many"], "--total-blocks 'many' is not valid"),
        (["--endless", "--total-blocks", "3"], "--endless excludes --total-blocks: give one or the other"),
        (["--fps", "0"], "--fps '0' is not valid: Input should be greater than or equal to 1"),
        (["--fps", "100000"], "--fps '100000' is not valid: Input should be less than or equal to 240"),
        (["--seed", "-1"], "--seed -1 is out of range: use a number from 0 to 18446744073709551615"),
        (["--seed", str(2**64)], f"--seed {2**64} is out of range"),
        (["--seed", "lucky"], "--seed 'lucky' is not valid"),
        (["--image-fit", "squeeze"], "unknown image fit 'squeeze': "),
    ],
)
def test_options_of_a_clip_wrong_value_names_it_and_the_fix(refuses: Refuses, arguments: list[str], said: str) -> None:
    assert said in refuses("cf-generate", "tiny", *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--backend", "cuda"],
            "backend 'cuda' needs a CUDA GPU and torch sees none: use --backend onnxruntime",
        ),
        (["--backend", "tensorrt"], "backend 'tensorrt' is not installed: pip install tensorrt"),
        (["--backend", "torch", "--device", "cuda:7"], "needs a CUDA GPU and torch sees none: use --device cpu"),
    ],
)
@pytest.mark.parametrize("program", ["cf-generate", "cf-build"])
def test_backend_that_cannot_serve_is_an_environment_fault(
    refuses: Refuses, monkeypatch: pytest.MonkeyPatch, program: str, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert said in refuses(program, "tiny", *arguments, code=3)


@pytest.mark.parametrize(
    ("hidden", "arguments", "said"),
    [
        (
            ("torch", "onnxruntime"),
            [],
            "no usable backend for cpu: got none of tensorrt, tensorrt-rtx, cuda, onnxruntime, torch; ins",
        ),
        (("onnxruntime",), ["--backend", "onnxruntime"], "backend 'onnxruntime' is not installed: pip install onnxrun"),
    ],
)
def test_backend_not_installed_says_what_to_install(
    refuses: Refuses, monkeypatch: pytest.MonkeyPatch, hidden: tuple[str, ...], arguments: list[str], said: str
) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in hidden else find_spec(name))
    assert said in refuses("cf-generate", "tiny", *ASK, *arguments, code=3)


@pytest.mark.parametrize(
    ("processes", "said"),
    [
        ("4", "WORLD_SIZE is set, as by torchrun, but RANK is not: use torchrun, or unset WORLD_SIZE"),
        ("several", "WORLD_SIZE is 'several', expected a number of processes: unset WORLD_SIZE"),
        ("-1", "WORLD_SIZE is '-1'"),
    ],
)
def test_half_of_a_launcher_is_refused_in_a_line(
    refuses: Refuses, monkeypatch: pytest.MonkeyPatch, processes: str, said: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    assert said in refuses("cf-generate", "tiny", *ASK)


def test_options_wrong_are_refused_before_torch_is_loaded(refuses: Refuses) -> None:
    started_s = time.monotonic()
    refuses("cf-generate", "tiny", "--promt", "x", alone=True)
    refuses("cf-generate", "tiny", "--pixel-height", "40", alone=True)
    refuses("cf-build", "tiny", "--backend", "tensorrt", code=3, alone=True)
    assert time.monotonic() - started_s < 15  # 1 s on an idle machine
