"""What `causal_forcing.plugins` uses of TensorRT's quick plugins, after the package in the bindings 11.4."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from tensorrt import DataType

_Function = TypeVar("_Function", bound=Callable[..., Any])

class Shape:
    @property
    def is_dynamic(self) -> bool: ...
    def __getitem__(self, index: int) -> int: ...
    def __iter__(self) -> Iterator[int]: ...

class TensorDesc:
    @property
    def dtype(self) -> DataType: ...
    @property
    def shape(self) -> Shape: ...
    def like(self) -> TensorDesc: ...
    def aliased(self) -> TensorDesc: ...

class SymExprs:
    def __init__(self, length: int) -> None: ...

class SymIntExprs(SymExprs): ...

class KernelLaunchParams:
    def __init__(
        self,
        grid_x: int = 1,
        grid_y: int = 1,
        grid_z: int = 1,
        block_x: int = 1,
        block_y: int = 1,
        block_z: int = 1,
        shared_mem: int = 0,
    ) -> None: ...

def register(plugin_id: str, lazy_register: bool = False) -> Callable[[_Function], _Function]: ...
def aot_impl(plugin_id: str) -> Callable[[_Function], _Function]: ...
