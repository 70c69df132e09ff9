"""What the chat's tests share: a template with Gemma 4's markers, a model that says what it is told to, a view."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mlx_mtp import demo
from mlx_mtp.channels import Part
from mlx_mtp.chat.chat import Chat
from mlx_mtp.chat.session import Session, Source
from mlx_mtp.chat.settings import Folders, Settings, Thinking
from mlx_mtp.engine.engine import Event
from mlx_mtp.engine.request import Request

# The structure of Gemma 4's: system turn with <|think|> and tools; thoughts only beside the calls of the turn that goes
# on; a tool's results inside the model's turn; thoughts cut out of what the model said; an empty thought before an
# answer that shall have none.
TEMPLATE = """\
{%- macro quoted(value) -%}
  {%- if value is string -%}<|"|>{{ value }}<|"|>
  {%- elif value is boolean -%}{{ 'true' if value else 'false' }}
  {%- elif value is mapping -%}{ {%- for k in value | sort -%}{{ k }}:{{ quoted(value[k]) }}{{ ',' if not loop.last }}
  {%- endfor -%} }
  {%- elif value is sequence -%}[{%- for v in value -%}{{ quoted(v) }}{{ ',' if not loop.last }}{%- endfor -%}]
  {%- else -%}{{ value }}{%- endif -%}
{%- endmacro -%}
{%- macro spoken(text) -%}
  {%- for piece in text.split('<channel|>') -%}{{ piece.split('<|channel>')[0] }}{%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set talk = messages -%}
{%- set has_system = messages[0]['role'] == 'system' -%}
{%- if enable_thinking or tools or has_system -%}
  {{- '<|turn>system\\n' -}}
  {%- if enable_thinking -%}{{- '<|think|>\\n' -}}{%- endif -%}
  {%- if has_system -%}{{- messages[0]['content'] | trim -}}{%- set talk = messages[1:] -%}{%- endif -%}
  {%- for tool in tools or [] -%}
    {{- '<|tool>declaration:' + tool['function']['name'] + quoted(tool['function']['parameters']) + '<tool|>' -}}
  {%- endfor -%}
  {{- '<turn|>\\n' -}}
{%- endif -%}
{%- set at = namespace(user=-1, open=false) -%}
{%- for message in talk -%}
  {%- if message['role'] == 'user' -%}{%- set at.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in talk -%}
  {%- if message['role'] == 'user' -%}
    {{- '<|turn>user\\n' + message['content'] | trim + '<turn|>\\n' -}}
  {%- elif message['role'] == 'tool' -%}
    {{- '<|tool_response>response:' + message['name'] + '{value:' + quoted(message['content']) + '}<tool_response|>' -}}
  {%- else -%}
    {%- if not at.open -%}{{- '<|turn>model\\n' -}}{%- endif -%}
    {%- if message.get('reasoning') and message.get('tool_calls') and loop.index0 > at.user -%}
      {{- '<|channel>thought\\n' + message['reasoning'] + '\\n<channel|>' -}}
    {%- endif -%}
    {%- for call in message.get('tool_calls') or [] -%}
      {{- '<|tool_call>call:' + call['function']['name'] + quoted(call['function']['arguments']) + '<tool_call|>' -}}
    {%- endfor -%}
    {{- spoken(message['content']) | trim -}}
    {%- set at.open = message.get('tool_calls') | length > 0 if message.get('tool_calls') else false -%}
    {%- if not at.open -%}{{- '<turn|>\\n' -}}{%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not at.open -%}
  {{- '<|turn>model\\n' -}}
  {%- if not enable_thinking -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}
{%- endif -%}
"""


def model_with_template(folder: Path, template: str = TEMPLATE) -> Path:
    """The built-in pair under a chat template of its own: links to its files, and the template."""
    model = folder / "model"
    for source, copy in ((demo.TARGET, model), (Path(f"{demo.TARGET}-assistant"), folder / "model-assistant")):
        copy.mkdir(parents=True)
        for file in source.iterdir():
            if file.name != "chat_template.jinja":
                os.symlink(file, copy / file.name)
    (model / "chat_template.jinja").write_text(template)
    return model


class Recorder:
    """A view without anybody: `lines` are what is typed, the rest is what was shown. agrees: to tool calls."""

    is_interactive = True
    width = 80

    def __init__(self, lines: Iterable[str] = (), agrees: bool = True) -> None:
        self.lines: Iterator[str] = iter(lines)
        self.agrees = agrees
        self.notes: list[str] = []
        self.errors: list[str] = []
        self.shown: list[str] = []
        self.asked: list[str] = []
        self.answers: list[list[Part]] = []
        self.prefills: list[tuple[int, int]] = []
        self.on_part: Callable[[Part], None] = lambda part: None

    def read(self) -> str | None:
        return next(self.lines, None)

    def edit(self, text: str) -> str | None:
        return f"{text}, changed"

    def confirm(self, question: str) -> bool:
        self.asked.append(question)
        return self.agrees

    def answer(self, thinking: Thinking) -> Recorder:
        self.answers.append([])
        return self

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def progress(self, done: int, total: int) -> None:
        self.prefills.append((done, total))

    def add(self, part: Part) -> None:
        self.answers[-1].append(part)
        self.on_part(part)

    def show(self, text: str) -> None:
        self.shown.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def error(self, text: str) -> None:
        self.errors.append(text)


class ToldEngine:
    """In an engine's place: says the given texts, one request after the other, a token at a time."""

    is_idle = True

    def __init__(self, session: Session, *texts: str) -> None:
        self._session, self._texts = session, list(texts)
        self._stop = next(iter(session.pair.tokenizer.stop_tokens))
        self.prompts: list[str] = []
        self._is_aborted = False

    def plain_seconds(self, request: Request) -> None:
        """No round was timed."""

    def run(self, requests: Iterable[Request], on_prefill: Callable[[int, int], None]) -> Iterator[Event]:
        for request in requests:
            self._is_aborted = False
            self.prompts.append(self._session.pair.tokenizer.decode(request.prompt))
            on_prefill(len(request.prompt), len(request.prompt))
            tokens = self._session.pair.tokenizer.encode(self._texts.pop(0))[1:]
            for token in [*tokens, self._stop]:
                if self._is_aborted:
                    request.finish_reason = "aborted"
                    yield Event(request, [])
                    break
                yield Event(request, request.receive([token], None if not request.tokens else 0))
                if request.is_finished:
                    break

    def abort(self, request_id: int) -> bool:
        self._is_aborted = True
        return True


def new_chat(session: Session, folder: Path, view: Recorder | None = None, settings: Settings | None = None,
             is_trusted: bool = False) -> Chat:
    folders = Folders(folder / "chat.json", folder / "history", folder / "conversations")
    return Chat(session, view or Recorder(), settings or Settings(), folders, is_trusted)


def new_session(model: Path | None = None, num_draft_tokens: int = 3, max_context: int | None = None) -> Session:
    return Session(Source(None if model is None else str(model), max_context=max_context), num_draft_tokens)
