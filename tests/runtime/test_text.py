"""Prompts to token ids."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from causal_forcing.build_engines.tiny_tokenizer import write_byte_tokenizer
from causal_forcing.runtime.errors import CheckpointError, PromptError, WeightsMissingError
from causal_forcing.runtime.model_spec import TINY
from causal_forcing.runtime.text import Tokenizer, clean_prompt, read_prompt


def golden_case(golden: Path) -> dict[str, Any]:
    manifest = json.loads((golden / "manifest.json").read_text())
    if "text_prompts" not in manifest["cases"]:
        pytest.skip("the manifest has no case text_prompts")
    case: dict[str, Any] = manifest["cases"]["text_prompts"]
    return case


def golden_tokenizer(golden: Path) -> Path:
    return (golden / "wan_models/Wan2.1-T2V-1.3B/google/umt5-xxl/tokenizer.json").parent


@pytest.fixture
def byte_folder(tmp_path: Path) -> Path:
    write_byte_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


# --- cleaning -------------------------------------------------------------------------------------------------------


def test_clean_prompt_golden_examples(golden: Path) -> None:
    case = golden_case(golden)
    assert {text: clean_prompt(text) for text in case["clean_examples"]} == case["clean_examples"]
    assert [clean_prompt(text) for text in case["texts"]] == case["cleaned"]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    # Angle brackets keep ftfy from resolving entities itself.
    [("<a> &amp;amp; b", "<a> & b"), ("<a> &amp;amp;amp; b", "<a> &amp; b"), ("<a>\u2003\n b&nbsp;", "<a> b")],
)
def test_clean_prompt_entities_are_resolved_exactly_twice(text: str, cleaned: str) -> None:
    assert clean_prompt(text) == cleaned


# --- tokenizing -----------------------------------------------------------------------------------------------------


def test_tokenizer_golden_ids_are_upstreams(golden: Path) -> None:
    case = golden_case(golden)
    expected = load_file(golden / case["file"])
    tokenizer = Tokenizer(golden_tokenizer(golden), length=case["seq_len"], pad_id=0)
    got = tokenizer.encode(case["texts"])
    assert got.token_ids.dtype == got.token_mask.dtype == np.int64
    np.testing.assert_array_equal(got.token_ids, expected["input_ids"])
    np.testing.assert_array_equal(got.token_mask, expected["attention_mask"])
    assert got.dropped[:-1] == ("",) * (len(case["texts"]) - 1)
    assert got.dropped[-1] != ""


@pytest.mark.parametrize("length", [4, 9, 160])
def test_tokenizer_equals_transformers(golden: Path, length: int) -> None:
    from transformers import AutoTokenizer

    folder = golden_tokenizer(golden)
    prompts = ["a cat walks on the street", "", "red blue " * 20, "日本語 and the dog"]
    theirs = AutoTokenizer.from_pretrained(folder)(
        [clean_prompt(prompt) for prompt in prompts],
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="np",
    )
    ours = Tokenizer(folder, length=length, pad_id=0).encode(prompts)
    np.testing.assert_array_equal(ours.token_ids, theirs["input_ids"])
    np.testing.assert_array_equal(ours.token_mask, theirs["attention_mask"])


def test_tokenizer_what_was_cut_is_told(golden: Path) -> None:
    text = "a cat walks on the street"
    tokenizer = Tokenizer(golden_tokenizer(golden), length=5, pad_id=0)
    whole = Tokenizer(golden_tokenizer(golden), length=50, pad_id=0)
    got = tokenizer.encode([f"  {text} "])
    kept = text.removesuffix(got.dropped[0]).strip()
    assert got.dropped[0]
    assert f"{kept} {got.dropped[0]}" == text
    assert got.token_ids[0].tolist() == whole.encode([kept]).token_ids[0, :5].tolist()
    assert got.token_ids[0, -1] == 1


def test_tokenizer_exact_fit_drops_nothing(byte_folder: Path) -> None:
    assert Tokenizer(byte_folder, length=4, pad_id=0).encode(["abc"]).dropped == ("",)
    assert Tokenizer(byte_folder, length=4, pad_id=0).encode(["abcd"]).dropped == ("d",)


def test_tokenizer_cut_inside_a_character_drops_all_of_it(byte_folder: Path) -> None:
    assert Tokenizer(byte_folder, length=4, pad_id=0).encode(["abéd"]).dropped == ("éd",)


def test_tokenizer_without_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissingError, match=r"no tokenizer at .*tokenizer\.json"):
        Tokenizer(tmp_path, length=8, pad_id=0)


def test_tokenizer_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged or no tokenizer"):
        Tokenizer(tmp_path, length=8, pad_id=0)


# --- the byte tokenizer of `tiny` -------------------------------------------------------------------------------------


def test_byte_tokenizer_id_is_three_plus_byte(byte_folder: Path) -> None:
    tokenizer = Tokenizer(byte_folder, length=16, pad_id=0)
    text = "fox 狐 é~"
    expected = [3 + byte for byte in text.encode()]
    got = tokenizer.encode([text])
    assert got.token_ids[0, : len(expected) + 1].tolist() == [*expected, 1]
    assert got.token_ids[0, len(expected) + 1 :].tolist() == [0] * (15 - len(expected))
    assert got.token_mask[0].sum() == len(expected) + 1
    assert tokenizer.vocab_size == TINY.text.vocab_size == 259


def test_byte_tokenizer_file_is_deterministic(byte_folder: Path, tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (byte_folder / "tokenizer.json").read_bytes()


def test_byte_tokenizer_is_reversible(byte_folder: Path) -> None:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(byte_folder / "tokenizer.json"))
    text = "naïve — 東京\x7f"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == text


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a red fox", "x" * 5000, "day / night, 16:9", "reads notes. In snow", "fox"])
def test_read_prompt_text_is_itself(text: str) -> None:
    assert read_prompt(f" {text}\n") == text


def test_read_prompt_file_gives_its_first_line_with_text(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbf\r\n  \r\n a fox \r\nsecond\r\n")
    assert read_prompt(str(path)) == "a fox"


def test_read_prompt_file_of_any_name_wins_over_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a fox").write_text("a wolf")
    assert read_prompt("a fox") == "a wolf"


@pytest.mark.parametrize("name", ["absent.txt", "my prompts.MD", "p.prompt", "prompts/fox"])
def test_read_prompt_path_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(PromptError, match=f"prompt file '{name}' does not exist"):
        read_prompt(name)


def test_read_prompt_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="is a folder"):
        read_prompt(str(tmp_path))


@pytest.mark.parametrize("text", ["", "  \n", "&nbsp;", "\u3000"])
def test_read_prompt_blank_is_refused(text: str) -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        read_prompt(text)


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "is empty"), (b"\n \n", "is empty"), (b"\xff\xd8\xff", "not UTF-8")]
)
def test_read_prompt_unfit_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    with pytest.raises(PromptError, match=words) as caught:
        read_prompt(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_prompt_bytes_of_the_command_line_that_are_no_text_are_refused() -> None:
    with pytest.raises(PromptError, match="not valid Unicode"):
        read_prompt("a f\udcffox")


# --- layering -------------------------------------------------------------------------------------------------------


def test_text_module_loads_no_framework() -> None:
    code = "import sys, causal_forcing.runtime.text; print({'torch', 'transformers', 'tokenizers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
