"""The corpus: CPython's documentation sources and standard library, as plain text and as chat pairs.

Everything is a pure function of the two source folders: the split is by a checksum of the file's relative path, so
that a held-out file is held out of the plain text *and* of the chat pairs.
"""

import ast
import json
import re
import textwrap
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 16
MAX_EXPLANATION_CHARACTERS = 360
MAX_FUNCTION_CHARACTERS = 480
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "encodings", "lib2to3", "pydoc_data", "site-packages"}
SKIPPED_FOLDERS |= {"dist-packages", "lib-dynload", "_bundled", "__pycache__", "config-3.11-x86_64-linux-gnu"}
# Licences, tables of contents and change logs are long, repetitive and teach nothing that the chat pairs need.
SKIPPED_DOCUMENTS = ("license", "copyright", "contents", "whatsnew/changelog", "whatsnew/2.", "bugs")

OBJECT_NAMES = {
    "function": "a function",
    "class": "a class",
    "method": "a method",
    "classmethod": "a class method",
    "staticmethod": "a static method",
    "attribute": "an attribute",
    "exception": "an exception",
    "data": "a constant",
    "decorator": "a decorator",
    "module": "a module",
    "c:function": "a C function",
    "c:macro": "a C macro",
    "c:type": "a C type",
    "c:member": "a C structure member",
    "c:var": "a C variable",
}
EXPLAIN_PROMPTS = ("Explain `{}`.", "Explain `{}`.", "What is `{}`?", "What does `{}` do?")

_DIRECTIVE = re.compile(r"^(?P<indent> *)\.\. (?P<kind>[\w:]+):: +(?P<signature>\S.*)$")
_CURRENT_MODULE = re.compile(r"^\.\. (?:currentmodule|module):: +(\S+)", re.MULTILINE)
_ROLE = re.compile(r":[\w:+-]+:`(?P<text>[^`]*)`")
_ADORNMENT = re.compile(r"^([=\-~^\"#*+.])\1{2,}$")


@dataclass(frozen=True)
class ChatPair:
    """One question and its answer; ``kind`` is "explain" or "write_python"."""

    kind: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Corpus:
    """Plain documents and chat pairs, each as (training, held-out)."""

    texts: tuple[list[str], list[str]]
    pairs: tuple[list[ChatPair], list[ChatPair]]


def is_held_out(path: str) -> bool:
    return zlib.crc32(path.encode()) % HELD_OUT_ONE_IN == 0


def clean_markup(text: str) -> str:
    """reST roles and literals become Markdown's: ``:func:`~a.b``` and ````a.b```` both read ```a.b```."""

    def replace_role(match: re.Match[str]) -> str:
        inner = match["text"].lstrip("!~")
        inner = inner.split(" <")[0] if inner.endswith(">") else inner
        return f"`{inner}`"

    text = _ROLE.sub(replace_role, text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r"`([^`<>]+) <[^`>]+>`__?", r"\1", text)
    return text.replace("\\*", "*").replace("\\", "")


def join_paragraphs(source: str) -> str:
    """Undo the hard line wraps of running text: where a line ends is chance, which a small model cannot learn."""
    blocks: list[str] = []
    literal_indent: int | None = None
    for block in re.split(r"\n\s*\n", source):
        lines = block.split("\n")
        indents = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
        if not indents:
            continue
        if literal_indent is not None and min(indents) <= literal_indent:
            literal_indent = None
        is_prose = literal_indent is None and len(set(indents)) == 1 and re.match(r"[A-Za-z*`:(]", lines[0].lstrip())
        if is_prose and not any(_ADORNMENT.match(line.strip()) for line in lines):
            block = " " * indents[0] + re.sub(r"\s+", " ", " ".join(lines)).strip()
        blocks.append(block.rstrip())
        if literal_indent is None and (block.rstrip().endswith("::") or "code-block::" in block):
            literal_indent = indents[0]
    return clean_markup("\n\n".join(blocks)) + "\n"


def _first_sentences(text: str) -> str:
    """Whole sentences, at most ``MAX_EXPLANATION_CHARACTERS`` characters of them, or nothing."""
    text = re.sub(r"\s+", " ", text).removesuffix(" .").strip()
    if len(text) <= MAX_EXPLANATION_CHARACTERS:
        return text
    end = text.rfind(". ", 0, MAX_EXPLANATION_CHARACTERS)
    return text[: end + 1] if end > 40 else ""


def _paragraph_under(lines: list[str], start: int, indent: int) -> str:
    """The first running paragraph indented deeper than the directive at ``lines[start]``."""
    paragraph: list[str] = []
    for line in lines[start + 1 :]:
        deeper = len(line) - len(line.lstrip()) > indent
        if line.strip() and not deeper:
            break
        text = line.strip()
        if paragraph and not text:
            break
        if not text or (not paragraph and (text.startswith((":", "..")) or "(" in text.split(" ")[0])):
            continue
        paragraph.append(text)
    return clean_markup(" ".join(paragraph))


