"""What begins with a slash."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_mtp.chat import figures, settings
from mlx_mtp.chat.conversation import Conversation, write_whole
from mlx_mtp.chat.tools import Toolbox
from mlx_mtp.errors import RequestError

if TYPE_CHECKING:
    from mlx_mtp.chat.chat import Chat

KEYS = """Enter sends; Alt-Enter or Ctrl-J begins a new line; what is pasted may have many lines; Ctrl-R searches what
was typed before. Ctrl-C stops an answer and keeps what came; Ctrl-D leaves. A message that begins with a slash is
sent with a space before it. Where there is no terminal, a line is a message, or all lines between two \"\"\"."""


@dataclass(frozen=True)
class Command:
    """arguments: as /help shows them; a command without them takes none."""

    arguments: str
    help: str
    run: Callable[[Chat, str], None]


def run(chat: Chat, line: str) -> None:
    """Runs a line that begins with a slash. Raises RequestError for what cannot be done."""
    name, argument = [*line.split(None, 1), ""][:2]
    command = COMMANDS.get(name)
    if command is None:
        likely = difflib.get_close_matches(name, COMMANDS, 1)
        raise RequestError(f"there is no command {short(name)}; " + (f"did you mean {likely[0]}? " if likely else "")
                           + "/help lists them (put a space before a message that begins with a slash)")
    argument = argument.strip()
    if argument and not command.arguments:
        raise RequestError(f"{name} takes nothing after it; got {argument!r}")
    command.run(chat, argument)


def _help(chat: Chat, _: str) -> None:
    width = max(len(f"{name} {command.arguments}") for name, command in COMMANDS.items())
    lines = [f"{f'{name} {command.arguments}':{width}}  {command.help}" for name, command in COMMANDS.items()]
    chat.view.show("\n".join([*lines, "", KEYS]))


def _reset(chat: Chat, _: str) -> None:
    chat.begin(Conversation(system=chat.conversation.system))
    chat.view.note("a new conversation begins; the one before stays in its file")


def _undo(chat: Chat, _: str) -> None:
    question = chat.conversation.take_back()
    chat.used = 0  # until the next turn nobody knows
    chat.save()
    chat.view.note(f"taken back: {short(question)}")


def _retry(chat: Chat, _: str) -> None:
    if chat.conversation.messages and chat.settings.sampling.temperature == 0:
        chat.view.note("the temperature is 0, so the answer will be the same: /set temperature 1 for others")
    chat.retry()


def _edit(chat: Chat, text: str) -> None:
    question = chat.conversation.question
    if question is None:
        raise RequestError("there is no message yet to edit: say something first")
    changed = text or chat.view.edit(question)
    if changed is None:
        raise RequestError("there is no editor here: give the new text, /edit TEXT")
    if not changed.strip():
        chat.view.note("the message stays as it was")
        return
    chat.replace_last(changed)


def _system(chat: Chat, text: str) -> None:
    if text:
        chat.conversation.system = None if text == "-" else text
        chat.save_if_begun()
    chat.view.note(f"system prompt: {chat.conversation.system or 'none'}")


def _set(chat: Chat, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if not argument:
        chat.view.show("\n".join(f"{name} {value}" for name, value in chat.settings.values().items()))
    elif argument == "save":
        settings.save(chat.settings, chat.folders.settings)
        chat.view.note(f"these settings are kept in {chat.folders.settings}")
    elif not value.strip():
        raise RequestError(f"/set {name} has no value: expected /set NAME VALUE, /set save, or /set to see all")
    else:
        chat.apply(chat.settings.with_value(name, value.strip()))
        chat.view.note(f"{name} is {value.strip()}")


def _stats(chat: Chat, _: str) -> None:
    chat.view.show(figures.report(chat.stats, chat.context, chat.used, chat.view.width))


def _thoughts(chat: Chat, _: str) -> None:
    thoughts = [message.thinking for message in chat.conversation.messages if message.thinking]
    if not thoughts:
        raise RequestError("the model has told no thoughts: /set thinking on asks for them")
    chat.view.show(thoughts[-1])


def _tools(chat: Chat, path: str) -> None:
    if path:
        chat.use_tools(Toolbox.load(_file(path, "/tools")))
    names = ", ".join(chat.toolbox.functions)
    chat.view.note(f"tools: {names or 'none'}")


def _save(chat: Chat, path: str) -> None:
    chat.conversation.save(_file(path, "/save"))
    chat.view.note(f"saved to {path}")


def _load(chat: Chat, path: str) -> None:
    chat.begin(Conversation.load(_file(path, "/load")))
    chat.show_where_we_are()


def _export(chat: Chat, path: str) -> None:
    write_whole(_file(path, "/export"), chat.conversation.markdown())
    chat.view.note(f"written to {path}")


def _model(chat: Chat, name: str) -> None:
    if name:
        chat.change_model(name)
    chat.view.note(f"model: {chat.model_name}")


def _quit(chat: Chat, _: str) -> None:
    chat.is_over = True


def _file(path: str, command: str) -> Path:
    if not path or "\0" in path:
        raise RequestError(f"{command} needs the name of a file; got {path!r}")
    return Path(os.path.expanduser(path))


def short(text: str) -> str:
    """As much of a text as fits a line that says something else too."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}…"


COMMANDS = {
    "/help": Command("", "this list", _help),
    "/reset": Command("", "begin a new conversation", _reset),
    "/undo": Command("", "take the last turn back", _undo),
    "/retry": Command("", "answer the last message again, with another seed", _retry),
    "/edit": Command("[text]", "change the last message and answer it again", _edit),
    "/system": Command("[text]", "show or set the system prompt; - for none", _system),
    "/set": Command("[name value]", "show or change settings; /set save keeps them", _set),
    "/stats": Command("", "what the drafter saved", _stats),
    "/thoughts": Command("", "what the model thought before its last answer", _thoughts),
    "/tools": Command("[file]", "show the tools, or offer a Python file's", _tools),
    "/save": Command("file", "write the conversation as JSON", _save),
    "/load": Command("file", "go on with a saved conversation", _load),
    "/export": Command("file", "write the conversation as Markdown", _export),
    "/model": Command("[name]", "show the model, or load another (built-in: the demonstration pair)", _model),
    "/quit": Command("", "leave", _quit),
}
