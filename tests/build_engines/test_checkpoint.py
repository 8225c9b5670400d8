"""Reading, verifying and loading state dicts."""

from __future__ import annotations

import argparse
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from causal_forcing.build_engines.checkpoint import (
    StateDict,
    StateDictMismatchError,
    load_into,
    read_state_dict,
    verify_state_dict,
)
from causal_forcing.runtime.errors import CheckpointError


def state_of(tensors: dict[str, torch.Tensor]) -> StateDict:
    return StateDict(tensors=tensors, source=Path("a.pt"), weight_set="plain")


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def linear() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(3, 2, generator=generator),
        "bias": torch.randn(3, generator=generator),
    }


class Bomb:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


# --- golden files ---------------------------------------------------------------------------------------------------


def test_read_state_dict_golden_generator_equals_the_plain_weights(golden: Path) -> None:
    state = read_state_dict((golden / "dit_b.checkpoint.pt"), use_ema=False)
    expected = load_file(golden / "dit_b.weights.safetensors")
    assert state.weight_set == "generator"
    assert set(state.tensors) == {name.removeprefix("model.") for name in expected}
    for name, tensor in expected.items():
        assert torch.equal(state.tensors[name.removeprefix("model.")], tensor), name


def test_read_state_dict_golden_ema_is_the_other_set_under_the_same_names(golden: Path) -> None:
    path = golden / "dit_b.checkpoint.pt"
    plain, ema = read_state_dict(path, use_ema=False), read_state_dict(path, use_ema=True)
    assert ema.weight_set == "generator_ema"
    assert set(ema.tensors) == set(plain.tensors)
    for name, tensor in ema.tensors.items():
        # The fixture's EMA values are 1.01 times the plain ones, rounded to bf16.
        expected = (1.01 * plain.tensors[name].float()).bfloat16()
        torch.testing.assert_close(tensor.float(), expected.float(), rtol=2**-7, atol=1e-6)
        assert not torch.equal(tensor.float(), plain.tensors[name].float()) or not tensor.any(), name


def test_read_state_dict_golden_safetensors_is_read_with_the_prefix_removed(golden: Path) -> None:
    state = read_state_dict((golden / "dit_b.weights.safetensors"), use_ema=True)
    assert state.weight_set == "plain"
    assert "patch_embedding.weight" in state.tensors


# --- containers and names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "use_ema", "taken"),
    [
        (("generator", "generator_ema"), None, "generator"),
        (("generator", "generator_ema"), False, "generator"),
        (("generator", "generator_ema"), True, "generator_ema"),
        (("generator_ema",), False, "generator_ema"),
        (("generator",), True, "generator"),
    ],
)
def test_read_state_dict_container_takes_the_wanted_set_or_says_which_other(
    tmp_path: Path, held: tuple[str, ...], use_ema: bool | None, taken: str
) -> None:
    values = {"generator": 1.0, "generator_ema": 2.0}
    content: dict[str, object] = {key: {"model.a": torch.full((2,), values[key])} for key in held}
    content |= {"critic": {"model.a": torch.zeros(2)}, "step": 7}
    state = read_state_dict(saved(tmp_path / "c.pt", content), use_ema=use_ema)
    assert state.weight_set == taken
    assert state.tensors["a"].tolist() == [values[taken]] * 2


@pytest.mark.parametrize(
    "name",
    [
        "a.weight",
        "model.a.weight",
        "net.a.weight",
        "module.model.a.weight",
        "model._fsdp_wrapped_module.a.weight",
        "model.a._fsdp_wrapped_module._checkpoint_wrapped_module.weight",
        "_orig_mod.a.weight",
    ],
)
def test_read_state_dict_prefixes_are_removed(tmp_path: Path, name: str) -> None:
    assert list(read_state_dict(saved(tmp_path / "c.pt", {name: torch.ones(1)})).tensors) == ["a.weight"]


def test_read_state_dict_name_inside_is_kept(tmp_path: Path) -> None:
    names = ["encoder.model.weight", "model_scale", "modulation"]
    state = read_state_dict(saved(tmp_path / "c.pt", {name: torch.ones(1) for name in names}))
    assert list(state.tensors) == names


def test_read_state_dict_names_that_collapse_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pt", {"model.a": torch.ones(1), "net.a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"'model\.a' and 'net\.a' both name 'a'"):
        read_state_dict(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_read_state_dict_both_torch_formats_are_read(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "c.pth"
    torch.save({"a": torch.arange(3.0)}, path, _use_new_zipfile_serialization=zipped)
    assert read_state_dict(path).tensors["a"].tolist() == [0, 1, 2]


# --- refusals -------------------------------------------------------------------------------------------------------


def truncated(path: Path) -> Path:
    saved(path, {"a": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "absent.pt", "does not exist"),
        (lambda folder: folder / "absent.safetensors", "does not exist"),
        (lambda folder: folder, "is not a checkpoint"),
        (lambda folder: written(folder / "a.pt", b""), "is empty"),
        (lambda folder: written(folder / "a.safetensors", b""), "is empty"),
        (lambda folder: written(folder / "a.pt", b"hello, this is text"), "is not a checkpoint"),
        (lambda folder: written(folder / "a.pt", b"<html>404</html>"), "is not a checkpoint"),
        (lambda folder: written(folder / "a.safetensors", b"<html>404</html>"), "no safetensors file"),
        (lambda folder: written(folder / "a.ckpt", b"x"), "'.ckpt', expected .pt, .pth, .safetensors"),
        (lambda folder: truncated(folder / "a.pt"), "damaged or truncated"),
        (lambda folder: saved(folder / "a.pt", {"step": 1}), "no tensors"),
        (lambda folder: saved(folder / "a.pt", {"generator": {"step": 1}}), "no tensors"),
        (lambda folder: saved(folder / "a.pt", [torch.ones(1)]), "holds a list"),
        (lambda folder: saved(folder / "a.pt", argparse.Namespace(a=1)), r"Python code \(argparse\.Namespace\)"),
    ],
)
def test_read_state_dict_unfit_file_is_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], Path], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        read_state_dict(make(tmp_path))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_read_state_dict_truncated_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        read_state_dict(path)


