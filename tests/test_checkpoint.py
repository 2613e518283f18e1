"""Checkpoints are whole or absent, verified, and read into place."""

import errno
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowres import checkpoint
from lowres.errors import DoesNotFit, UserError
from lowres.meter import LiveTensors
from lowres.storage import FORMATS
from tests.helpers import save_checkpoint


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randint(-127, 128, (30, 20), generator=generator, dtype=torch.int8),
        "w.scales": torch.rand(30, 1, generator=generator),
        "e": torch.randn(10, 4, generator=generator).bfloat16(),
        "norm": torch.tensor(1.5),
        "updates": torch.tensor(7),
    }


def save(folder: Path, step: int, keep: int = 0, seed: int = 0) -> Path:
    units = (("embed", tensors(seed)), ("layers.0", tensors(seed + 1)))
    return save_checkpoint(folder, step, units, keep)


def test_round_trip_and_format(tmp_path: Path) -> None:
    saved = save(tmp_path, 12)
    assert saved.name == "step_00000012" and checkpoint.verify(saved) == []
    assert checkpoint.load_state(saved) == checkpoint.State(
        step=12, tokens=120, data="", start=checkpoint.Start(batch_tokens=1)
    )
    into = {k: torch.zeros_like(t) for k, t in tensors().items()}
    checkpoint.load_unit(saved, "layers.0", into)
    # the library reads what we wrote, and we read what it would
    library = load_file(saved / "layers.0.safetensors")
    for name, t in tensors(1).items():
        assert torch.equal(into[name], t) and torch.equal(library[name], t)


def odd_tensors() -> dict[str, torch.Tensor]:
    """Every type, in sizes that leave the next tensor unaligned if the file's order does not see to it."""
    kinds = {name: torch.randint(0, 100, (3, 5)).to(dtype) for dtype, name in checkpoint.DTYPES.items()}
    return dict(reversed(kinds.items())) | {
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.5).bfloat16(),
        "transposed": torch.randn(7, 9).t(),
        "strided": torch.arange(40, dtype=torch.uint8)[::3],
        "largest": torch.tensor([torch.finfo(torch.float32).max, -0.0, 1e-45]),
        'a "name" in \u00fcnicode!': torch.ones(1),
    }