def explain_pairs(source: str) -> Iterator[ChatPair]:
    """Prompts "Explain `x.y`." -> one sentence of a fixed form, then the paragraph under the object's directive."""
    module = ""
    owner, owner_indent = "", -1
    lines = source.split("\n")
    for number, line in enumerate(lines):
        found_module = _CURRENT_MODULE.match(line)
        if found_module:
            module = found_module[1]
        match = _DIRECTIVE.match(line)
        if match is None or match["kind"] not in OBJECT_NAMES or match["kind"] == "module":
            continue
        name = match["signature"].split("(")[0].strip()
        if match["kind"].startswith("c:"):
            name = name.split(" ")[-1].lstrip("*")
        indent = len(match["indent"])
        if match["kind"] == "class":
            owner, owner_indent = name, indent
        elif indent <= owner_indent:
            owner, owner_indent = "", -1
        if owner and indent > owner_indent and "." not in name and match["kind"] != "class":
            name = f"{owner}.{name}"
        if module and not match["kind"].startswith("c:") and not name.startswith(module + "."):
            name = f"{module}.{name}"
        answer = _first_sentences(_paragraph_under(lines, number, indent))
        if len(answer) < 30 or not answer.isascii() or " " in name or not name.isascii():
            continue
        answer = answer.rstrip(":") + ("." if answer.endswith(":") else "")
        where = f" in the module `{module}`" if module and not match["kind"].startswith("c:") else ""
        prompt = EXPLAIN_PROMPTS[zlib.crc32(name.encode()) % len(EXPLAIN_PROMPTS)].format(name)
        yield ChatPair("explain", prompt, f"`{name}` is {OBJECT_NAMES[match['kind']]}{where}.\n\n{answer}")


def write_python_pairs(source: str) -> Iterator[ChatPair]:
    """Prompts "Write Python: <docstring>" -> the function itself, docstring and all, in a Markdown fence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return
    lines = source.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        if not docstring or not docstring.isascii():
            continue
        summary = " ".join(docstring.split("\n\n")[0].split())
        if not 15 <= len(summary) <= 160 or '"' in summary or "\\" in summary:
            continue
        head = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1]))
        body_lines = lines[node.body[1].lineno - 1 : node.end_lineno]
        body_lines = [line for line in body_lines if not line.strip().startswith("#")]
        body = textwrap.indent(textwrap.dedent("\n".join(body_lines)), "    ")
        answer = f'```python\n{head.rstrip()}\n    """{summary}"""\n{body.rstrip()}\n```'
        if len(answer) <= MAX_FUNCTION_CHARACTERS + len(summary) and answer.isascii() and head.strip():
            yield ChatPair("write_python", f"Write Python: {summary}", answer)


def build_corpus(documents: Path, library: Path) -> Corpus:
    """Read both folders; what is not ASCII, or is a licence or a change log, is left out."""
    corpus = Corpus(texts=([], []), pairs=([], []))
    for file in sorted(documents.rglob("*.rst.txt")):
        path = file.relative_to(documents).as_posix()
        source = file.read_text(encoding="utf-8")
        if path.startswith(SKIPPED_DOCUMENTS):
            continue
        held_out = is_held_out(path)
        text = join_paragraphs(source)
        corpus.texts[held_out].append(text.encode("ascii", "ignore").decode())
        corpus.pairs[held_out].extend(explain_pairs(source))
    for file in sorted(library.rglob("*.py")):
        path = file.relative_to(library).as_posix()
        if SKIPPED_FOLDERS.intersection(path.split("/")):
            continue
        source = file.read_text(encoding="utf-8", errors="ignore")
        if not source.isascii() or len(source) < 200:
            continue
        held_out = is_held_out(path)
        corpus.texts[held_out].append(source.expandtabs(4))
        corpus.pairs[held_out].extend(write_python_pairs(source))
    return Corpus(corpus.texts, _without_repeats(corpus.pairs))


def _without_repeats(pairs: tuple[list[ChatPair], list[ChatPair]]) -> tuple[list[ChatPair], list[ChatPair]]:
    """One pair per prompt; a held-out prompt or answer that also occurs in training is no longer held out."""
    training = {pair.prompt: pair for pair in reversed(pairs[0])}
    answers = {pair.answer for pair in training.values()}
    held_out = {pair.prompt: pair for pair in reversed(pairs[1])}
    kept = [pair for prompt, pair in held_out.items() if prompt not in training and pair.answer not in answers]
    return list(training.values())[::-1], kept[::-1]


def save_corpus(corpus: Corpus, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, split in enumerate(("train", "held_out")):
        (folder / f"{split}_texts.json").write_text(json.dumps(corpus.texts[index]))
        (folder / f"{split}_pairs.json").write_text(json.dumps([asdict(pair) for pair in corpus.pairs[index]]))


def load_corpus(folder: Path) -> Corpus:
    texts = [json.loads((folder / f"{split}_texts.json").read_text()) for split in ("train", "held_out")]
    raw = [json.loads((folder / f"{split}_pairs.json").read_text()) for split in ("train", "held_out")]
    pairs = [[ChatPair(**fields) for fields in split] for split in raw]
    return Corpus((texts[0], texts[1]), (pairs[0], pairs[1]))
