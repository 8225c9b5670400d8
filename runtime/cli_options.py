"""Command-line options made from configuration classes: names, types, defaults and help stand there and only there."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from causal_forcing.runtime.engine_options import EngineOptions

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Device = Annotated[str, typer.Option("--device", help="Device to run on: auto, cpu, cuda or cuda:N.")]


def field_help(config: type) -> dict[str, str]:
    """Return the docstring under each field of a configuration class, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(definition, ast.ClassDef), f"{config} is a class"
    texts: dict[str, str] = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                texts[statement.target.id] = " ".join(text.value.split())
    return texts


def takes_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the fields of `EngineOptions` as options, and hand it the object in their place."""
    hints, texts = get_type_hints(EngineOptions), field_help(EngineOptions)
    parameters = []
    for field in dataclasses.fields(EngineOptions):
        spelling = f"--{field.name.replace('_', '-')}"
        option: Any = typer.Option(spelling, help=texts[field.name])
        if field.name == "slug":
            option = typer.Argument(metavar="SLUG", help=texts[field.name])
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[hints[field.name], option],
            )
        )
    own_hints = get_type_hints(command, include_extras=True)
    _, *own = inspect.signature(command).parameters.values()
    parameters += [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own_hints[parameter.name])
        for parameter in own
    ]

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> None:
        given = {field.name: arguments.pop(field.name) for field in dataclasses.fields(EngineOptions)}
        command(EngineOptions(**given), **arguments)

    del wrapper.__wrapped__
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(wrapper)["__signature__"] = inspect.Signature(parameters)
    return wrapper
