"""The weight file: every tensor once, whatever asks for it, and what was added is what is read."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from causal_forcing.build_engines.cuda.weight_file import WeightFile


def written(file: WeightFile, folder: Path) -> dict[str, torch.Tensor]:
    file.write(folder)
    return load_file(folder / file.name)


def test_tensor_added_twice_has_one_key(tmp_path: Path) -> None:
    file, tensor = WeightFile("a.safetensors"), torch.randn(3, 4)
    key = file.add([tensor])
    assert file.add([tensor]) == key
    # An exported program hands out new tensor objects over the same memory.
    assert file.add([torch.nn.Parameter(tensor)]) == key
    loaded = written(file, tmp_path)
    assert list(loaded) == [key]
    assert torch.equal(loaded[key], tensor)


def test_same_numbers_in_other_memory_are_written_once(tmp_path: Path) -> None:
    """A rewrite of each network, such as to e4m3 at a common scale, makes tensors of its own."""
    file, parts = WeightFile("a.safetensors"), [torch.randn(3, 4).to(torch.float8_e4m3fn), torch.zeros(2, 4)]
    key = file.add([part.float() for part in parts])
    assert file.add([part.float() for part in parts]) == key
    assert list(written(file, tmp_path)) == [key]


def test_same_bytes_of_another_type_or_shape_are_another_tensor(tmp_path: Path) -> None:
    file, tensor = WeightFile("a.safetensors"), torch.zeros(4, 2)
    keys = {file.add([other]) for other in (tensor, torch.zeros(2, 4), torch.zeros(4, 2, dtype=torch.int32))}
    assert written(file, tmp_path).keys() == keys
    assert len(keys) == 3


def test_parts_are_joined_along_their_first_axis_and_differ_from_each_alone(tmp_path: Path) -> None:
    file, parts = WeightFile("a.safetensors"), [torch.randn(rows, 4) for rows in (2, 3, 1)]
    whole, again, one, turned = file.add(parts), file.add(list(parts)), file.add(parts[:1]), file.add(parts[::-1])
    assert whole == again
    loaded = written(file, tmp_path)
    assert len(loaded) == len({whole, one, turned}) == 3
    assert torch.equal(loaded[whole], torch.cat(parts))
    assert torch.equal(loaded[turned], torch.cat(parts[::-1]))
    assert torch.equal(loaded[one], parts[0])


def test_views_of_one_memory_are_told_apart_and_written_apart(tmp_path: Path) -> None:
    file, base = WeightFile("a.safetensors"), torch.arange(12.0).reshape(3, 4)
    views = [base, base[:2], base.t(), base.reshape(4, 3), base[1:], base.view(torch.int32)]
    keys = [file.add([view]) for view in views]
    assert len(set(keys)) == len(views)
    loaded = written(file, tmp_path)
    for key, view in zip(keys, views, strict=True):
        assert torch.equal(loaded[key], view)
        assert loaded[key].is_contiguous()


def test_source_is_kept_so_that_no_other_tensor_takes_its_place(tmp_path: Path) -> None:
    """A tensor that a network made for its graph may be let go before the next one is traced."""
    file, values = WeightFile("a.safetensors"), []
    for value in range(50):
        parts = [torch.full((64,), float(value)), torch.full((64,), -float(value))]
        values.append((file.add(parts), value))
        del parts
    loaded = written(file, tmp_path)
    assert len(loaded) == 50
    for key, value in values:
        assert torch.equal(loaded[key][:64], torch.full((64,), float(value)))


def test_parameter_keeps_its_type_and_loses_its_gradient(tmp_path: Path) -> None:
    file = WeightFile("a.safetensors")
    given = [torch.nn.Parameter(torch.randn(4).to(dtype)) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    given += [torch.tensor(3, dtype=torch.int64), torch.randn(4).to(torch.float8_e4m3fn)]  # type: ignore[list-item]
    keys = [file.add([tensor]) for tensor in given]
    loaded = written(file, tmp_path)
    for key, tensor in zip(keys, given, strict=True):
        assert (loaded[key].dtype, loaded[key].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(loaded[key].float(), tensor.detach().float())
