"""Where text comes from: every kind of source as one deterministic sequence of documents.

    stdlib                              the .py files of the running Python's standard library
    a file, a folder or a glob          .txt .md .py (one document per file), .jsonl .parquet (one document
                                        per row, column "text"); each also as .gz, .xz or .zst
    hf:<dataset>[:<config>[:<split>]]   streamed by the `datasets` library; <dataset> is a name on the
                                        Hugging Face hub or a local folder; default split: train

A document is identified by its *row*: its number in the source. Blank rows and unreadable files of the
library count too, so reading can continue from any row.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import logging
import lzma
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from lowres.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".py")
ROW_SUFFIXES = (".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
KNOWN = f"{', '.join(TEXT_SUFFIXES + ROW_SUFFIXES)}, each also with {', '.join(COMPRESSIONS)}"

# tests are a third of the library, and mostly data
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_SURROGATE = re.compile("[\ud800-\udfff]")


def is_stream(source: str) -> bool:
    """Whether the source is a data set of unknown length that is expensive to read twice."""
    return source.startswith("hf:")


def documents(source: str) -> Iterator[str]:
    """Every document of the source that is not blank, in a fixed order, without lone surrogates.

    Raises UserError, with one line that names the file, for anything that cannot be read, and at the end if
    there was no text at all.
    """
    for _, text in numbered_documents(source):
        yield text


def numbered_documents(source: str, start: int = 0) -> Iterator[tuple[int, str]]:
    """(row, document), beginning with row `start`; see `documents`."""
    empty = True
    first = start if is_stream(source) else 0
    rows = _stream_rows(source, start) if is_stream(source) else _rows(source)
    for row, text in enumerate(rows, first):
        if row >= start and text and not text.isspace():
            empty = False
            yield row, without_surrogates(text)
    if empty and start == 0:
        raise UserError(f"{source}: contains no text; set data.source to files with text")


def fingerprint(source: str) -> str:
    """A string that changes whenever the documents of the source may have changed.

    For local files it covers names, sizes and modification times, not the content, so it is fast for any
    size.
    """
    if is_stream(source):
        return source
    files = _files(source)
    if source == "stdlib":
        size = sum(file.stat().st_size for _, file in files)
        return f"python {platform.python_version()}, {len(files)} files, {size} bytes"
    digest = hashlib.blake2b(digest_size=16)
    for name, file in files:
        stat = file.stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def without_surrogates(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


# ---------------------------------------------------------------------------- local files


def _files(source: str) -> list[tuple[str, Path]]:
    """(name for sorting and fingerprint, path) of each file of a local source."""
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return [(name, file) for name, file in _walk(root, _NOT_LIBRARY) if file.suffix == ".py"]
    path = Path(source).expanduser()
    if path.is_dir():
        files = [(name, file) for name, file in _walk(path, set()) if _kind(file)]
        where = "in this folder"
    elif path.exists():
        files = [(path.name, path)] if _kind(path) else []
        where = "this file has another type"
    elif glob.has_magic(source):
        matches = sorted(glob.glob(str(path), recursive=True))
        files = [(name, Path(name)) for name in matches if _kind(Path(name)) and Path(name).is_file()]
        where = "among the files that it matches"
    else:
        raise UserError(
            f"{source}: no such file or folder; data.source is stdlib, a path, a glob or hf:<dataset>"
        )
    if not files:
        raise UserError(f"{source}: no file of a known type ({where}); known are {KNOWN}")
    return files


def _walk(root: Path, leave_out: set[str]) -> list[tuple[str, Path]]:
    """Every visible file below `root`, sorted by its path relative to it."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in leave_out and not name.startswith(".")]
        for name in names:
            file = Path(folder, name)
            if not name.startswith(".") and file.is_file():
                found.append((file.relative_to(root).as_posix(), file))
    return sorted(found)


def _kind(file: Path) -> str:
    """The suffix that says how to read the file; "" if it is unknown."""
    suffix = file.with_suffix("").suffix if file.suffix in COMPRESSIONS else file.suffix
    return suffix if suffix in TEXT_SUFFIXES + ROW_SUFFIXES else ""


