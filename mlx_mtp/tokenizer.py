"""Text <-> tokens, on mlx-lm's tokenizer: prompts and chat templates in, text segment by segment out."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_mtp.channels import TOOL_CALL, overlap
from mlx_mtp.errors import CheckpointError, RequestError

Message = Mapping[str, Any]
_QUIET = {"verbose": False}  # transformers would warn of a long prompt; whoever knows the context raises instead


class Tokenizer:
    """A checkpoint's tokenizer, chat template and stop tokens."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if the folder has no readable tokenizer."""
        if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json: copy it from the original checkpoint")
        # Imported here: it imports transformers, which takes a second that `--help` must not take.
        from mlx_lm.tokenizer_utils import load

        stop_tokens = _stop_tokens(folder)
        try:
            self._wrapped = load(folder, eos_token_ids=stop_tokens)
        except Exception as error:  # the tokenizers library raises bare Exceptions for a malformed file
            raise CheckpointError(f"{folder}: the tokenizer cannot be read ({error}): copy its files from the original "
                                  "checkpoint") from error

    @property
    def stop_tokens(self) -> frozenset[int]:
        return frozenset(self._wrapped.eos_token_ids)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._wrapped.has_chat_template)

    @property
    def can_think(self) -> bool:
        """Whether the chat template can be asked for thoughts before the answer."""
        return "enable_thinking" in self._template

    @property
    def can_call_tools(self) -> bool:
        """Whether the chat template offers tools, and the calls come in Gemma 4's form."""
        return TOOL_CALL in self._template and "tools" in self._template

    @property
    def _template(self) -> str:
        return str(self._wrapped.chat_template or "")

    def encode(self, text: str) -> list[int]:
        """Plain text as it stands, begun with <bos> if it does not say so itself."""
        tokens = self._ids(text)
        bos = self._wrapped.bos_token_id  # put by us: not every tokenizer.json has a post-processor that adds it
        return tokens if bos is None or tokens[:1] == [bos] else [bos, *tokens]

    def encode_chat(
        self, messages: Sequence[Message], *, thinking: bool = False, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """A conversation, through the chat template, up to where the model's answer begins.

        thinking: asks for thoughts before the answer, if the template can. tools: JSON schemas of functions to offer.
        """
        if not self.has_chat_template:
            raise RequestError("this checkpoint has no chat template: copy chat_template.jinja from the original one, "
                               "or give the prompt as plain text (generate's --ignore-chat-template)")
        from jinja2 import TemplateSyntaxError

        try:
            if "tool_responses" in self._template and "tool_call_id" not in self._template:
                messages = _with_results_in_calls(messages)
            text = self._wrapped.apply_chat_template(
                messages, tools=list(tools) or None, add_generation_prompt=True, enable_thinking=thinking,
                tokenize=False)
        except TemplateSyntaxError as error:
            raise CheckpointError(f"the chat template cannot be read ({error}, line {error.lineno}): copy "
                                  "chat_template.jinja from the original checkpoint") from error
        except Exception as error:  # a template is a program: it refuses by raising, or meets what it does not expect
            raise RequestError(f"the chat template refuses this conversation ({error}): change its roles or contents, "
                               "or give the prompt as plain text (generate's --ignore-chat-template)") from error
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")  # Python keeps bytes that it cannot decode as lone surrogates
        except UnicodeEncodeError as error:
            raise RequestError(f"the prompt holds {text[error.start]!r}, which is no character but a byte that is not "
                               "UTF-8, or half of a pair: convert the prompt to UTF-8") from error
        return list(self._wrapped.encode(text, add_special_tokens=False, **_QUIET))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._wrapped.decode(tokens))

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        return TextStream(self._wrapped.detokenizer, stop)


class TextStream:
    """Turns one request's tokens into text as they come, and ends it at a stop string.

    What may be the beginning of a stop string, or of a character, is held back until that is decided.
    """

    def __init__(self, detokenizer: Any, stop: Sequence[str]) -> None:
        self._detokenizer, self._stop = detokenizer, tuple(stop)
        self._held = ""
        self.text = ""
        self.num_tokens = 0
        self.is_stopped = False

    def add(self, tokens: Sequence[int]) -> str:
        """Returns the text that `tokens` make certain; sets `is_stopped` at a stop string."""
        segments = []
        for token in tokens:
            if not self.is_stopped:
                with suppress(IndexError):  # a vocabulary padded beyond the tokenizer's: such ids are no text
                    self._detokenizer.add_token(token)
                self.num_tokens += 1
                segments.append(self._release(self._detokenizer.last_segment))
        return "".join(segments)

    def finish(self) -> str:
        """Returns what was held back; after that the text is whole."""
        if self.is_stopped:
            return ""
        self._detokenizer.finalize()
        segment = self._release(self._detokenizer.last_segment)
        rest, self._held = ("", "") if self.is_stopped else (self._held, "")
        self.text += rest
        return segment + rest

    def _release(self, segment: str) -> str:
        """Adds a segment to what is held and gives out as much as no stop string can touch any more."""
        pending = self._held + segment
        # The stop string that is whole first wins, so that the text does not depend on where tokens begin and end.
        found = [(start + len(stop), start) for stop in self._stop if (start := pending.find(stop)) >= 0]
        if found:
            released, self._held, self.is_stopped = pending[: min(found)[1]], "", True
        else:
            held = max((overlap(pending, stop) for stop in self._stop), default=0)
            released, self._held = pending[: len(pending) - held], pending[len(pending) - held :]
        self.text += released
        return released


def _with_results_in_calls(messages: Sequence[Message]) -> list[Message]:
    """As Gemma 4's first chat templates want it: one message holds calls, then what tools gave, then what was said."""
    folded: list[Message] = []
    for message in messages:
        last = folded[-1] if folded else {}
        if message["role"] == "tool" and last.get("tool_calls"):
            if last.get("content") and "tool_responses" not in last:  # that was said before the calls
                folded[-1:] = [{"role": last["role"], "content": last["content"]}, {**last, "content": ""}]
            names = {call.get("id"): call["function"]["name"] for call in last["tool_calls"]}
            name = message.get("name") or names.get(message.get("tool_call_id"), "unknown")
            responses = [*last.get("tool_responses", ()), {"name": name, "response": message["content"]}]
            folded[-1] = {**folded[-1], "tool_responses": responses}
        elif message["role"] == "assistant" and last.get("tool_responses") and not message.get("tool_calls"):
            folded[-1] = {**last, "content": message["content"]}
        else:
            folded.append(message)
    return folded


def _stop_tokens(folder: Path) -> list[int] | None:
    """End-of-turn ids from generation_config.json (Gemma 4 has three), else from config.json."""
    for name in ("generation_config.json", "config.json"):
        try:
            raw = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{folder / name} cannot be read as JSON: {error}") from error
        if not isinstance(raw, dict):
            raise CheckpointError(f"{folder / name} is {reprlib.repr(raw)}; expected an object: copy the file from the "
                                  "original checkpoint")
        text = raw.get("text_config")
        ids = raw.get("eos_token_id") or (text.get("eos_token_id") if isinstance(text, dict) else None)
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(each) is int for each in ids):
            raise CheckpointError(f"{folder / name}: eos_token_id is {ids}; expected whole numbers: copy the file from "
                                  "the original checkpoint")
        return ids
    return None
