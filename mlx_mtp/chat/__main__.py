"""The command `python -m mlx_mtp.chat`."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

from mlx_mtp import api
from mlx_mtp.chat import settings as settings_file
from mlx_mtp.chat.chat import Chat
from mlx_mtp.chat.commands import COMMANDS
from mlx_mtp.chat.conversation import Conversation, newest
from mlx_mtp.chat.session import BUILT_IN, Session, Source
from mlx_mtp.chat.settings import Folders, Settings, Thinking
from mlx_mtp.chat.terminal import PlainView, RichView, View
from mlx_mtp.chat.tools import Toolbox
from mlx_mtp.command import USER_ERROR, Parser, guarded
from mlx_mtp.errors import MtpError
from mlx_mtp.progress import Progress

LAST = "last"
WITHOUT_CURSOR = ("dumb", "unknown")  # terminals on which nothing can be drawn


def parser() -> argparse.ArgumentParser:
    """The flags, named as for generate; a setting that no flag gives is the settings file's, else its dataclass's."""
    default = Settings().values()
    cli = Parser(
        prog="python -m mlx_mtp.chat",
        description="Talk with Gemma 4, drafted by its MTP drafter. /help in the chat lists its commands. Without a "
                    "terminal each line of stdin is a message (or all lines between two \"\"\"); answers go to "
                    "stdout, everything else to stderr, and the exit code is 2 if anything could not be done.")
    add = cli.add_argument
    add("--model", help="checkpoint folder or Hub name (default: the small built-in demonstration pair)")
    add("--draft-model", default=api.AUTO, help="drafter's folder or Hub name, or 'none' (default: auto, which looks "
                                               "for <model>-assistant)")
    add("--draft-bits", type=int, help="quantize the drafter to this many bits while loading")
    add("--max-context", type=int, help="limit of what the model sees of the conversation, in tokens; memory is "
                                        "planned for it (default: the model's own)")
    add("--no-calibration", action="store_true", help="measure nothing and keep nothing about this machine's speed")
    add("--no-kernels", action="store_true", help="run MLX's own operations only, no GPU kernels of this package")
    add("--system-prompt", help="instructions put before the conversation")
    add("--resume", nargs="?", const=LAST, metavar="FILE", help="go on with the last conversation, or with a saved one")
    add("--tools", type=Path, metavar="FILE", help="a Python file whose functions the model may call")
    add("--yes", action="store_true", help="call tools without asking")
    add("--plain", action="store_true", help="no editing, colours or Markdown, as where there is no terminal")
    add("--thinking", choices=get_args(Thinking), help="ask for thoughts before an answer: show them dim and folded, "
                                                      f"do not ask, or hide them (default: {default['thinking']})")
    add("--max-tokens", "-m", help=f"of an answer (default: {default['max_tokens']})")
    add("--temp", dest="temperature", help=f"temperature; 0 is greedy (default: {default['temperature']})")
    add("--top-p", help=f"default: {default['top_p']}")
    add("--top-k", help=f"0 keeps all tokens (default: {default['top_k']})")
    add("--min-p", help=f"default: {default['min_p']}")
    add("--seed", help=f"same conversation, settings and seed: same answer (default: {default['seed']})")
    add("--num-draft-tokens", help="drafts a round; 0 is plain decoding; never changes the text (default: "
                                   f"{default['num_draft_tokens']})")
    return cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or what `guarded` says."""
    args = parser().parse_args(arguments)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is complained of where it is used
    return guarded(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    folders = Folders.of_user()
    with _view(args.plain, folders) as view:
        settings = _settings(args, folders, view)
        conversation, path = _conversation(args.resume, folders, view)
        session = _session(args, args.model or conversation.model, settings, view)
        chat = Chat(session, view, replace(settings, thinking="off"), folders, args.yes)
        chat.begin(conversation, path)
        with telling(view, is_vital=False):
            chat.apply(settings)
        with telling(view):
            if args.tools is not None:
                chat.use_tools(Toolbox.load(args.tools))
        if args.system_prompt is not None:
            conversation.system = args.system_prompt
        if conversation.messages:
            chat.show_where_we_are()
        if view.is_interactive:
            view.note("/help lists commands; Ctrl-C stops an answer; Ctrl-D leaves")
        chat.run()
    return USER_ERROR if view.has_complained and not view.is_interactive else 0


def _session(args: argparse.Namespace, model: str | None, settings: Settings, view: View) -> Session:
    progress = Progress(view.is_interactive)
    progress.show(f"loading {model or BUILT_IN}")
    try:
        source = Source(model, args.draft_model, args.draft_bits, args.max_context, not args.no_calibration,
                        not args.no_kernels)
        session = Session(source, settings.num_draft_tokens)
    finally:
        progress.clear()
    for text in session.pair.notes:
        view.note(text)
    return session


@contextmanager
def telling(view: View, is_vital: bool = True) -> Iterator[None]:
    """What cannot be done in here is told in a line, and the chat goes on without it.

    is_vital: where nobody is there to fix it, an error is raised: an answer without it would be to something else.
    """
    try:
        yield
    except MtpError as error:
        if is_vital and not view.is_interactive:
            raise
        view.error(" ".join(str(error).splitlines()))


def _conversation(resume: str | None, folders: Folders, view: View) -> tuple[Conversation, Path | None]:
    """The one to go on with and its file, or a new one."""
    with telling(view):
        if resume is not None:
            path = newest(folders.conversations) if resume == LAST else Path(os.path.expanduser(resume))
            return Conversation.load(path), path
    return Conversation(), None


def _settings(args: argparse.Namespace, folders: Folders, view: View) -> Settings:
    """Flags before the file before the defaults. A broken file is told of; a bad flag raises RequestError."""
    settings = Settings()
    with telling(view, is_vital=False):
        settings = settings_file.load(folders.settings)
    given = {name: value for name in settings_file.NAMES if (value := getattr(args, name)) is not None}
    return settings.with_values(given)


def _view(is_plain: bool, folders: Folders) -> PlainView | RichView:
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_plain or not is_terminal or os.environ.get("TERM") in WITHOUT_CURSOR:
        return PlainView(sys.stdin.isatty())
    return RichView(folders.history, list(COMMANDS))


if __name__ == "__main__":
    sys.exit(main())
