"""Functions of a Python file that the model may call: offered as schemas, called only if the user agrees."""

from __future__ import annotations

import inspect
import json
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_mtp.chat.conversation import Message, ToolCall
from mlx_mtp.errors import RequestError

REFUSED = "The user refused this call."


@dataclass(frozen=True)
class Toolbox:
    """Functions by name, and their JSON schemas as chat templates take them."""

    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    schemas: Sequence[dict[str, Any]] = ()

    @staticmethod
    def load(path: Path) -> Toolbox:
        """The public functions that a file defines. Raises RequestError if it cannot be run or described."""
        from transformers.utils.chat_template_utils import get_json_schema  # takes a second

        try:
            names = runpy.run_path(str(path), run_name=path.stem)
        except (Exception, SystemExit) as error:  # a user's file may raise anything
            raise RequestError(f"the tools file {path} cannot be run ({_shown(error)}): fix it or name another"
                               ) from error
        found = {name: value for name, value in names.items()
                 if inspect.isfunction(value) and value.__module__ == path.stem and not name.startswith("_")}
        if not found:
            raise RequestError(f"the tools file {path} defines no function: expected some with type hints and a "
                               "docstring")
        try:
            return Toolbox(found, [get_json_schema(function) for function in found.values()])
        except Exception as error:  # transformers' own types of errors are no part of its interface
            raise RequestError(f"a function of {path} cannot be offered ({_shown(error)}): give each argument a type "
                               "hint and a line under Args: in the docstring") from error

    def call(self, call: ToolCall) -> Message:
        """Runs a call; what it returns, or raises, is text for the model."""
        function = self.functions.get(call.name)
        if function is None:
            return result(call, f"Error: there is no function {call.name}.")
        try:
            value = function(**call.arguments)
            return result(call, value if isinstance(value, str) else _json(value))
        except (Exception, SystemExit) as error:  # whatever it is, the model has to hear of it
            return result(call, f"Error: {_shown(error)}")


def result(call: ToolCall, content: str) -> Message:
    """What the model is told of a call."""
    printable = content.encode("utf-8", "replace").decode("utf-8")  # a tool may return what no UTF-8 can hold
    return Message("tool", printable, name=call.name, tool_call_id=call.id)


def parse(text: str, before: int) -> list[ToolCall]:
    """The calls in what the model wrote between its markers. before: how many calls the turn had already.

    Raises RequestError for what is no call.
    """
    from mlx_lm.tool_parsers.gemma4 import parse_tool_call  # imports transformers; by now it is loaded

    try:
        parsed = parse_tool_call(text)
    except ValueError as error:
        raise RequestError(f"the model's tool call cannot be read ({text.strip()!r}): nothing was called") from error
    calls = parsed if isinstance(parsed, list) else [parsed]
    return [ToolCall(f"call_{before + i}", call["name"], call["arguments"]) for i, call in enumerate(calls)]


def shown(call: ToolCall) -> str:
    """A call as Python would write it."""
    return f"{call.name}({', '.join(f'{name}={value!r}' for name, value in call.arguments.items())})"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _shown(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