@pytest.mark.parametrize("on_host", [True, False])
def test_every_type_and_shape_is_what_the_library_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_host: bool
) -> None:
    monkeypatch.setattr(
        checkpoint.tensors, "PIECE_BYTES", 16
    )  # many pieces, some in the middle of an element
    monkeypatch.setattr(checkpoint.tensors, "_on_host", lambda _: on_host)
    wanted = odd_tensors()
    saved = save_checkpoint(tmp_path, 1, [("u", wanted)])
    assert checkpoint.verify(saved) == []
    save_file({k: t.contiguous() for k, t in wanted.items()}, saved / "library.safetensors")
    library = load_file(saved / "u.safetensors")
    assert library.keys() == wanted.keys()
    content = (saved / "u.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    assert start % 8 == 0 and header["__metadata__"] == {"format": "pt"}
    assert all(header[k]["data_offsets"][0] % t.element_size() == 0 for k, t in wanted.items())
    for unit in ("u", "library"):
        into = {k: torch.zeros_like(t) for k, t in wanted.items()}  # as strided as the original
        checkpoint.load_unit(saved, unit, into)
        for name, t in wanted.items():
            for got in (into[name], library[name]):
                assert got.dtype == t.dtype and got.shape == t.shape
                assert got.flatten().view(torch.uint8).equal(t.flatten().view(torch.uint8)), name


@pytest.mark.gpu
def test_a_device_passes_through_host_memory_in_pieces(tmp_path: Path) -> None:
    wanted = {"w": torch.randn(3000, 2000, device="cuda").bfloat16(), "updates": torch.tensor(3).cuda()}
    saved = save_checkpoint(tmp_path, 1, [("u", wanted)])
    library = load_file(saved / "u.safetensors")
    into = {k: torch.zeros_like(t) for k, t in wanted.items()}
    checkpoint.load_unit(saved, "u", into)
    for name, t in wanted.items():
        assert torch.equal(into[name], t) and torch.equal(library[name], t.cpu())


def test_loading_needs_no_second_copy(tmp_path: Path) -> None:
    big = {"w": torch.randn(1000, 1000)}
    saved = save_checkpoint(tmp_path, 1, [("embed", big)])
    into = {"w": torch.zeros(1000, 1000)}
    with LiveTensors() as live:
        checkpoint.load_unit(saved, "embed", into)
    assert torch.equal(into["w"], big["w"])
    assert live.peak["gpu"] < 1_000_000


PEAK = """
import sys
from pathlib import Path
import torch
from lowres import checkpoint
from tests.helpers import save_checkpoint

def memory(key):  # of this process; ru_maxrss would begin with its parent's
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) / 1024

def round_trip(step, unit):
    for on_host in (True, False):
        checkpoint.tensors._on_host = lambda _: on_host
        saved = save_checkpoint(Path(sys.argv[1]), step, [("u", unit)], 1)
        assert checkpoint.verify(saved) == []
        checkpoint.load_unit(saved, "u", unit)

unit = {str(i): torch.full((8 << 20,), float(i)) for i in range(4)}  # 4 of 32 MiB
round_trip(1, {"w": torch.ones(9)})  # loads what code there is to load
before = memory("VmRSS")
round_trip(2, unit)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_saving_and_loading_128_mib_needs_less_than_24(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 24


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest", "broken manifest"])
def test_damage_is_found_and_an_older_checkpoint_used(tmp_path: Path, damage: str) -> None:
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    victim = new / ("manifest.json" if "manifest" in damage else "embed.safetensors")
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(content[:-1])
    elif damage == "broken manifest":
        victim.write_text("{")
    else:
        victim.unlink()
    (problem,) = checkpoint.verify(new)
    assert victim.name in problem
    found, damaged = checkpoint.newest_valid(tmp_path)
    assert found == old and damaged == [(new, problem)]


def test_keeps_the_newest_and_clears_what_a_kill_left(tmp_path: Path) -> None:
    (tmp_path / "step_00000001.unfinished").mkdir()
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000010"]


@pytest.mark.parametrize("kind", ["pipe", "file", "link"])
def test_remains_that_are_no_folders_are_removed(tmp_path: Path, kind: str) -> None:
    for name in ("run/step_00000002.unfinished", "run/step_00000001.deleted"):
        rest = tmp_path / name
        rest.parent.mkdir(exist_ok=True)
        if kind == "pipe":
            os.mkfifo(rest)
        elif kind == "file":
            rest.write_text("x")
        else:
            (tmp_path / "other").mkdir(exist_ok=True)
            (tmp_path / "other/text").write_text("x")
            rest.symlink_to(tmp_path / "other")
    assert checkpoint.verify(save(tmp_path / "run", 2)) == []
    left = ["step_00000001.deleted"] if kind == "link" else []  # links of other steps are left alone
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [*left, "step_00000002"]
    assert kind != "link" or (tmp_path / "other/text").exists()


@pytest.mark.parametrize("failure", ["write", "sync", "sync of the name"])
def test_a_failing_disk_leaves_the_old_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    old = save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(descriptor: int) -> None:
        there = os.fstat(descriptor)
        named = (tmp_path / "step_00000002").exists() and os.path.samestat(there, tmp_path.stat())
        if named if failure == "sync of the name" else stat.S_ISREG(there.st_mode):
            raise OSError(errno.ENOSPC, "No space left on device")

    if failure != "write":
        monkeypatch.setattr(os, "fsync", full)
    try:
        if failure == "write":  # fails as a full disk does, in the middle of a file
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        with pytest.raises(OSError, match=r"No space left|File too large"):
            save_checkpoint(tmp_path, 2, [("u", {"w": torch.zeros(1 << 20)})])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [old] and checkpoint.verify(old) == []


@pytest.mark.parametrize("left", [-1, 100, 4])
def test_a_short_file_is_named_and_overwrites_nothing(tmp_path: Path, left: int) -> None:
    victim = save(tmp_path, 1) / "embed.safetensors"
    victim.write_bytes(victim.read_bytes()[:left])
    into = {k: torch.zeros_like(t) for k, t in tensors().items()}
    with pytest.raises(UserError, match=f"{victim}: is truncated"):
        checkpoint.load_unit(victim.parent, "embed", into)
    assert not any(t.any() for t in into.values())


@pytest.mark.parametrize(
    "existing, keep, needed",
    # at most keep + 1 at a time, those that exist included, and never less than the next one
    [(0, 2, 3), (1, 2, 2), (2, 2, 1), (5, 2, 1), (0, 1, 2), (0, 0, 1), (4, 0, 1)],
)
def test_disk_for_the_checkpoints_kept_and_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: int, keep: int, needed: int
) -> None:
    for step in range(existing):
        save(tmp_path, step)
    size = sum(f.stat().st_size for f in save(tmp_path / "other", 0).iterdir())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, needed * size + 20))
    checkpoint.require_disk(tmp_path, size, keep)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, needed * size - 20))
    with pytest.raises(DoesNotFit) as caught:
        checkpoint.require_disk(tmp_path, size, keep)
    # what helps, and only that
    assert ("train.keep_checkpoints" in str(caught.value)) == (needed > 1 and keep > 1)
    # an interrupted save gives its room back
    (tmp_path / "step_00000099.unfinished").mkdir()
    (tmp_path / "step_00000099.unfinished" / "embed.safetensors").write_bytes(bytes(100))
    checkpoint.require_disk(tmp_path, size, keep)
    save(tmp_path, 9)
    assert not list(tmp_path.glob("*.unfinished"))


def test_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/mine/checkpoints")
    checkpoint.require_disk(folder, 1, 2)
    with pytest.raises(
        DoesNotFit, match=r"runs/mine/checkpoints: the disk has [\d.]+ GiB.* 3221225472.00 GiB.*--run"
    ):
        checkpoint.require_disk(folder, 1 << 60, 2)
    assert not list(tmp_path.iterdir())


def test_every_tensor_must_be_used_and_fit(tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    fewer = {k: t for k, t in tensors().items() if k != "e"}
    with pytest.raises(UserError, match="other tensors"):
        checkpoint.load_unit(saved, "embed", fewer)
    checkpoint.load_unit(saved, "embed", fewer, all_used=False)
    with pytest.raises(UserError, match="norm is missing or has another shape or type"):
        checkpoint.load_unit(saved, "embed", tensors() | {"norm": torch.zeros(2)})


def test_every_number_format_can_be_saved() -> None:
    for found in FORMATS.values():
        assert {dtype for dtype, _ in found.fields((2, 2)).values()} <= checkpoint.DTYPES.keys(), found.name
