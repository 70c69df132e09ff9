"""What was said: turns, what the model gets to see of them, and the file that keeps them.

A turn is a user's message and all that answers it: thoughts, tool calls, what the tools gave, the answer.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_mtp.errors import RequestError

FORMAT = "mlx_mtp.chat/1"
ROLES = ("user", "assistant", "tool")
JsonObject = dict[str, Any]


@dataclass(frozen=True)
class ToolCall:
    """A function that the model asks for. id: what the result refers to."""

    id: str
    name: str
    arguments: JsonObject


@dataclass(frozen=True)
class Message:
    """One message. thinking, tool_calls, is_interrupted: an assistant's; name, tool_call_id: a tool result's."""

    role: str
    content: str
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    is_interrupted: bool = False
    name: str = ""
    tool_call_id: str = ""

    def for_template(self, is_current: bool) -> JsonObject:
        """As chat templates expect it. Thoughts go only with the tool calls of the turn that is going on."""
        shown: JsonObject = {"role": self.role, "content": self.content}
        if self.role == "tool":
            shown |= {"name": self.name, "tool_call_id": self.tool_call_id}
        if self.tool_calls:
            shown["tool_calls"] = [{"id": call.id, "type": "function",
                                    "function": {"name": call.name, "arguments": call.arguments}}
                                   for call in self.tool_calls]
            if self.thinking and is_current:
                shown["reasoning"] = self.thinking
        return shown

    def to_json(self) -> JsonObject:
        """Its fields, without those that say nothing."""
        return {name: value for name, value in asdict(self).items() if value or name in ("role", "content")}


@dataclass
class Conversation:
    """Messages in order, and the system prompt before them.

    left_out: the oldest turns that the context did not hold any more; they stay here and the model does not see them.
    """

    messages: list[Message] = field(default_factory=list)
    system: str | None = None
    left_out: int = 0
    model: str | None = None

    @property
    def turns(self) -> list[int]:
        """Where each turn begins among the messages."""
        return [i for i, message in enumerate(self.messages) if message.role == "user"]

    @property
    def question(self) -> str | None:
        """The user's last message."""
        return self.messages[self.turns[-1]].content if self.turns else None

    @property
    def is_unanswered(self) -> bool:
        return bool(self.messages) and self.messages[-1].role == "user"

    def visible(self) -> list[JsonObject]:
        """What the model gets to see, for the chat template."""
        starts = self.turns
        first = starts[self.left_out] if self.left_out < len(starts) else len(self.messages)
        newest = starts[-1] if starts else 0
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [message.for_template(i > newest) for i, message in enumerate(self.messages) if i >= first]

    def take_back(self) -> str:
        """Removes the last turn and returns what the user had said. Raises RequestError if there is none."""
        if not self.turns:
            raise RequestError("there is no turn yet: say something first")
        question = self.question
        assert question is not None
        del self.messages[self.turns[-1] :]
        self.left_out = min(self.left_out, max(len(self.turns) - 1, 0))
        return question

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all. Raises RequestError if that cannot be done."""
        content = {"format": FORMAT, "model": self.model, "system": self.system, "left_out": self.left_out,
                   "messages": [message.to_json() for message in self.messages]}
        write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @staticmethod
    def load(path: Path) -> Conversation:
        """Raises RequestError for a file that cannot be read or holds no conversation."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RequestError(f"{path} cannot be read ({error.strerror}): name a file written by /save") from error
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path} is not JSON ({error}): name a file written by /save") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT or not isinstance(raw.get("messages"), list):
            raise RequestError(f"{path} holds no conversation in the form {FORMAT}: name a file written by /save")
        try:
            messages = [_message(one) for one in raw["messages"]]
            system, left_out, model = raw.get("system"), raw.get("left_out", 0), raw.get("model")
            if not (isinstance(system, str | None) and isinstance(model, str | None) and isinstance(left_out, int)):
                raise TypeError("system, left_out or model has another type")
            if messages and messages[0].role != "user":
                raise TypeError("the first message is not the user's")
        except (TypeError, KeyError) as error:
            raise RequestError(f"{path} holds a broken conversation ({error}): fix it, or name another file"
                               ) from error
        conversation = Conversation(messages, system, 0, model)
        conversation.left_out = max(0, min(left_out, len(conversation.turns) - 1))
        return conversation

    def markdown(self) -> str:
        """The conversation to be read: a heading for each message, thoughts folded, tool calls as code."""
        parts = [] if self.system is None else [f"## System\n\n{self.system}"]
        for message in self.messages:
            parts.append(_HEADINGS[message.role] + (f" ({message.name})" if message.name else ""))
            if message.thinking:
                parts.append(f"<details><summary>Thoughts</summary>\n\n{message.thinking}\n\n</details>")
            if message.content:
                parts.append(message.content)
            parts += [f"```json\n{json.dumps({call.name: call.arguments}, ensure_ascii=False)}\n```"
                      for call in message.tool_calls]
            if message.is_interrupted:
                parts.append("*(interrupted)*")
        return "\n\n".join(parts) + "\n"


_HEADINGS = {"user": "## User", "assistant": "## Assistant", "tool": "## Tool"}


def write_whole(path: Path, text: str) -> None:
    """Replaces a file at once, so that a kill or a full disk leaves the old one. Raises RequestError on failure."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            # What no UTF-8 can hold, half of a surrogate pair, is written as JSON escapes it.
            with open(file, "w", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(file)
            os.replace(name, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name)
            raise
    except OSError as error:
        raise RequestError(f"{path} cannot be written ({error.strerror}): fix that, or /save to another place"
                           ) from error


def _message(raw: JsonObject) -> Message:
    """Raises TypeError or KeyError for what is no message."""
    if not isinstance(raw, dict) or raw["role"] not in ROLES or not isinstance(raw["content"], str):
        raise TypeError("a message has another role than user, assistant or tool, or no text")
    calls = tuple(_call(call) for call in raw.get("tool_calls", ()))
    return Message(**(raw | {"tool_calls": calls}))


def _call(raw: JsonObject) -> ToolCall:
    call = ToolCall(**raw)
    if not (isinstance(call.id, str) and isinstance(call.name, str) and isinstance(call.arguments, dict)):
        raise TypeError("a tool call has no id, name and arguments")
    return call


def newest(folder: Path) -> Path:
    """The conversation that was written last. Raises RequestError if there is none."""
    files: Sequence[Path] = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    if not files:
        raise RequestError(f"there is no conversation in {folder} to go on with: begin one without --resume")
    return files[-1]
