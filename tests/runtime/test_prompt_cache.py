"""Prompt embeddings on disk: read back bit for bit or not at all, and no text encoder where one is known."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from causal_forcing.runtime.engine import Engine
from causal_forcing.runtime.errors import EngineDamagedError
from causal_forcing.runtime.loading import EngineSet, load_engines
from causal_forcing.runtime.manifest import EngineFile
from causal_forcing.runtime.prompt_cache import PromptCache, PromptNotKept, prompt_key
from causal_forcing.runtime.session import VideoSession

KEY = "0" * 64
PROMPT = "a paper boat on a rainy street"


def random_bits(dtype: torch.dtype = torch.float32, *, tokens: int = 16) -> torch.Tensor:
    """An embedding of any bits: negative zeros, subnormal numbers and NaN with payloads among them."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 256, (1, tokens, 32 * dtype.itemsize), generator=generator, dtype=torch.uint8)
    return numbers.view(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def cache(tmp_path: Path) -> PromptCache:
    return PromptCache(tmp_path / "prompts")


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_embedding_is_read_back_bit_for_bit(dtype: torch.dtype, cache: PromptCache) -> None:
    embedding = random_bits(dtype)
    cache.store(KEY, embedding)
    got = PromptCache(cache.folder).load(KEY, embedding)
    assert got is not None
    assert (got.dtype, got.shape) == (embedding.dtype, embedding.shape)
    assert bits(got) == bits(embedding)
    assert [path.name for path in cache.folder.iterdir()] == [f"{KEY}.safetensors"]


def test_embedding_that_is_not_there_is_none_and_makes_nothing(cache: PromptCache) -> None:
    assert cache.load(KEY, random_bits()) is None
    assert not cache.folder.exists()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b"\xff" * 64),
        _flip,
        lambda path: save_file({"prompt_embeds": random_bits()}, path),
        lambda path: save_file({"other": random_bits()}, path, metadata={"sha256": "0"}),
    ],
    ids=["empty", "truncated", "no safetensors", "a flipped bit", "without a hash", "another tensor"],
)
def test_embedding_that_is_damaged_is_none_and_is_written_anew(
    spoil: Callable[[Path], object], cache: PromptCache
) -> None:
    embedding = random_bits()
    cache.store(KEY, embedding)
    spoil(cache.folder / f"{KEY}.safetensors")
    assert cache.load(KEY, embedding) is None
    cache.store(KEY, embedding)
    got = cache.load(KEY, embedding)
    assert got is not None
    assert bits(got) == bits(embedding)


def test_embedding_with_any_byte_changed_is_none_or_the_same(cache: PromptCache) -> None:
    embedding = random_bits(tokens=1)
    cache.store(KEY, embedding)
    path = cache.folder / f"{KEY}.safetensors"
    whole = path.read_bytes()
    for position in range(len(whole)):
        for flipped in (1, 0x20, 0x80):
            content = bytearray(whole)
            content[position] ^= flipped
            path.write_bytes(content)
            got = cache.load(KEY, embedding)
            assert got is None or bits(got) == bits(embedding), position


@pytest.mark.parametrize("expected", [random_bits(tokens=15), random_bits(torch.float16)], ids=["shape", "type"])
def test_embedding_of_another_shape_or_type_is_none(expected: torch.Tensor, cache: PromptCache) -> None:
    cache.store(KEY, random_bits())
    assert cache.load(KEY, expected) is None


@pytest.mark.parametrize("where", ["folder", "file"])
def test_cache_that_cannot_be_written_is_a_warning_that_says_what_to_do(where: str, tmp_path: Path) -> None:
    cache = PromptCache(tmp_path / "file" / "prompts")
    if where == "folder":
        (tmp_path / "file").touch()
    else:
        (cache.folder / f"{KEY}.safetensors").mkdir(parents=True)
    assert cache.load(KEY, random_bits()) is None
    with pytest.warns(PromptNotKept, match=r"is not kept in .*prompts \(.*CAUSAL_FORCING_HOME.*--no-prompt-cache"):
        cache.store(KEY, random_bits())
    assert where == "folder" or len(list(cache.folder.iterdir())) == 1, "no partial file is left"


def test_cache_keeps_to_its_size_and_lets_go_what_was_not_used_for_longest(tmp_path: Path) -> None:
    embedding = random_bits()
    probe = PromptCache(tmp_path / "probe")
    probe.store("a", embedding)
    (file,) = probe.folder.iterdir()
    cache = PromptCache(tmp_path / "prompts", max_bytes=3 * file.stat().st_size)
    for age, key in enumerate("abc"):
        cache.store(key, embedding)
        os.utime(cache.folder / f"{key}.safetensors", (age + 1, age + 1))
    assert cache.load("a", embedding) is not None, "use makes it young"
    (cache.folder / ".z.partial-1").write_bytes(b"left by a kill")
    os.utime(cache.folder / ".z.partial-1", (0, 0))
    cache.store("d", embedding)
    assert sorted(path.name[0] for path in cache.folder.iterdir()) == ["a", "c", "d"]


def test_cache_too_small_for_anything_keeps_nothing(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, max_bytes=0)
    cache.store(KEY, random_bits())
    assert not list(tmp_path.iterdir())


# --- keys -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engines(tiny_engine: Path) -> EngineSet:
    return load_engines(tiny_engine, device="cpu")


