"""The conversation between a user and a model: who says what next, and what is kept of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mlx_mtp.api import AUTO
from mlx_mtp.chat import commands, figures, tools
from mlx_mtp.chat.conversation import Conversation, Message, ToolCall
from mlx_mtp.chat.session import BUILT_IN, FILLED, Answer, Session
from mlx_mtp.chat.settings import Folders, Settings
from mlx_mtp.chat.terminal import View, holding_ctrl_c
from mlx_mtp.chat.tools import Toolbox
from mlx_mtp.engine.request import RequestStats
from mlx_mtp.errors import MtpError, RequestError
from mlx_mtp.tokenizer import Tokenizer

MOST_CALLS = 32  # of tools in one turn, so that a model that calls for ever comes to an end


class Chat:
    """Reads lines, runs commands and turns, and writes the conversation to its file before and after each turn."""

    def __init__(self, session: Session, view: View, settings: Settings, folders: Folders, is_trusted: bool) -> None:
        """is_trusted: tools are called without asking."""
        self.view, self.settings, self.folders = view, settings, folders
        self.toolbox = Toolbox()
        self.stats: list[RequestStats] = []
        self.is_over = False
        self._session: Session | None = session
        self._source = session.source
        self._is_trusted = is_trusted
        self.begin(Conversation())

    def begin(self, conversation: Conversation, path: Path | None = None) -> None:
        """Goes on with a conversation, in its file or in a new one."""
        self.conversation = conversation
        name = f"{time.strftime('%Y-%m-%d-%H%M%S')}-{os.getpid()}-{time.monotonic_ns() % 1000:03}.json"
        self._path = path or self.folders.conversations / name
        self._retries = self.used = 0
        self._is_warned, self._is_kept = False, True

    def run(self) -> None:
        """Until the user leaves."""
        while not self.is_over:
            try:
                line = self.view.read()
                if line is None:
                    return
                self.take(line)
            except MtpError as error:
                self.view.error(" ".join(str(error).splitlines()))
            except KeyboardInterrupt:
                if not self.view.is_interactive:
                    raise
                self.view.note("Ctrl-D or /quit leaves")

    def take(self, line: str) -> None:
        """Runs one line, if there is anything in it."""
        if line.startswith("/"):
            commands.run(self, line)
        elif line.strip():
            self.say(line.strip())

    def say(self, text: str) -> None:
        """A user's message, and the answer to it."""
        self._retries = 0
        self._turn(lambda: self.conversation.messages.append(Message("user", text)))

    def retry(self) -> None:
        """Takes the last answer back and asks for another, with the next seed."""
        conversation = self.conversation
        if conversation.question is None:
            raise RequestError("there is no message yet to answer: say something first")
        self._retries += not conversation.is_unanswered

        def change() -> None:
            del conversation.messages[conversation.turns[-1] + 1 :]

        self._turn(change)

    def replace_last(self, text: str) -> None:
        """Puts another message in the place of the last one, and answers it."""
        def change() -> None:
            self.conversation.take_back()
            self.conversation.messages.append(Message("user", text.strip()))

        self._retries = 0
        self._turn(change)

    def apply(self, settings: Settings) -> None:
        """Other settings from now on."""
        if self._session is not None and settings.num_draft_tokens != self.settings.num_draft_tokens:
            self._session.use(settings.num_draft_tokens)
        if settings.thinking != "off":
            self._check(lambda tokenizer: tokenizer.can_think, "this model's chat template has no thinking mode")
        self.settings = settings

    def use_tools(self, toolbox: Toolbox) -> None:
        self._check(lambda tokenizer: tokenizer.can_call_tools, "this model's chat template does not support tools")
        self.toolbox = toolbox

    def change_model(self, name: str) -> None:
        """Loads another model. What is wrong with it is found, if it can be, while the one in use is still there."""
        def let_go() -> None:
            self._session = None  # no machine need hold two models

        source = replace(self._source, model=None if name == BUILT_IN else name, draft_model=AUTO)
        self._session = Session(source, self.settings.num_draft_tokens, let_go)
        self._source = source
        self.used = 0
        if self.toolbox.functions and not self._session.pair.tokenizer.can_call_tools:
            self.toolbox = Toolbox()
            self.view.note("this model's chat template does not support tools: none are offered")
        for text in self._session.pair.notes:
            self.view.note(text)

    @property
    def model_name(self) -> str:
        return "none" if self._session is None else self._session.name

    @property
    def context(self) -> int:
        return 0 if self._session is None else self._session.context

    def save(self) -> None:
        """Writes the conversation's file. Where that cannot be done it is said once, and the chat goes on."""
        self.conversation.model = None if self._session is None else self._session.source.model
        try:
            self.conversation.save(self._path)
            self._is_kept = True
        except RequestError as error:
            if self._is_kept:
                self.view.error(str(error))
            self._is_kept = False

    def save_if_begun(self) -> None:
        """Leaves no file of a conversation in which nothing was ever said."""
        if self.conversation.messages or self._path.exists():
            self.save()

    def show_where_we_are(self) -> None:
        """What a user who comes back should know."""
        turns = len(self.conversation.turns)
        if not turns:
            self.view.note("nothing was said in this conversation yet")
            return
        self.view.note(f"going on after {turns} turn{'s' * (turns != 1)}; the last message was: "
                       f"{commands.short(self.conversation.question or '')}")
        if self.conversation.is_unanswered:
            self.view.note("it has no answer: /retry asks again")

    def _turn(self, change: Callable[[], object]) -> None:
        """Changes the conversation and answers it; takes the change back if nothing comes of it."""
        before, left_out = list(self.conversation.messages), self.conversation.left_out
        change()
        answer = None
        try:
            answer = self._run()
        finally:
            if answer is None or answer.is_nothing:
                self.conversation.messages, self.conversation.left_out = before, left_out
                self.save_if_begun()
        if answer.is_nothing:
            self.view.note("stopped before anything came: the message is taken back")
        else:
            answer = self._go_on(answer)
        if answer.is_stopped and not self.view.is_interactive:
            raise KeyboardInterrupt

    def _go_on(self, answer: Answer) -> Answer:
        """Keeps an answer; as long as it calls tools, calls them and asks for the next. Returns the last one."""
        num_calls = 0
        while True:
            is_enough = answer.is_stopped or num_calls > MOST_CALLS
            calls = [] if is_enough else self._parse(answer, num_calls)
            self.conversation.messages.append(
                Message("assistant", answer.content, answer.thinking, tuple(calls), answer.is_stopped))
            self.save()
            self._tell(answer)
            if answer.calls and num_calls > MOST_CALLS:
                self.view.note("the model calls tools although it was told that it may not: the turn ends here")
            if not calls:
                return answer
            num_calls += len(calls)
            self.conversation.messages += [self._call(call, num_calls) for call in calls]
            answer = self._run()

    def _parse(self, answer: Answer, num_calls: int) -> list[ToolCall]:
        """The calls of an answer. One that cannot be read is told of, and not made."""
        try:
            return [call for text in answer.calls for call in tools.parse(text, num_calls)]
        except RequestError as error:
            self.view.error(str(error))
            return []

    def _run(self) -> Answer:
        """One request."""
        session, settings, conversation = self._loaded(), self.settings, self.conversation
        thinking, left_out = settings.thinking != "off", conversation.left_out
        prompt = session.fit(conversation, lambda: session.encode(conversation, thinking, self.toolbox.schemas),
                             settings.sampling.max_tokens)
        if conversation.left_out > left_out:
            self.view.note(f"the context is full: the model does not see the oldest {conversation.left_out} turns any "
                           "more (they stay in the file)")
            self._is_warned = False
        self.save()
        sampling = replace(settings.sampling, seed=(settings.sampling.seed + self._retries) % 2**32)
        with holding_ctrl_c() as stop, self.view.answer(settings.thinking) as shown:
            return session.answer(prompt, sampling, shown, stop)

    def _tell(self, answer: Answer) -> None:
        """The status line, and what else a user should know of an answer."""
        self.stats.append(answer.stats)
        self.used = answer.context
        if answer.is_stopped:
            self.view.note("stopped")
        self.view.note(figures.status(answer, self.context))
        if answer.context >= self.context:
            self.view.note("the context is full: the answer ends here")
        elif answer.finish_reason == "length":
            self.view.note(f"the answer was cut off after max_tokens ({self.settings.sampling.max_tokens}): "
                           "/set max_tokens allows more")
        if answer.context > FILLED * self.context and not self._is_warned:
            self._is_warned = True
            self.view.note(f"the context is {answer.context / self.context:.0%} full; when it ends, the oldest turns "
                           "are left out: /reset begins anew")

    def _call(self, call: ToolCall, calls: int) -> Message:
        """Runs a tool, if the user agrees; Ctrl-C ends the tool, not the turn."""
        if calls > MOST_CALLS:
            return tools.result(call, f"Error: more than {MOST_CALLS} calls in one turn are not allowed.")
        if not self._is_allowed(call):
            return tools.result(call, tools.REFUSED)
        try:
            message = self.toolbox.call(call)
        except KeyboardInterrupt:
            message = tools.result(call, "Error: the user stopped this call.")
        self.view.note(f"{tools.shown(call)} gave {commands.short(message.content)}")
        return message

    def _is_allowed(self, call: ToolCall) -> bool:
        """Ctrl-C instead of an answer is a refusal, so that no call is left without a result."""
        try:
            return self._is_trusted or self.view.confirm(f"call {tools.shown(call)}?")
        except KeyboardInterrupt:
            return False

    def _loaded(self) -> Session:
        if self._session is None:
            raise RequestError("no model is loaded: /model NAME loads one")
        return self._session

    def _check(self, can: Callable[[Tokenizer], bool], otherwise: str) -> None:
        if self._session is not None and not can(self._session.pair.tokenizer):
            raise RequestError(f"{otherwise}: expected one that does, such as an instruction-tuned Gemma 4's")
