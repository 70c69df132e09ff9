"""Text comes out whole: whatever the tokens' borders, a stop string ends it at one place, no character is torn."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest

from mlx_mtp import CheckpointError, RequestError, demo
from mlx_mtp.tokenizer import TextStream, Tokenizer

SENTENCE = "Größe: 3 μm, “naïve” 你好, 🦙🏽 and 👩‍👩‍👧!\n\n  indented\ttext  "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(demo.TARGET)


class Spelled:
    """A detokenizer whose tokens are strings: each test decides where tokens begin and end."""

    def __init__(self) -> None:
        self.last_segment = ""

    def add_token(self, token: str) -> None:
        self.last_segment = token

    def finalize(self) -> None:
        self.last_segment = ""


def streamed(pieces: list[str], *stop: str) -> tuple[list[str], TextStream]:
    """What comes out after each piece, and last what `finish` releases."""
    stream = TextStream(Spelled(), stop)
    return [*(stream.add([piece]) for piece in pieces), stream.finish()], stream  # type: ignore[list-item]


def expected_text(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The oracle: letter by letter, the text ends where it first ends with a stop string, the longest of them."""
    for end in range(1, len(text) + 1):
        whole = [stop for stop in stops if text[:end].endswith(stop)]
        if whole:
            return text[: end - max(map(len, whole))], True
    return text, False


def test_a_stop_string_over_several_tokens_is_held_back_and_never_shown() -> None:
    segments, stream = streamed(["Hello ", "ST", "O", "P now"], "STOP")
    assert segments == ["Hello ", "", "", "", ""]
    assert (stream.text, stream.is_stopped, stream.num_tokens) == ("Hello ", True, 4)


def test_what_only_began_like_a_stop_string_is_released() -> None:
    segments, stream = streamed(["a ST", "OOL", " b ST"], "STOP")
    assert segments == ["a ", "STOOL", " b ", "ST"]
    assert (stream.text, stream.is_stopped) == ("a STOOL b ST", False)


def test_a_stop_string_in_the_middle_of_a_token_ends_the_text_there() -> None:
    segments, stream = streamed(["one two three", " four"], " t")
    assert segments == ["one", "", ""]
    assert (stream.text, stream.num_tokens) == ("one", 1)


@pytest.mark.parametrize("pieces", [["xabc"], ["x", "abc"], ["xa", "bc"], ["xab", "c"], ["x", "a", "b", "c"]])
def test_of_two_stop_strings_the_one_that_is_whole_first_wins_wherever_tokens_end(pieces: list[str]) -> None:
    _, stream = streamed(pieces, "xabc", "ab")
    assert stream.text == "x"


def test_tokens_after_the_stop_count_for_nothing() -> None:
    stream = TextStream(Spelled(), ("!",))
    assert stream.add(["a", "!", "b", "!"]) == "a"  # type: ignore[list-item]
    assert stream.add(["c"]) == stream.finish() == ""  # type: ignore[list-item]
    assert stream.num_tokens == 2


def test_any_cut_of_any_text_gives_the_text_up_to_its_first_stop_string() -> None:
    chance = random.Random(7)
    stopped = 0
    for _ in range(2000):
        text = "".join(chance.choices("ab.", k=chance.randint(1, 12)))
        stops = tuple("".join(chance.choices("ab.", k=chance.randint(1, 4))) for _ in range(chance.randint(0, 3)))
        cuts = sorted(chance.sample(range(1, len(text)), chance.randint(0, len(text) - 1)))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        segments, stream = streamed(pieces, *stops)
        assert ("".join(segments), stream.is_stopped) == expected_text(text, stops), (pieces, stops)
        assert stream.text == "".join(segments)
        stopped += stream.is_stopped
    assert 500 < stopped < 1900


def test_what_is_shown_is_never_taken_back() -> None:
    """Each segment is final: no stop string may reach into text that is out already."""
    segments, _ = streamed(list("aaab aabb"), "aabb")
    assert segments == ["", "", "a", "", "aab ", "", "", "", "", ""]