def _rows(source: str) -> Iterator[str]:
    for _, file in _files(source):
        with _opened(file) as stream:
            if _kind(file) == ".jsonl":
                yield from _json_rows(file, stream)
            elif _kind(file) == ".parquet":
                yield from _parquet_rows(file, stream)
            else:
                yield _whole_text(file, stream, skip_other_encodings=source == "stdlib")


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed; an error while reading raises UserError that names the file."""
    try:
        with _decompressed(file) as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{file}: damaged or truncated ({_first_line(error)}); get the file again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({_first_line(error)})") from None


def _decompressed(file: Path) -> IO[bytes]:
    if file.suffix == ".gz":
        return cast(IO[bytes], gzip.open(file))
    if file.suffix == ".xz":
        return lzma.open(file)
    if file.suffix == ".zst":
        return io.BufferedReader(_ZstdReader(file), 1 << 20)
    return file.open("rb")


class _ZstdReader(io.RawIOBase):
    """Bytes of a .zst file with any number of frames. The reader in `zstandard` treats the end of a truncated
    file as the end of the text."""

    def __init__(self, file: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{file}: .zst files need the package zstandard: pip install zstandard") from None
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._file = file.open("rb")
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame and self._frame.eof else b""
            data = data or self._file.read(1 << 17)
            if not data:
                if self._frame and not self._frame.eof:
                    raise EOFError("the compressed data ends in the middle")
                return 0
            if not self._frame or self._frame.eof:
                self._frame = self._new_frame()
            try:
                self._ready = self._frame.decompress(data)
            except self._error as error:
                raise EOFError(str(error)) from None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _whole_text(file: Path, stream: IO[bytes], skip_other_encodings: bool) -> str:
    try:
        text = stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if skip_other_encodings:
            return ""
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); convert it or leave it out") from None
    # UTF-16 and most binary formats contain many NUL bytes; text has none
    if "\0" in text:
        raise UserError(f"{file}: not UTF-8 text (it holds NUL bytes); convert it or leave it out")
    return text


def _json_rows(file: Path, stream: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if line.isspace():
            yield ""
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{file}:{number}: not UTF-8 text; convert the file") from None
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{file}:{number}: not valid JSON ({_first_line(error)}); correct that line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f'{file}:{number}: a line must be a JSON object with a "text" column')
        yield _text_of(row, f"{file}:{number}")


def _parquet_rows(file: Path, stream: IO[bytes]) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file}: .parquet files need the package pyarrow: pip install pyarrow") from None
    # parquet is read from its end, and seeking in compressed data would decompress it many times
    seekable = io.BytesIO(stream.read()) if file.suffix in COMPRESSIONS else stream
    try:
        table = pyarrow.parquet.ParquetFile(seekable)
        if "text" not in table.schema_arrow.names:
            raise _no_text_column(str(file), table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=256, columns=["text"]):
            for row in batch.to_pylist():
                yield _text_of(row, str(file))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: not a complete parquet file ({_first_line(error)}); get the file again"
        ) from None


# ---------------------------------------------------------------------------- the hub


def _stream_rows(source: str, start: int) -> Iterator[str]:
    name, config, split = (source.removeprefix("hf:") + "::").split(":")[:3]
    if not name or source.count(":") > 3:
        raise UserError(f"{source}: write it as hf:<dataset>[:<config>[:<split>]]")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: hf: sources need the package datasets: pip install datasets") from None
    # if the hub cannot be reached, the error below already says so in one line
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        dataset = datasets.load_dataset(
            name, config or None, split=split or "train", streaming=True, trust_remote_code=False
        )
        for row in dataset.skip(start):
            yield _text_of(row, source)
    # all errors of `datasets` and its libraries are about the data set or the connection
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{source}: {_first_line(error)} ({type(error).__name__}); "
            "to train on local text instead: --set data.source=PATH, or make ... DATA=PATH"
        ) from None


def _text_of(row: dict[str, Any], place: str) -> str:
    if "text" not in row:
        raise _no_text_column(place, list(row))
    text = row["text"]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(
            f'{place}: the column "text" holds {type(text).__name__} values; it must hold strings'
        )
    return text


def _no_text_column(place: str, columns: list[str]) -> UserError:
    return UserError(
        f'{place}: no column "text"; found {", ".join(columns) or "none"}; rename the one with the text'
    )


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]