@pytest.mark.parametrize("plain_pickle", [True, False])
def test_read_state_dict_code_is_not_run(tmp_path: Path, plain_pickle: bool) -> None:
    mark, path = tmp_path / "ran", tmp_path / "a.pt"
    if plain_pickle:
        path.write_bytes(pickle.dumps({"a": Bomb(mark)}))
    else:
        torch.save({"a": Bomb(mark)}, path)
    with pytest.raises(CheckpointError, match=r"contain(s)? Python code.*was not run"):
        read_state_dict(path)
    assert not mark.exists()


# --- verification ---------------------------------------------------------------------------------------------------


def test_verify_state_dict_matching_passes() -> None:
    verify_state_dict(state_of(linear()), torch.nn.Linear(2, 3), what="a layer")
    verify_state_dict(state_of(linear()), {"weight": (3, 2), "bias": (3,)}, what="a layer")


def test_verify_state_dict_names_every_difference() -> None:
    tensors = {
        "a": torch.ones(2),
        "b": torch.ones(2, 3),
        "c": torch.tensor([1.0, float("nan")]),
        "d": torch.tensor([float("inf")], dtype=torch.bfloat16),
        "more": torch.ones(1),
    }
    expected = {"a": (2,), "b": (3, 2), "c": (2,), "d": (1,), "gone.1": (1,), "gone.2": (1,)}
    with pytest.raises(StateDictMismatchError) as caught:
        verify_state_dict(state_of(tensors), expected, what="the DiT")
    assert caught.value.problems == (
        "missing: gone.1",
        "missing: gone.2",
        "extra: more",
        "misshapen: b (got [2, 3], expected [3, 2])",
        "non-finite: c",
        "non-finite: d",
    )
    message = str(caught.value)
    assert "a.pt does not fit the DiT: got 5 tensors for 6: 2 missing (gone.1, gone.2), 1 extra (more)" in message
    assert "\n" not in message


def test_verify_state_dict_message_stays_short_and_problems_complete() -> None:
    with pytest.raises(StateDictMismatchError, match=r"50 missing \(w0, w1, w2, …\) \(all names: --debug\)") as caught:
        verify_state_dict(state_of({}), {f"w{index}": (1,) for index in range(50)}, what="x")
    assert len(caught.value.problems) == 50
    assert "missing: w49" in "".join(traceback.format_exception(caught.value))  # what --debug shows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_verify_state_dict_last_element_of_a_large_tensor_is_looked_at(dtype: torch.dtype) -> None:
    tensor = torch.zeros((1 << 22) + 5).to(dtype)
    verify_state_dict(state_of({"a": tensor}), {"a": tuple(tensor.shape)}, what="x")
    tensor[-1] = torch.tensor(float("nan")).to(dtype)
    with pytest.raises(StateDictMismatchError, match="1 non-finite"):
        verify_state_dict(state_of({"a": tensor}), {"a": tuple(tensor.shape)}, what="x")


# --- loading --------------------------------------------------------------------------------------------------------


def test_load_into_meta_module_is_filled_converted_and_frozen() -> None:
    with torch.device("meta"):
        module = torch.nn.Linear(2, 3)
    load_into(module, state_of(linear()), dtype=torch.bfloat16)
    assert torch.equal(module.weight, linear()["weight"].bfloat16())
    assert module.weight.device.type == "cpu"
    assert not module.weight.requires_grad
    assert not module.training


def test_load_into_renames() -> None:
    module = torch.nn.Linear(2, 3)
    state = state_of({"w": linear()["weight"], "b": linear()["bias"]})
    load_into(module, state, dtype=torch.float32, names={"w": "weight", "b": "bias"})
    assert torch.equal(module.bias, linear()["bias"])


def test_load_into_misfit_names_the_files_tensor_and_leaves_the_module() -> None:
    module = torch.nn.Linear(2, 3)
    before = module.weight.clone()
    state = state_of({"w": torch.ones(2, 2), "b": torch.ones(3)})
    with pytest.raises(StateDictMismatchError, match=r"the head: .*w \(got \[2, 2\], expected \[3, 2\]\)"):
        load_into(module, state, dtype=torch.float32, what="the head", names={"w": "weight", "b": "bias"})
    assert torch.equal(module.weight, before)


# --- digest ---------------------------------------------------------------------------------------------------------
