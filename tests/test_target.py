"""Code behaves by the kind of device, also in a plan for another kind."""

import pytest
import torch

from lowres import target
from lowres.storage import compute_dtype
from lowres.target import chunks, kind_of, planned_for, row_chunks
from tests.helpers import CPU


def test_a_plan_works_as_on_its_device() -> None:
    assert kind_of(CPU) == "cpu" and kind_of(torch.device("cuda")) == "cuda"
    with pytest.raises(ZeroDivisionError), planned_for("cuda"):
        assert kind_of(CPU) == "cuda" and compute_dtype("auto", CPU) == torch.bfloat16
        assert row_chunks((1 << 13, 1 << 10), CPU)[0] == slice(0, target.CHUNK_CUDA >> 10)
        with planned_for("cpu"):
            assert kind_of(torch.device("cuda")) == "cpu"
        assert kind_of(CPU) == "cuda"
        raise ZeroDivisionError
    assert kind_of(CPU) == "cpu" and compute_dtype("auto", CPU) == torch.float32


def test_chunks_cover_everything_but_in_a_brief_trace() -> None:
    for numel, size in ((10, 3), (9, 3), (2, 3), (0, 3)):
        found = chunks(numel, size)
        assert [i for part in found for i in range(part.start, part.stop)] == list(range(numel))
        with planned_for("cpu", brief=True):
            assert chunks(numel, size) == found[: target.ENOUGH_CHUNKS]
