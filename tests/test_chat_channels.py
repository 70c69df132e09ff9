"""Streamed text in parts: thoughts, answers and tool calls, wherever a chunk ends; no marker ever comes out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import pytest

from mlx_mtp import demo
from mlx_mtp.channels import MARKERS, ChannelParser, Part
from mlx_mtp.tokenizer import Tokenizer

CALL = 'call:weather{city:<|"|>Bern<|"|>,days:2}'
TEXT = (f"Well. <|channel>thought\nA {{hard}} one: 1 < 2,\n✓ <|no marker>\n<channel|>So <b>ünd</b> 🦙 it is.\n"
        f"<|tool_call>{CALL}<tool_call|> Bye")
PARTS = [("answer", "Well. "), ("thinking", "A {hard} one: 1 < 2,\n✓ <|no marker>\n"),
         ("answer", "So <b>ünd</b> 🦙 it is.\n"), ("tool_call", CALL), ("answer", " Bye")]


def joined(parts: Iterable[Part]) -> list[tuple[str, str]]:
    """Neighbours of one kind put together; a tool call is a part of its own."""
    whole: list[tuple[str, str]] = []
    for part in parts:
        if whole and whole[-1][0] == part.kind != "tool_call":
            whole[-1] = (part.kind, whole[-1][1] + part.text)
        else:
            whole.append((part.kind, part.text))
    return whole


def parsed(chunks: Iterable[str]) -> list[tuple[str, str]]:
    parser = ChannelParser()
    parts = [part for chunk in chunks for part in parser.add(chunk)]
    return joined([*parts, *parser.finish()])


@pytest.mark.parametrize("size", [1, 2, 3, 5, len(TEXT)])
def test_parts_do_not_depend_on_how_long_chunks_are(size: int) -> None:
    assert parsed(TEXT[start : start + size] for start in range(0, len(TEXT), size)) == PARTS


def test_a_text_split_at_any_two_places_gives_the_same_parts() -> None:
    places = range(len(TEXT) + 1)
    for first, second in [*itertools.pairwise(places), *itertools.combinations(places[::3], 2)]:
        assert parsed([TEXT[:first], TEXT[first:second], TEXT[second:]]) == PARTS


def test_markers_spelled_in_byte_tokens_are_found_too() -> None:
    """Each byte of the text is a token of its own: no chunk holds more than a character."""
    tokenizer = Tokenizer(demo.TARGET)
    first = tokenizer._wrapped.convert_tokens_to_ids("<0x00>")
    stream, parser = tokenizer.stream(), ChannelParser()
    chunks = [stream.add([first + byte]) for byte in TEXT.encode()] + [stream.finish()]
    assert max(map(len, chunks)) == 1
    assert joined([part for chunk in chunks for part in parser.add(chunk)] + parser.finish()) == PARTS


def test_special_tokens_are_found_however_many_tokens_come_at_once() -> None:
    tokenizer = Tokenizer(demo.TARGET)
    tokens = tokenizer.encode(TEXT)[1:]
    for size in (1, 4, len(tokens)):
        stream = tokenizer.stream()
        chunks = [stream.add(tokens[start : start + size]) for start in range(0, len(tokens), size)]
        assert parsed([*chunks, stream.finish()]) == PARTS


def test_no_marker_comes_out_of_random_text_and_all_else_does() -> None:
    generator = random.Random(3)
    for _ in range(500):
        pieces = [generator.choice([*MARKERS, "thought\n", "a", "<", "|", ">", "\n", "<|", "🦙"]) for _ in range(12)]
        text = "".join(pieces)
        cuts = sorted(generator.randrange(len(text) + 1) for _ in range(4))
        parts = parsed(text[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(text)]))
        assert parts == parsed([text])
        for kind, shown in parts:
            watched = ("<tool_call|>",) if kind == "tool_call" else MARKERS
            assert not any(marker in shown for marker in watched), (text, parts)


def test_what_may_begin_a_marker_is_held_back_and_given_out_when_it_is_none() -> None:
    parser = ChannelParser()
    assert parser.add("a <|chan") == [Part("answer", "a ")]
    assert parser.add("ged") == [Part("answer", "<|changed")]
    assert parser.add("<|turn") == []
    assert parser.finish() == [Part("answer", "<|turn")]


@pytest.mark.parametrize(("text", "parts"), [
    ("<|channel>thought\n<channel|>Yes", [("answer", "Yes")]),
    ("<|channel>thought<channel|>Yes", [("answer", "Yes")]),
    ("<|channel>thought\nHm", [("thinking", "Hm")]),
    ("<|channel>thought\nHm<|tool_call>call:f{}<tool_call|>", [("thinking", "Hm"), ("tool_call", "call:f{}")]),
    ("<|tool_call>call:f{}", [("tool_call", "call:f{}")]),
    ("<|tool_call>call:f{}<tool_call|><|tool_call>call:g{}<tool_call|>",
     [("tool_call", "call:f{}"), ("tool_call", "call:g{}")]),
    ("A<channel|>B<turn|>", [("answer", "AB")]),
    ("", []),
])
def test_what_is_empty_unfinished_or_out_of_place(text: str, parts: list[tuple[str, str]]) -> None:
    assert parsed([text]) == parsed(text) == parts


@pytest.mark.parametrize(("prompt_end", "said", "parts"), [
    ("<tool_response|><|channel>thought\n", "So it is.\n<channel|>Sunny.",
     [("thinking", "So it is.\n"), ("answer", "Sunny.")]),
    ("<|channel>", "thought\nHm.<channel|>Yes.", [("thinking", "Hm."), ("answer", "Yes.")]),
    ("<|turn>model\n<|channel>thought\n<channel|>", "Yes.", [("answer", "Yes.")]),
    ("What does <|channel> mean?<turn|>\n<|turn>model\n", "Thoughts.", [("answer", "Thoughts.")]),
    ("<|channel>thought\nOld.<channel|>", "<|channel>thought\nNew.<channel|>Yes.",
     [("thinking", "New."), ("answer", "Yes.")]),
])
def test_a_channel_that_the_prompt_left_open_goes_on(
    prompt_end: str, said: str, parts: list[tuple[str, str]]
) -> None:
    for size in (1, 4, len(said)):
        parser = ChannelParser(prompt_end)
        chunks = [said[start : start + size] for start in range(0, len(said), size)]
        assert joined([part for chunk in chunks for part in parser.add(chunk)] + parser.finish()) == parts
