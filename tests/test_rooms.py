"""Slabs, the memory they hold, and how live tensors are counted."""

import pytest
import torch

from lowres.errors import DoesNotFit
from lowres.meter import LiveTensors, Meter
from lowres.rooms import GPU, HOST, Mover, Rooms
from tests.helpers import CPU


def test_slabs_are_exact_and_forgotten_when_freed() -> None:
    rooms = Rooms(CPU)
    one, two = rooms.slab("stash", HOST, 1001), rooms.slab("stash", GPU, 7)
    assert one.dtype == torch.uint8 and not one.any() and one.numel() == 1001
    view = one[:10].view(torch.int16)
    assert rooms.held() == {("stash", HOST): 1001, ("stash", GPU): 7}
    del one, two
    assert rooms.held() == {("stash", HOST): 1001}  # a view keeps it
    del view
    assert rooms.held() == {}


def test_memory_that_cannot_be_had_is_one_line() -> None:
    with pytest.raises(DoesNotFit) as caught:
        Rooms(CPU).slab("stash", HOST, 1 << 60)
    message = str(caught.value)
    assert "stash: 1073741824.00 GiB of host memory cannot be allocated" in message
    assert "\n" not in message and "memory.host_budget_gib" in message


class FaultError(RuntimeError):
    """Like the error of an accelerator."""


def test_what_is_no_lack_of_memory_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any call may report the failure of an earlier kernel; that is a bug, and a budget cannot help."""

    def fails_with(error: Exception) -> None:
        def failing(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(torch, "zeros", failing)

    for fault in (RuntimeError("CUDA error: misaligned address"), FaultError("CUDA error: an assert failed")):
        fails_with(fault)
        with pytest.raises(RuntimeError, match="CUDA error"):
            Rooms(CPU).slab("stash", GPU, 10)
    for lack in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError("cudaHostRegister: error 2")):
        fails_with(lack)
        with pytest.raises(DoesNotFit, match=r"lower memory\.budget_gib"):
            Rooms(CPU).slab("stash", GPU, 10)


class Stream:
    """Replaces a CUDA stream: records the streams for which it waits."""

    def __init__(self) -> None:
        self.waited: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.waited.append(other)


def test_joining_waits_for_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device waits, not the host: a step waits once, for its results, and these come after all copies."""
    computing, mover = Stream(), Mover(CPU)
    mover.join()  # on a CPU every copy is done when the call returns
    coming, going = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: computing)
    monkeypatch.setattr(mover, "_in", coming)
    monkeypatch.setattr(mover, "_out", going)
    mover.join()
    assert computing.waited == [coming, going]


def test_live_tensors_by_room_and_phase() -> None:
    rooms = Rooms(CPU)
    before = rooms.slab("weights", HOST, 1000)
    with LiveTensors(rooms) as live:
        assert live.current == {GPU: 0, HOST: 1000}
        inside = rooms.slab("stash", HOST, 500)
        rooms.phase = "backward"
        a = torch.empty(100, dtype=torch.uint8)
        b = a[10:]  # a view is not new memory
        c = a + 1
        del c
        rooms.phase = "update"
        with rooms.allocate_in(HOST):
            d = torch.empty(30, dtype=torch.uint8)
        e = torch.empty(5, dtype=torch.uint8)
    assert live.peak == {GPU: 200, HOST: 1530} and live.current == {GPU: 105, HOST: 1530}
    assert live.phases == {"backward": 200, "update": 105}
    del a, b, d, e, before, inside
    assert live.current == {GPU: 0, HOST: 0}
    live.reset()
    assert live.peak == {GPU: 0, HOST: 0} and live.phases == {}


def test_the_meter_counts_the_first_of_a_kind() -> None:
    rooms = Rooms(CPU)
    meter = Meter(rooms)
    slab = rooms.slab("stash", HOST, 1 << 20)
    for size in (1 << 20, 1 << 21):
        with meter.watch("step"):
            torch.empty(size, dtype=torch.uint8)
    readings = meter.readings()
    assert readings["peak_mem_gib"] == 2**-10 and readings["host_mem_gib"] == slab.numel() / 2**30
    assert readings["peak_rss_gib"] > 0.05


def test_copies_are_done_when_they_are_waited_for() -> None:
    mover = Mover(CPU)
    here, there = torch.zeros(5), torch.arange(5.0)
    mover.wait(mover.fetch([(here, there)]))
    assert torch.equal(here, there)
    mover.store([(there, here + 1)])
    mover.join()
    assert torch.equal(there, here + 1)
