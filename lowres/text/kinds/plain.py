"""Text as it is: a document per file, or several with a separator between them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lowres.text.kinds.registry import Kind, Rank, register
from lowres.text.opening import opened
from lowres.text.source import BadFileError, File, Source

# how GPT-2's documents, and many text files made for it, are separated
END_OF_TEXT = "<|endoftext|>"
SOURCE_CODE, OTHER = "source code", "other text"
_PIECE = 1 << 20
# MediaWiki, PubMed, Stack Exchange
_DUMP = re.compile(rb"<mediawiki\b|<PubmedArticleSet\b|<row Id=")
_DUMP_HEAD = 1 << 10
CODE = (
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".hh", ".cu", ".cuh", ".java", ".js", ".jsx",
    ".mjs", ".ts", ".tsx", ".go", ".rs", ".rb", ".php", ".cs", ".swift", ".kt", ".kts", ".scala", ".hs",
    ".ml", ".mli", ".lua", ".pl", ".pm", ".r", ".jl", ".m", ".mm", ".f", ".f90", ".f95", ".for", ".ada",
    ".adb", ".ads", ".pas", ".d", ".dart", ".ex", ".exs", ".erl", ".clj", ".cljs", ".el", ".lisp", ".scm",
    ".rkt", ".vb", ".fs", ".fsx", ".nim", ".zig", ".v", ".sv", ".vhd", ".vhdl", ".asm", ".s", ".sh", ".bash",
    ".zsh", ".fish", ".ps1", ".bat", ".sql", ".css", ".scss", ".less", ".vue", ".svelte", ".proto", ".thrift",
    ".cmake", ".mk", ".gradle", ".tf", ".sol", ".glsl", ".hlsl", ".wgsl", ".tex", ".lean", ".coq", ".thy",
    ".agda", ".tcl", ".awk", ".groovy", ".cl",
)  # fmt: skip
MARKUP = (".md", ".markdown", ".mdx", ".rst", ".adoc", ".org", ".html", ".htm", ".xhtml", ".wiki")


def read(file: File, source: Source) -> Iterator[str]:
    """The documents of a text file."""
    with opened(file) as stream:
        separator = source.separator if source.separator is not None else file.separator
        if separator:
            yield from _separated(file.path, stream, separator, source.encoding)
        else:
            yield decoded(file.path, stream.read(), encoding=source.encoding)


def marker_in(head: bytes) -> str | None:
    """The separator that the beginning of a text file shows, if it has lines that are nothing else."""
    lines = head.replace(b"\r\n", b"\n").split(b"\n")
    return END_OF_TEXT if END_OF_TEXT.encode() in lines else None


def is_text(head: bytes) -> bool:
    """Whether the beginning of a file is UTF-8 without NUL. It may end inside a character."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def dump(head: bytes) -> str | None:
    """Why a file that begins so is no text as it is: a dump of a data base of articles."""
    found = _DUMP.search(head[:_DUMP_HEAD])
    return f"an XML dump ({found[0].decode()}); extract its text to .txt or .jsonl first" if found else None


def decoded(path: Path, data: bytes, place: str = "", encoding: str | None = None) -> str:
    """`utf_8` without its byte order mark."""
    return utf_8(path, data, place, encoding).removeprefix("\ufeff")


def utf_8(path: Path, data: bytes, place: str, encoding: str | None = None) -> str:
    """The text of bytes. Raises BadFileError. place: which part of the file it is, for messages. encoding: of
    what is not UTF-8."""
    problem = ""
    for tried in ("utf-8", *((encoding,) if encoding else ())):
        try:
            text = data.decode(tried)
        except UnicodeDecodeError as error:
            problem = f"byte {error.start}" if tried == "utf-8" else f"{problem}, nor {tried}"
            continue
        # UTF-16 and most binary formats contain many NUL bytes; text has none
        if "\0" not in text:
            return text
        problem = "it holds NUL bytes"
    raise BadFileError(
        f"{path}{place}: not UTF-8 text ({problem}); set data.encoding to what it is (such as cp1252), leave "
        "it out with data.exclude, or set data.damaged=skip"
    )


def _separated(path: Path, stream: IO[bytes], separator: str, encoding: str | None) -> Iterator[str]:
    """The parts between separators, in memory for one part. Line ends beside a separator belong to it."""
    mark = separator.encode()
    held = bytearray()
    searched, row = 0, 0
    while piece := stream.read(_PIECE):
        held += piece
        while (end := held.find(mark, max(0, searched - len(mark) + 1))) >= 0:
            row += 1
            yield decoded(path, bytes(held[:end]), f" document {row}", encoding).strip("\r\n")
            del held[: end + len(mark)]
            searched = 0
        searched = len(held)
    yield decoded(path, bytes(held), f" document {row + 1}", encoding).strip("\r\n")


register(Kind("text", (".txt", ".text"), Rank.TEXT, read))
# WikiText; cameras write .raw too
register(Kind("raw text", (".raw", ".tokens"), Rank.TEXT, read, by_content=True))
register(Kind("markup", MARKUP, Rank.PROSE, read))
register(Kind(SOURCE_CODE, CODE, Rank.PROSE, read))
# by content; no suffix leads here
register(Kind(OTHER, (), Rank.PROSE, read))