def test_the_stream_gives_the_tokenizers_own_text(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(SENTENCE)[1:]
    assert tokenizer.decode(tokens) == SENTENCE
    for size in (1, 3, len(tokens)):
        stream = tokenizer.stream()
        segments = [stream.add(tokens[start : start + size]) for start in range(0, len(tokens), size)]
        segments.append(stream.finish())
        assert "".join(segments) == stream.text == SENTENCE
        assert stream.num_tokens == len(tokens)


def test_no_segment_holds_a_torn_character(tokenizer: Tokenizer) -> None:
    llama = tokenizer.encode("🦙")[-4:]
    assert all(text.startswith("<0x") for text in map(str, tokenizer._wrapped.convert_ids_to_tokens(llama)))
    stream = tokenizer.stream()
    assert [stream.add([token]) for token in llama] == ["", "", "", "🦙"]


def test_a_character_that_stays_torn_comes_out_as_the_tokenizer_shows_it(tokenizer: Tokenizer) -> None:
    torn = tokenizer.encode("🦙")[-4:-1]
    stream = tokenizer.stream()
    assert stream.add(torn) == ""
    assert stream.finish() == stream.text
    assert set(stream.text) == {"\ufffd"}


def test_a_stop_string_is_found_across_byte_tokens(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream(("🦙",))
    tokens = tokenizer.encode("ok 🦙 more")[1:]
    assert stream.add(tokens) + stream.finish() == "ok "
    assert stream.is_stopped


def test_streams_of_one_tokenizer_do_not_share_their_text(tokenizer: Tokenizer) -> None:
    one, other = tokenizer.stream(), tokenizer.stream()
    one.add(tokenizer.encode("first")[1:])
    other.add(tokenizer.encode("second")[1:])
    one.finish()
    other.finish()
    assert (one.text, other.text) == ("first", "second")


def bos_of(tokenizer: Tokenizer) -> int:
    return int(tokenizer._wrapped.bos_token_id)


def test_plain_text_begins_with_one_bos_even_if_it_says_so_itself(tokenizer: Tokenizer) -> None:
    bos = bos_of(tokenizer)
    plain = tokenizer.encode("Hello")
    assert plain == tokenizer.encode("<bos>Hello")
    assert plain[0] == bos
    assert plain.count(bos) == 1


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_conversation_begins_with_one_bos_and_ends_where_the_answer_begins(
    tokenizer: Tokenizer, system: str | None
) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
                {"role": "user", "content": "Who are you?"}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    tokens = tokenizer.encode_chat(messages)
    assert tokens.count(bos_of(tokenizer)) == 1
    text = tokenizer.decode(tokens)
    assert text.startswith("<bos><|turn>")
    assert text.endswith("Who are you?<turn|>\n<|turn>model\n")
    assert (f"<|turn>system\n{system}<turn|>" in text) == (system is not None)


def copied(folder: Path, **files: object) -> Path:
    """The built-in tokenizer with other JSON files; None leaves a file out."""
    shutil.copytree(demo.TARGET, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, content in files.items():
        (folder / f"{name}.json").unlink(missing_ok=True)
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_the_stop_tokens_are_generation_configs(tmp_path: Path) -> None:
    folder = copied(tmp_path / "x", generation_config={"eos_token_id": [1, 40, 50]}, config={"eos_token_id": 60})
    assert Tokenizer(folder).stop_tokens == {1, 40, 50}


@pytest.mark.parametrize("config", [{"eos_token_id": [60]}, {"text_config": {"eos_token_id": 60}}])
def test_without_generation_config_the_stop_tokens_are_configs(config: dict[str, object], tmp_path: Path) -> None:
    folder = copied(tmp_path / "x", generation_config=None, config=config)
    assert Tokenizer(folder).stop_tokens == {1, 60}  # <eos> itself always stops


def test_the_built_in_tokenizer_stops_at_the_end_of_a_turn(tokenizer: Tokenizer) -> None:
    end_of_turn, = tokenizer.encode("<turn|>")[1:]
    assert end_of_turn in tokenizer.stop_tokens


def test_without_a_chat_template_the_way_around_it_is_told(tmp_path: Path) -> None:
    folder = copied(tmp_path / "x")
    (folder / "chat_template.jinja").unlink()
    tokenizer = Tokenizer(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match=r"no chat template: copy chat_template.jinja .*--ignore-chat-template"):
        tokenizer.encode_chat([{"role": "user", "content": "Hi"}])


def test_what_the_chat_template_refuses_is_a_request_error(tmp_path: Path) -> None:
    folder = copied(tmp_path / "x")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match=r"the chat template refuses this conversation .*roles must alternate"):
        Tokenizer(folder).encode_chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("text", ["Gr\udcf6\udcdfe", "\ud83e"])
def test_what_no_utf_8_can_hold_is_a_request_error_that_shows_it(tokenizer: Tokenizer, text: str) -> None:
    first = next(letter for letter in text if "\ud800" <= letter <= "\udfff")
    with pytest.raises(RequestError, match=re.escape(f"holds {first!r}, which is no character")):
        tokenizer.encode(text)
    with pytest.raises(RequestError, match=r"which is no character .*: convert the prompt to UTF-8"):
        tokenizer.encode_chat([{"role": "user", "content": text}])


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% for x in messages[0].role | int %}{% endfor %}"])
def test_whatever_a_chat_template_raises_is_a_request_error(template: str, tmp_path: Path) -> None:
    folder = copied(tmp_path / "x")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(RequestError, match="the chat template refuses this conversation"):
        Tokenizer(folder).encode_chat([{"role": "user", "content": "Hi"}])


# The rules of Gemma 4's first one: results only beside the calls, what was said behind them, and no end and no new turn
# where results are the last.
FIRST_TEMPLATE = """\
{%- for m in messages -%}
  {{- '<|turn>' + m['role'] + '\\n' -}}
  {%- for call in m.get('tool_calls') or [] -%}{{- '[call ' + call['function']['name'] + ']' -}}{%- endfor -%}
  {%- for r in m['tool_responses'] -%}{{- '[' + r['name'] + ': ' + r['response'] + ']' -}}{%- endfor -%}
  {{- m['content'] -}}
  {%- if not (m['tool_responses'] and not m['content']) -%}{{- '<turn|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not (messages[-1]['tool_responses'] and not messages[-1]['content']) -%}
  {{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def call_of(name: str, call_id: str) -> dict[str, object]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": {}}}


def result(call_id: str, content: str) -> dict[str, object]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


@pytest.mark.parametrize(("said", "before"), [("", ""), ("Let me see.", "<|turn>assistant\nLet me see.<turn|>\n")])
def test_the_first_chat_templates_get_what_tools_gave_beside_the_calls(
    said: str, before: str, tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": "When?"},
                {"role": "assistant", "content": said, "tool_calls": [call_of("clock", "1"), call_of("sun", "2")]},
                result("2", "high"), {**result("1", "12"), "name": "clock"}]
    folder = copied(tmp_path / "x")
    (folder / "chat_template.jinja").write_text(FIRST_TEMPLATE)
    tokenizer = Tokenizer(folder)
    shown = f"<|turn>user\nWhen?<turn|>\n{before}<|turn>assistant\n[call clock][call sun][sun: high][clock: 12]"
    assert tokenizer.decode(tokenizer.encode_chat(messages)) == shown
    answered = [*messages, {"role": "assistant", "content": "Noon."}, {"role": "user", "content": "Thanks"}]
    assert tokenizer.decode(tokenizer.encode_chat(answered)) == (
        f"{shown}Noon.<turn|>\n<|turn>user\nThanks<turn|>\n<|turn>model\n")
    assert "tool_responses" not in messages[1]


def test_a_template_that_knows_tool_messages_gets_them_as_they_are(tmp_path: Path) -> None:
    folder = copied(tmp_path / "x")
    (folder / "chat_template.jinja").write_text("{# tool_responses tool_call_id #}{% for m in messages %}{{ m.role }} "
                                                "{% endfor %}")
    tokenizer = Tokenizer(folder)
    messages = [{"role": "assistant", "content": "", "tool_calls": [call_of("clock", "1")]}, result("1", "12")]
    assert tokenizer.decode(tokenizer.encode_chat(messages)) == "assistant tool "


def test_a_chat_template_that_is_none_is_the_checkpoints_fault(tmp_path: Path) -> None:
    folder = copied(tmp_path / "x")
    (folder / "chat_template.jinja").write_text("fine\n{% if %}")
    with pytest.raises(CheckpointError, match=r"the chat template cannot be read .* line 2"):
        Tokenizer(folder).encode_chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(("content", "says"), [
    ([1], r"generation_config\.json is \[1\]; expected an object"),
    ({"eos_token_id": "x"}, r"eos_token_id is \['x'\]; expected whole numbers"),
    ({"eos_token_id": [1, 1.5]}, r"eos_token_id is \[1, 1\.5\]; expected whole numbers"),
])
def test_stop_tokens_that_are_none_are_named(content: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=says):
        Tokenizer(copied(tmp_path / "x", generation_config=content))


@pytest.mark.parametrize("broken", ["generation_config", "tokenizer"])
def test_a_file_that_is_not_json_is_named(broken: str, tmp_path: Path) -> None:
    folder = copied(tmp_path / "x")
    (folder / f"{broken}.json").write_text("{")
    with pytest.raises(CheckpointError, match=str(folder)):
        Tokenizer(folder)


def test_ids_that_the_tokenizer_does_not_know_are_no_text() -> None:
    """A model's vocabulary may be padded beyond its tokenizer's."""
    tokenizer = Tokenizer(demo.TARGET)
    known = tokenizer.encode("a list of names")[1:]
    stream = tokenizer.stream()
    text = stream.add([known[0], 10**6, *known[1:], 10**6 + 1]) + stream.finish()
    assert text == tokenizer.decode(known)
    assert stream.num_tokens == len(known) + 2