def test_key_depends_on_the_tokens_and_on_what_encodes_them(
    engines: EngineSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.arange(512).reshape(1, 512)
    config = engines.manifest.config

    def key(**changes: object) -> str:
        manifest = dataclasses.replace(engines.manifest, config=dataclasses.replace(config, **changes))  # type: ignore[arg-type]
        return prompt_key(dataclasses.replace(engines, manifest=manifest), tokens)

    def key_with_file(name: str) -> str:
        files = {**engines.manifest.files, name: EngineFile(sha256="0" * 64, bytes=1)}
        manifest = dataclasses.replace(engines.manifest, files=files)
        return prompt_key(dataclasses.replace(engines, manifest=manifest), tokens)

    first = key()
    keys = [
        first,
        prompt_key(engines, tokens + 1),
        prompt_key(engines, tokens.reshape(2, 256)),
        key(weights="random:1"),
        key(precision="bf16"),
        key(backend="torch"),
        key(backend_version="0"),
        key_with_file("text_encoder.onnx"),
        key_with_file("tokenizer/tokenizer.json"),
    ]
    monkeypatch.setattr("causal_forcing.runtime.prompt_cache.package_version", lambda: "0.0.0")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key_with_file("dit_step.onnx") == key(), "clips of other shapes share an embedding"


# --- sessions -------------------------------------------------------------------------------------------------------


class Loads:
    """Counts what a text encoder loads, and looks which of its engines are alive."""

    def __init__(self, engines: EngineSet) -> None:
        assert engines.text_encoder is not None
        self.count = 0
        self.engines: list[weakref.ref[Engine]] = []
        self._load = engines.text_encoder.load
        engines.text_encoder.load = self

    def __call__(self, name: str) -> Engine:
        self.count += 1
        engine = self._load(name)
        self.engines.append(weakref.ref(engine))
        return engine

    def alive(self) -> int:
        gc.collect()
        return sum(engine() is not None for engine in self.engines)


def latents(session: VideoSession, prompt: str | torch.Tensor = PROMPT) -> torch.Tensor:
    return next(session.generate(prompt, total_blocks=1)).latents


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_prompt_that_is_known_needs_no_text_encoder_and_gives_the_same_bits(
    backend: str, tiny_engine: Path, tiny_torch_engine: Path, cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_engine if backend == "onnxruntime" else tiny_torch_engine
    with VideoSession(load_engines(folder, device="cpu"), prompt_cache=cache) as session:
        assert session.prompt_source is None
        want, embedding = latents(session), session._io["prompt_embeds"].clone()
        assert session.prompt_source == "encoded"
    later = load_engines(folder, device="cpu")
    loads = Loads(later)
    with VideoSession(later, prompt_cache=PromptCache(cache.folder)) as session:
        got = latents(session, f"  {PROMPT.replace(' ', '   ')} ")  # the same when it is cleaned
        assert session.prompt_source == "cached"
        assert bits(session._io["prompt_embeds"]) == bits(embedding)
        assert torch.equal(got, want)
        assert loads.count == 0
        latents(session, "another prompt")
        assert (session.prompt_source, loads.count) == ("encoded", 1)
        latents(session, torch.zeros(1, 512, 32))
        assert session.prompt_source == "given"
    assert len(list(cache.folder.iterdir())) == 2


def test_prompt_that_is_known_needs_no_file_of_the_text_encoder(
    tiny_engine: Path, tmp_path: Path, cache: PromptCache
) -> None:
    folder = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    with VideoSession(load_engines(folder, device="cpu"), prompt_cache=cache) as session:
        want = latents(session)
    (folder / "text_encoder.onnx").unlink()
    with VideoSession(load_engines(folder, device="cpu"), prompt_cache=cache) as session:
        assert torch.equal(latents(session), want)
        with pytest.raises(EngineDamagedError, match=r"text_encoder\.onnx is missing; rebuild it: cf-build tiny"):
            session.generate("another prompt")
    assert len(list(cache.folder.iterdir())) == 1


def test_prompt_whose_embedding_is_damaged_is_encoded_again(tiny_engine: Path, cache: PromptCache) -> None:
    with VideoSession(load_engines(tiny_engine, device="cpu"), prompt_cache=cache) as session:
        want = latents(session)
        (path,) = cache.folder.iterdir()
        whole = path.read_bytes()
        _flip(path)
        assert torch.equal(latents(session), want)
        assert session.prompt_source == "encoded"
    assert path.read_bytes() == whole


def test_session_with_a_cache_that_cannot_be_written_generates(tiny_engine: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = PromptCache(tmp_path / "file" / "prompts")
    with VideoSession(load_engines(tiny_engine, device="cpu"), prompt_cache=cache) as session:
        with pytest.warns(PromptNotKept):
            assert latents(session).isfinite().all()
        assert session.prompt_source == "encoded"


def test_session_without_a_cache_writes_nothing(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAUSAL_FORCING_HOME", str(tmp_path / "home"))
    with warnings.catch_warnings(), VideoSession(load_engines(tiny_engine, device="cpu")) as session:
        warnings.simplefilter("error")
        latents(session)
        latents(session)
        assert session.prompt_source == "encoded"
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(("use", "loaded", "alive"), [("free", 2, 0), ("keep", 1, 1)])
@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_text_encoder_is_let_go_after_a_prompt_or_kept(
    use: str, loaded: int, alive: int, backend: str, tiny_engine: Path, tiny_torch_engine: Path
) -> None:
    folder = tiny_engine if backend == "onnxruntime" else tiny_torch_engine
    engines = load_engines(folder, device="cpu", text_encoder=use)
    loads = Loads(engines)
    with VideoSession(engines) as session:
        assert loads.count == 0, "nothing is loaded before a prompt needs it"
        first = latents(session)
        assert loads.alive() == alive
        latents(session, "another prompt")
        assert (loads.count, loads.alive()) == (loaded, alive)
        if use == "keep":
            assert torch.equal(latents(session), first)
