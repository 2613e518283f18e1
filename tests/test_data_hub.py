"""Streams: a lost connection loses no document and doubles none, and waiting is never silent."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowres.errors import UserError
from lowres.text import documents, hub, numbered_documents

datasets = pytest.importorskip("datasets")
ROWS = [f"document {i}" for i in range(90)]


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A data set of three files."""
    for part in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in ROWS[30 * part : 30 * part + 30]]
        (tmp_path / f"train-{part}.jsonl").write_text("".join(lines))
    return f"hf:{tmp_path}"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said; and no pauses."""
    lines: list[str] = []
    monkeypatch.setattr(hub, "say", lines.append)
    monkeypatch.setattr(hub, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(hub, "FIRST_PAUSES", (0, 0))
    monkeypatch.setattr(hub, "_reached", set())
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
def test_lost_connection(
    source: str, said: list[str], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    breaking(monkeypatch, [10, 25, 0, 0, 45], error)
    assert list(documents(source)) == ROWS
    assert len(said) == 5 and all(f"{source}: connection lost" in line for line in said)


def test_a_version_whose_state_stops_is_not_asked_for_it(
    source: str, said: list[str], monkeypatch: pytest.MonkeyPatch
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
    assert list(documents(source)) != ROWS  # so it would be
    said.clear()
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "__version__", "5.0.0")
        breaking(patch, [10, 25, 5], error)
        assert list(documents(source)) == ROWS and len(said) == 3


@pytest.mark.parametrize("error", NOT_LOST, ids=repr)
def test_errors_of_the_data_set_are_not_tried_again(
    source: str, said: list[str], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    breaking(monkeypatch, [10], error)
    rows = documents(source)
    assert [next(rows) for _ in range(10)] == ROWS[:10]
    with pytest.raises(UserError, match=type(error).__name__):
        next(rows)
    assert not said


@pytest.mark.parametrize("start", [0, 1, 29, 30, 31, 75])
@pytest.mark.parametrize("stop", [0, 1, 13])
def test_a_stream_that_goes_on_somewhere_may_be_lost_too(
    source: str, said: list[str], monkeypatch: pytest.MonkeyPatch, start: int, stop: int
) -> None:
    breaking(monkeypatch, [stop], ConnectionResetError())
    assert list(numbered_documents(source, start)) == list(enumerate(ROWS))[start:]
    assert len(said) == 1


def test_patience_ends_and_begins_again_with_each_row(
    source: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, [5, 0, 0, 1, 0, 0, 0], ConnectionResetError())
    rows = documents(source)
    assert [next(rows) for _ in range(6)] == ROWS[:6]
    with pytest.raises(UserError, match=r"ConnectionResetError.*the same command again"):
        next(rows)
    assert len(said) == 6


def test_pauses_grow_to_ten_minutes() -> None:
    assert list(hub.PAUSES) == sorted(hub.PAUSES) and hub.PAUSES[0] == 1 and max(hub.PAUSES) == 60
    assert 590 < sum(hub.PAUSES) < 620


def test_the_data_set_is_opened_again_if_it_could_not_be_opened(
    source: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, tries = datasets.load_dataset, [0]

    def failing(*arguments: Any, **options: Any) -> Any:
        tries[0] += 1
        if tries[0] < 3:
            raise ConnectionError("Couldn't reach the hub")
        return load(*arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", failing)
    assert list(documents(source)) == ROWS and len(said) == 2
    # a hub that never answered is not waited for as long
    tries[0] = -10
    with pytest.raises(UserError, match=r"data.source=PATH"):
        list(documents(f"{source}::train"))
    assert tries[0] == -7
    tries[0] = 0
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="Couldn't reach"):
        list(documents(source))
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

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Plain())
    assert list(numbered_documents("hf:x", 5)) == list(enumerate(ROWS))[5:]
    assert len(said) == 1


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_long_wait_is_one_line(source: str, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SILENCE", 0.05)
    load = datasets.load_dataset
    read = datasets.IterableDataset.__iter__

    def slow(*arguments: Any, **options: Any) -> Any:
        wait_until(lambda: len(said) == 1)
        return load(*arguments, **options)

    def slow_rows(self: Any) -> Iterator[Any]:
        for count, row in enumerate(read(self)):
            if count == 50:
                wait_until(lambda: len(said) > 1)
            yield row

    monkeypatch.setattr(datasets, "load_dataset", slow)
    monkeypatch.setattr(datasets.IterableDataset, "__iter__", slow_rows)
    assert list(documents(source)) == ROWS
    assert set(said) == {f"waiting for {source}: no answer yet"}


def test_the_time_of_the_reader_is_not_waiting(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SILENCE", 0.01)
    watch = hub._Watch("waiting")
    wait_until(lambda: said)
    numbers = watch.over([1, 2])
    next(numbers)
    assert watch._since is None
    said.clear()
    time.sleep(0.05)
    watch.end()
    assert not said
