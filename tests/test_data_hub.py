"""Streams: a lost connection loses no document and doubles none, and waiting is never silent."""

import json
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowres.errors import UserError
from lowres.text import connection, documents, numbered_documents, remote
from tests.fake_hub import FakeHub

datasets = pytest.importorskip("datasets")
ROWS = [f"document {i}" for i in range(90)]
LINES = "hf:x/lines"  # read by lowres
TYPED = "hf:x/arrow"  # read by `datasets`


def arrow(texts: list[str]) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    table = pa.table({"text": texts})
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=7)
    return bytes(sink.getvalue().to_pybytes())


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    """Data sets of three files."""
    hub = FakeHub()
    thirds = [ROWS[at : at + 30] for at in (0, 30, 60)]
    hub.put("x/lines", {f"train-{i}.jsonl": json_lines(texts) for i, texts in enumerate(thirds)})
    hub.put("x/arrow", {f"train-{i}.arrow": arrow(texts) for i, texts in enumerate(thirds)})
    yield hub
    hub.close()


@pytest.fixture
def hub(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    server.use(monkeypatch, tmp_path)
    return server


@pytest.fixture
def said(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said; and no pauses."""
    lines: list[str] = []
    monkeypatch.setattr(connection, "say", lines.append)
    monkeypatch.setattr(connection, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(connection, "FIRST_PAUSES", (0, 0))
    monkeypatch.setattr(connection, "_reached", set())
    monkeypatch.setattr(connection, "SILENCE", 300)  # a busy machine may be slow
    return lines


class Response:
    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


class HTTPError(OSError):
    """As huggingface_hub and requests raise it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} from the server")
        self.response = Response(status)


def breaking(monkeypatch: pytest.MonkeyPatch, breaks: list[int], error: BaseException) -> None:
    """Reading breaks after so many rows: the first time after breaks[0], then after breaks[1] more, ..."""
    read = datasets.IterableDataset.__iter__
    left = list(breaks)

    def failing(self: Any) -> Iterator[Any]:
        stop = left.pop(0) if left else None
        for count, row in enumerate(read(self)):
            if count == stop:
                raise error
            yield row

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", failing)


def breaking_bytes(monkeypatch: pytest.MonkeyPatch, breaks: list[int], error: Exception) -> None:
    """The same with bytes of remote files."""
    opened = remote._opened
    left = list(breaks)

    class Breaking:
        def __init__(self, file: Any) -> None:
            self.file = file

        def seek(self, at: int) -> None:
            self.file.seek(at)

        def read(self, count: int) -> bytes:
            data = bytes(self.file.read(count))
            if left and left[0] < len(data):
                left.pop(0)
                raise error
            if left:
                left[0] -= len(data)
            return data

        def close(self) -> None:
            self.file.close()

    def breaking(url: str) -> tuple[Any, int]:
        file, size = opened(url)
        return Breaking(file), size

    monkeypatch.setattr(remote, "_opened", breaking)
    for name in ("_BUFFER", "_LEAST", "_MOST"):
        monkeypatch.setattr(remote, name, 13)


def caused(error: BaseException) -> BaseException:
    outer = RuntimeError("reading failed")
    outer.__cause__ = error
    return outer


LOST: list[BaseException] = [
    ConnectionResetError(104, "Connection reset by peer"),
    TimeoutError(),
    socket.gaierror(-3, "Temporary failure in name resolution"),
    OSError(101, "Network is unreachable"),
    ConnectionError("Server Disconnected"),
    HTTPError(503),
    HTTPError(429),
    caused(HTTPError(500)),
    type("ReadError", (type("TransportError", (Exception,), {"__module__": "httpx2._exceptions"}),), {})("x"),
    type("ClientPayloadError", (Exception,), {"__module__": "aiohttp.client_exceptions"})("cut"),
]
NOT_LOST: list[BaseException] = [
    FileNotFoundError(2, "No such file"),
    ValueError("Bad split: x"),
    HTTPError(404),
    HTTPError(401),
    caused(HTTPError(403)),
    OSError(5, "Input/output error"),
    EOFError("the compressed file is cut"),
]


@pytest.mark.parametrize("error", LOST, ids=repr)
def test_lost_connection(said: list[str], monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    breaking(monkeypatch, [10, 25, 0, 0, 45], error)
    assert list(documents(TYPED)) == ROWS
    assert len(said) == 5 and all(f"{TYPED}: connection lost" in line for line in said)


@pytest.mark.parametrize("error", LOST, ids=repr)
def test_lost_connection_in_the_middle_of_a_file(
    said: list[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    breaking_bytes(monkeypatch, [40, 200, 0, 0, 1000], error)
    assert list(numbered_documents(LINES)) == list(enumerate(ROWS))
    assert len(said) == 5 and all(f"{LINES}: connection lost" in line for line in said)


def test_remote_bytes_are_those_of_the_file_wherever_they_are_read(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As parquet reads them: from anywhere, in any size."""
    data = bytes(random.Random(0).randbytes(5000))
    sha = hub.put("x/bytes", {"a.bin": data})
    monkeypatch.setattr(remote, "_LEAST", 10)
    monkeypatch.setattr(remote, "_MOST", 300)
    draw = random.Random(1)
    with remote.RemoteFile("x", f"hf://datasets/x/bytes@{sha}/a.bin").open() as file:
        assert file.seek(0, 2) == 5000 and file.read() == b"" and file.seek(-7, 2) == 4993
        assert file.read() == data[-7:] and file.seek(9999) == 9999 and file.read(1) == b""
        file.seek(0)
        for _ in range(300):
            if draw.random() < 0.4:
                file.seek(draw.choice([draw.randrange(5000), min(5000, file.tell() + draw.randrange(40))]))
            at, count = file.tell(), draw.choice([0, 1, 5, 50, 400])
            assert file.read(count) == data[at : at + count]


def test_a_server_that_ends_early_is_not_the_end_of_the_text(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, cuts = remote._opened, [500, 7]

    class Short:
        def __init__(self, data: bytes) -> None:
            self.data, self.at = data, 0

        def seek(self, at: int) -> None:
            self.at = at

        def read(self, count: int) -> bytes:
            return self.data[self.at : self.at + count]

        def close(self) -> None:
            pass

    def short(url: str) -> tuple[Any, int]:
        file, size = opened(url)
        return Short(file.read()[: cuts.pop() if cuts else None]), size

    monkeypatch.setattr(remote, "_opened", short)
    assert list(documents(LINES)) == ROWS
    assert len(said) == 2 and all("connection lost" in line for line in said)


def test_a_version_whose_state_stops_is_not_asked_for_it(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` 5.0.0: after `load_state_dict`, `state_dict` gives the same for ever."""
    stopped: dict[int, Any] = {}
    load, state = datasets.IterableDataset.load_state_dict, datasets.IterableDataset.state_dict

    def loaded(self: Any, value: Any) -> None:
        stopped[id(self)] = value
        load(self, value)

    monkeypatch.setattr(datasets.IterableDataset, "load_state_dict", loaded)
    monkeypatch.setattr(
        datasets.IterableDataset, "state_dict", lambda self: stopped.get(id(self)) or state(self)
    )
    error = ConnectionError("Server Disconnected")
    breaking(monkeypatch, [10, 25, 5], error)
    assert list(documents(TYPED)) != ROWS  # so it would be
    said.clear()
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "__version__", "5.0.0")
        breaking(patch, [10, 25, 5], error)
        assert list(documents(TYPED)) == ROWS and len(said) == 3


@pytest.mark.parametrize("error", NOT_LOST, ids=repr)
def test_errors_of_the_data_set_are_not_tried_again(
    said: list[str], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    breaking(monkeypatch, [10], error)
    rows = documents(TYPED)
    assert [next(rows) for _ in range(10)] == ROWS[:10]
    with pytest.raises(UserError, match=type(error).__name__):
        next(rows)
    assert not said


def test_errors_of_a_file_are_not_tried_again(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    breaking_bytes(monkeypatch, [1500], HTTPError(403))
    rows = documents(LINES)
    assert [next(rows) for _ in range(30)] == ROWS[:30]
    with pytest.raises(UserError, match=f"{LINES}: 403.*HTTPError"):
        list(rows)
    assert not said


@pytest.mark.parametrize("start", [0, 1, 29, 30, 31, 75])
@pytest.mark.parametrize("stop", [0, 1, 13])
def test_a_stream_that_goes_on_somewhere_may_be_lost_too(
    said: list[str], monkeypatch: pytest.MonkeyPatch, start: int, stop: int
) -> None:
    breaking(monkeypatch, [stop], ConnectionResetError())
    assert list(numbered_documents(TYPED, start)) == list(enumerate(ROWS))[start:]
    assert len(said) == 1


def test_patience_ends_and_begins_again_with_each_row(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, [5, 0, 0, 1, 0, 0, 0], ConnectionResetError())
    rows = documents(TYPED)
    assert [next(rows) for _ in range(6)] == ROWS[:6]
    with pytest.raises(UserError, match=r"ConnectionResetError.*the same command again"):
        next(rows)
    assert len(said) == 6


def test_pauses_grow_to_ten_minutes() -> None:
    assert (
        list(connection.PAUSES) == sorted(connection.PAUSES)
        and connection.PAUSES[0] == 1
        and max(connection.PAUSES) == 60
    )
    assert 590 < sum(connection.PAUSES) < 620


def test_the_data_set_is_opened_again_if_it_could_not_be_opened(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, tries = datasets.load_dataset_builder, [0]

    def failing(*arguments: Any, **options: Any) -> Any:
        tries[0] += 1
        if tries[0] < 3:
            raise ConnectionError("Couldn't reach the hub")
        return load(*arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset_builder", failing)
    assert list(documents(TYPED)) == ROWS and len(said) == 2
    # a hub that never answered is not waited for as long
    tries[0] = -10
    with pytest.raises(UserError, match=r"data.source=PATH"):
        list(documents(f"{TYPED}::train"))
    assert tries[0] == -7
    tries[0] = 0
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="Couldn't reach"):
        list(documents(TYPED))
    assert tries[0] == 1, "offline on purpose"


def test_a_data_set_that_cannot_say_where_it_is_is_read_from_its_beginning(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks = [40]

    class Plain:
        def __init__(self, start: int = 0) -> None:
            self.start = start

        def skip(self, count: int) -> Any:
            return Plain(self.start + count)

        def __iter__(self) -> Iterator[dict[str, str]]:
            for number in range(self.start, len(ROWS)):
                if breaks and number == breaks[0]:
                    breaks.pop()
                    raise ConnectionResetError
                yield {"text": ROWS[number]}

    class Builder:
        config, info, hash = None, type("Info", (), {"splits": None}), None

        def as_streaming_dataset(self, split: str) -> Plain:
            return Plain()

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: Builder())
    assert list(numbered_documents("hf:x/plain", 5)) == list(enumerate(ROWS))[5:]
    assert len(said) == 1


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_long_wait_is_one_line(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SILENCE", 0.05)
    load = datasets.load_dataset_builder
    read = datasets.IterableDataset.__iter__

    def slow(*arguments: Any, **options: Any) -> Any:
        wait_until(lambda: len(said) == 1)
        return load(*arguments, **options)

    def slow_rows(self: Any) -> Iterator[Any]:
        for count, row in enumerate(read(self)):
            if count == 50:
                wait_until(lambda: len(said) > 1)
            yield row

    monkeypatch.setattr(datasets, "load_dataset_builder", slow)
    monkeypatch.setattr(datasets.IterableDataset, "__iter__", slow_rows)
    assert list(documents(TYPED)) == ROWS
    assert set(said) == {f"waiting for {TYPED}: no answer yet"}


def test_the_time_of_the_reader_is_not_waiting(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SILENCE", 0.01)
    watch = connection.Watch("waiting")
    wait_until(lambda: said)
    numbers = watch.over([1, 2])
    next(numbers)
    assert watch._since is None
    said.clear()
    time.sleep(0.05)
    watch.end()
    assert not said
