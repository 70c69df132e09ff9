"""What rows have in common: K/V of token prefixes that were run before, in a tree whose branches are texts.

A path from the root spells a prefix; each node holds the K/V of its own stretch of it. So a system prompt is kept once
however many prompts begin with it, and an answer hangs below the prompt it belongs to.

    [system prompt]──[question 1]──[answer 1]──[question 2]
                  └──[another question]

A row may go on from a position only if the window before it is whole in the sliding layers. Chunks of a prompt are
whole; of an answer only what the ring still held is; thinned nodes have nothing, until a text that begins alike has run
them again: then they keep it, as long as there is another text to give up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mlx_mtp.kv_span import Span

MIN_REUSE = 32  # fewer tokens cost less to run again, among others, than a pass of their own


@dataclass(eq=False)
class _Node:
    tokens: tuple[int, ...]
    span: Span | None  # None for the root only
    parent: _Node | None
    last_used: int = 0
    is_wanted: bool = False  # was missed when it was thinned, and is thinned again only for the text that is in use
    children: dict[int, _Node] = field(default_factory=dict)  # by first token

    @property
    def stop(self) -> int:
        return 0 if self.span is None else self.span.stop

    def below(self) -> Iterator[_Node]:
        waiting = [*self.children.values()]  # no recursion: a long prompt is a chain of a thousand nodes
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()


class PrefixCache:
    """Keeps at most `budget` bytes; what was used longest ago goes first. window: that of the sliding layers."""

    def __init__(self, window: int, budget: int) -> None:
        self._window, self._budget = window, budget
        self._root = _Node((), None, None)
        self._clock = 0
        self.nbytes = 0

    def match(self, prompt: Sequence[int]) -> int:
        """How many of the prompt's first tokens a row can begin with; at least one is always left to run."""
        return self._find(prompt)[0]

    def take(self, prompt: Sequence[int]) -> tuple[int, list[Span]]:
        """The same and the K/V for it, from position 0 on (see `KVCache.paste`)."""
        length, nodes = self._find(prompt)
        self._clock += 1
        for node in nodes:
            node.last_used = self._clock
        return length, [node.span for node in nodes if node.span is not None]

    def insert(self, tokens: Sequence[int], span: Span) -> None:
        """Keeps the K/V of tokens[span.start : span.stop]; nothing happens if what comes before is not kept (any more).

        tokens: the row's from position 0 on.
        """
        node, matched = self._walk(tokens[: span.stop])
        if matched < span.start or span.nbytes > self._budget:
            return
        self._clock += 1
        if matched < span.stop:
            if matched < node.stop:
                node = self._split(node, matched)
            rest = span if matched == span.start else span.part(matched, span.stop)
            rest.finish()
            new = _Node(tuple(tokens[matched : span.stop]), rest, node, self._clock)
            node.children[new.tokens[0]] = new
            self.nbytes += rest.nbytes
        self._thicken(node, span)
        while node.span is not None and node.parent is not None:
            node.last_used = self._clock
            node = node.parent
        self._shrink()

    def _thicken(self, node: _Node, span: Span) -> None:
        """Gives thinned nodes, from this one up, what `span` has of them: its row had to run them again."""
        while node.span is not None and node.parent is not None and node.span.start >= span.start:
            if node.span.sliding_from == node.stop <= span.stop and span.sliding_from <= node.span.start:
                part = span.part(node.span.start, node.stop)
                part.finish()
                self.nbytes += part.nbytes - node.span.nbytes
                node.span, node.is_wanted = part, True
            node = node.parent

    def _walk(self, tokens: Sequence[int]) -> tuple[_Node, int]:
        """The deepest node that `tokens` reach, and how many of them it and those above it spell."""
        node, matched = self._root, 0
        while matched < len(tokens) and (child := node.children.get(tokens[matched])) is not None:
            piece = tokens[matched : matched + len(child.tokens)]
            pairs = enumerate(zip(child.tokens, piece, strict=False))
            common = next((i for i, (ours, theirs) in pairs if ours != theirs), len(piece))
            node, matched = child, matched + common
            if common < len(child.tokens):
                break
        return node, matched

    def _find(self, prompt: Sequence[int]) -> tuple[int, list[_Node]]:
        node, matched = self._walk(prompt[: len(prompt) - 1])
        path: list[_Node] = []
        while node.parent is not None:
            path.insert(0, node)
            node = node.parent
        while path:
            length = min(matched, path[-1].stop)
            if length < MIN_REUSE:
                break
            if self._whole_from(path, length) <= max(0, length - self._window):
                return length, path
            path.pop()
        return 0, []

    @staticmethod
    def _whole_from(path: Sequence[_Node], length: int) -> int:
        """From where on the sliding layers hold every position before `length`, which lies in the path's last node."""
        whole_from = length
        for node in reversed(path):
            assert node.span is not None
            whole_from = min(node.span.sliding_from, whole_from)
            if node.span.sliding_from > node.span.start:
                break
        return whole_from

    def _split(self, node: _Node, at: int) -> _Node:
        """Cuts a node in two at position `at`; returns the upper part, which takes its place."""
        assert node.span is not None
        assert node.parent is not None
        head, tail = node.span.split(at)
        for part in (head, tail):
            part.finish()
        count = at - head.start
        upper = _Node(node.tokens[:count], head, node.parent, node.last_used, node.is_wanted)
        node.parent.children[upper.tokens[0]] = upper
        node.tokens, node.span, node.parent = node.tokens[count:], tail, upper
        upper.children[node.tokens[0]] = node
        return upper

    def _shrink(self) -> None:
        """Frees what was used longest ago: first windows in the middle of texts, then ends of texts."""
        while self.nbytes > self._budget:
            nodes = sorted(self._root.below(), key=lambda node: (node.last_used, -node.stop))
            thick = next((node for node in nodes if not node.is_wanted and self._is_passed_through(node)), None)
            end = next(node for node in nodes if not node.children)
            if thick is None and end.last_used == self._clock:  # rather than the end of the text that is in use
                thick = next((node for node in nodes if self._is_passed_through(node)), None)
            if thick is not None and thick.span is not None:
                thin = thick.span.thinned()
                thin.finish()
                self.nbytes -= thick.span.nbytes - thin.nbytes
                thick.span = thin
                continue
            assert end.parent is not None
            assert end.span is not None
            del end.parent.children[end.tokens[0]]
            self.nbytes -= end.span.nbytes

    def _is_passed_through(self, node: _Node) -> bool:
        """Whether a node's window serves no text that ends below it, and is there to be freed."""
        if node.span is None or node.span.sliding_from == node.span.stop or not node.children:
            return False
        return all(below.children or below.stop - self._window >= node.stop for below in node.below())
