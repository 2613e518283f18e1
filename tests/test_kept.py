"""Which checkpoints stay, and that nothing is lost or touched that should not be."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowres import checkpoint, disk
from lowres.checkpoint import Kept, NotFinite, Saver, State
from lowres.errors import UserError
from lowres.sealed import SEAL, seal
from tests.helpers import save_checkpoint


def units(value: float = 1.0) -> list[tuple[str, dict[str, torch.Tensor]]]:
    return [("embed", {"w": torch.full((3, 4), value), "updates": torch.tensor(3)})]


def saver(folder: Path, **rule: Any) -> Saver:
    return Saver(Kept(folder, **({"newest": 2} | rule)), beside=lambda _: False)


def run(saver: Saver, *steps: int, **state: Any) -> None:
    for step in steps:
        saver.save(
            units, State(step=step, tokens=0, data="", start=checkpoint.Start(batch_tokens=1), **state), {}
        )


def names(folder: Path) -> list[str]:
    return sorted(path.name.removeprefix("step_000000") for path in folder.iterdir())


def damage(folder: Path) -> None:
    content = bytearray((folder / "embed.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "embed.safetensors").write_bytes(content)


def test_the_newest_every_nth_and_the_best_stay(tmp_path: Path) -> None:
    one = saver(tmp_path, every=20, best=True)
    run(one, 5, 10)
    one.kept.best_step = 10
    run(one, 15, 20, 25, 30, 35, 40, 45)
    assert names(tmp_path) == ["10", "20", "40", "45"]
    assert [saved.step for saved in one.done()] == [5, 10, 15, 20, 25, 30, 35, 40, 45] and one.done() == []
    run(saver(tmp_path / "all", newest=0), 1, 2, 3)
    assert names(tmp_path / "all") == ["01", "02", "03"]


def test_what_is_not_known_to_be_good_takes_no_place(tmp_path: Path) -> None:
    """A resumed process knows the one that it started from; it deletes others once it has as many."""
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, units())
    damage(tmp_path / "step_00000030")
    found, damaged = checkpoint.newest_valid(tmp_path)
    assert found == tmp_path / "step_00000020" and [path.name for path, _ in damaged] == ["step_00000030"]
    one = saver(tmp_path, good={20})
    one.kept.set_aside(damaged[0][0])
    run(one, 21)
    assert names(tmp_path) == ["20", "21", "30.damaged"]
    run(one, 22, 30)
    assert names(tmp_path) == ["22", "30", "30.damaged"]
    # without being set aside it is in nobody's way either
    one = saver(tmp_path / "b", newest=1)
    (tmp_path / "b" / "step_00000099").mkdir(parents=True)
    run(one, 1, 2)
    assert names(tmp_path / "b") == ["02", "99"]


def test_nothing_is_deleted_through_a_link(tmp_path: Path) -> None:
    other, here = tmp_path / "other", tmp_path / "here"
    for step in (10, 20):
        save_checkpoint(other, step, units())
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    here.mkdir()
    for step in (10, 20):
        (here / f"step_000000{step}").symlink_to(other / f"step_000000{step}")
    one = saver(here, newest=1, good={20})
    run(one, 20, 21, 22)  # in the place of a link too
    assert names(here) == ["10", "20.damaged", "22"]
    linked = tmp_path / "linked"
    linked.symlink_to(other)
    (other / "step_00000030.unfinished").mkdir()
    one = saver(linked, newest=1, good={20})
    run(one, 21, 22)
    assert names(other) == ["10", "20", "22", "30.unfinished"]
    assert before.items() <= {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}.items()


def test_remains_are_removed_and_a_deletion_that_was_interrupted_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = saver(tmp_path, newest=1)
    run(one, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed after the first step of a deletion
        run(one, 2)
    assert names(tmp_path) == ["01.deleted", "02"] and checkpoint.find(tmp_path) == [
        tmp_path / "step_00000002"
    ]
    (tmp_path / "step_00000003.unfinished").mkdir()
    run(one, 4)
    assert names(tmp_path) == ["04"]


@pytest.mark.parametrize("name", ["step_²²²²²²²²", "step_1", "step_000000001", "step_-0000001", "step_", "x"])
def test_only_names_that_are_written_are_checkpoints(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, 1, units())
    (tmp_path / name).mkdir()
    assert [checkpoint.step_of(path) for path in checkpoint.find(tmp_path)] == [1]
    assert checkpoint.step_of(Path("step_100000000")) == 100_000_000


def test_a_full_disk_gets_the_room_of_what_would_go_anyway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "PAUSES", ())
    one = saver(tmp_path)
    run(one, 1, 2)
    real, room = disk.write_synced, {"full": True}

    def full(path: Path, parts: Any) -> None:
        if room["full"] and (tmp_path / "step_00000001").exists():
            raise OSError(28, "No space left on device")
        real(path, parts)

    monkeypatch.setattr(disk, "write_synced", full)
    run(one, 3)
    assert names(tmp_path) == ["02", "03"]
    monkeypatch.setattr(disk, "write_synced", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError):
        run(one, 4)
    assert names(tmp_path) == ["03"]  # at least one stays, whatever happens
    assert checkpoint.verify(tmp_path / "step_00000003") == []


def test_a_disk_that_returns_something_else_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "PAUSES", ())
    one = saver(tmp_path, newest=1)
    run(one, 1)
    rename = Path.rename
    sync = disk.sync_folder

    def rots(folder: Path) -> None:
        if folder.name.endswith(".unfinished"):
            damage(folder)
        sync(folder)

    monkeypatch.setattr(disk, "sync_folder", rots)
    with pytest.raises(OSError, match=r"embed.safetensors reads back differently"):
        run(one, 2)
    assert names(tmp_path) == ["01"] and Path.rename is rename


def test_an_error_once_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PAUSES", (0.0,))
    real, failures = os.fsync, iter([True])

    def once(descriptor: int) -> None:
        if next(failures, False):
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", once)
    run(saver(tmp_path), 7)
    assert names(tmp_path) == ["07"] and checkpoint.verify(tmp_path / "step_00000007") == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_nothing_that_is_not_finite_is_saved(tmp_path: Path, dtype: torch.dtype, number: float) -> None:
    wrong = torch.ones(1 << 20)
    wrong[-1] = number
    with pytest.raises(NotFinite, match="w"):
        save_checkpoint(tmp_path, 1, [("embed", {"w": wrong.to(dtype)})])
    assert list(tmp_path.iterdir()) == []


def test_beside_training_the_state_of_that_moment_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"w": torch.zeros(1000, 100), "e": torch.ones(7).bfloat16()[::2], "updates": torch.tensor(1)}
    one = Saver(Kept(tmp_path, 2), beside=lambda _: True)
    one.save(
        lambda: [("embed", weights)],
        State(step=1, tokens=0, data="", start=checkpoint.Start(batch_tokens=1)),
        {"x": b"text"},
    )
    for tensor in weights.values():
        tensor.fill_(9)
    one.finish()
    (saved,) = one.done()
    assert saved.step == 1 and saved.paused <= saved.seconds
    into = {name: torch.full_like(tensor, 5) for name, tensor in weights.items()}
    checkpoint.load_unit(tmp_path / "step_00000001", "embed", into)
    assert not into["w"].any() and bool((into["e"] == 1).all()) and into["updates"] == 1
    # what fails in the background is raised at the next occasion, once
    monkeypatch.setattr(disk, "PAUSES", ())
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    one.save(
        lambda: [("embed", weights)],
        State(step=2, tokens=0, data="", start=checkpoint.Start(batch_tokens=1)),
        {},
    )
    with pytest.raises(OSError, match="No space left"):
        one.finish()
    assert one.done() == [] and names(tmp_path) == ["01"]


# what is read back is not trusted


def resealed(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest[SEAL]
        change(manifest)
        (folder / "manifest.json").write_bytes(seal(manifest))

    return apply


def with_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change the header of a file, and give it the right checksum."""

    def apply(folder: Path) -> None:
        path = folder / "embed.safetensors"
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        size, digest = checkpoint.folder._digest(path)
        resealed(lambda m: m["files"].update({path.name: {"bytes": size, "blake2b": digest}}))(folder)

    return apply


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return apply


def state(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "state.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in content.items() if v != "gone"}))
        size, digest = checkpoint.folder._digest(path)
        resealed(lambda m: m["files"].update({"state.json": {"bytes": size, "blake2b": digest}}))(folder)

    return apply


ATTACKS: dict[str, Callable[[Path], Any]] = {
    "no files": resealed(lambda m: m.update(files={})),
    "no state": resealed(lambda m: m["files"].pop("state.json")),
    "another format": resealed(lambda m: m.update(format=3)),
    "the format of an older version": resealed(lambda m: m.update(format=True)),
    "another step": resealed(lambda m: m.update(step=3)),
    "a name outside": resealed(lambda m: m["files"].update({"../x": m["files"]["state.json"]})),
    "an absolute name": resealed(lambda m: m["files"].update({"/etc/passwd": m["files"]["state.json"]})),
    "the manifest itself": resealed(
        lambda m: m["files"].update({"manifest.json": {"bytes": 1, "blake2b": ""}})
    ),
    "a size of another type": resealed(lambda m: m["files"]["state.json"].update(bytes="9")),
    "no seal": lambda folder: (folder / "manifest.json").write_text(
        json.dumps({k: v for k, v in json.loads((folder / "manifest.json").read_text()).items() if k != SEAL})
    ),
    "not JSON": lambda folder: (folder / "manifest.json").write_bytes(b"\xff{"),
    "deep": lambda folder: (folder / "manifest.json").write_bytes(b'{"format":' + b"[" * 100_000),
    "a list": lambda folder: (folder / "manifest.json").write_bytes(b"[]"),
    "empty": lambda folder: (folder / "manifest.json").write_bytes(b""),
    "a pipe": replaced("manifest.json", os.mkfifo),
    "a pipe of tensors": replaced("embed.safetensors", os.mkfifo),
    "a folder": replaced("state.json", Path.mkdir),
    "a link out": replaced("state.json", lambda path: path.symlink_to("/etc/passwd")),
    "a link to itself": replaced("state.json", lambda path: path.symlink_to(path)),
    "a negative offset": with_header(lambda h: h["w"].update(data_offsets=[-8, 40])),
    "tensors that overlap": with_header(lambda h: h["w"].update(data_offsets=[0, 48])),
    "offsets beyond the end": with_header(lambda h: h["w"].update(data_offsets=[800, 848])),
    "one offset": with_header(lambda h: h["w"].update(data_offsets=[8])),
    "a shape that is too large": with_header(lambda h: h["w"].update(shape=[1 << 60, 1 << 60])),
    "an unknown type": with_header(lambda h: h["w"].update(dtype="F4")),
    "a type of another size": with_header(lambda h: h["w"].update(dtype="F16")),
    "no header": replaced("embed.safetensors", lambda path: path.write_bytes(bytes(8))),
    "a state of another step": state(step=3),
    "a state without tokens": state(tokens="gone"),
    "tokens in words": state(tokens="many"),
    "something unknown": state(more=1),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_whatever_is_wrong_with_a_checkpoint_it_is_damaged(tmp_path: Path, attack: str) -> None:
    good, bad = save_checkpoint(tmp_path, 1, units()), save_checkpoint(tmp_path, 2, units())
    assert checkpoint.verify(bad) == []
    ATTACKS[attack](bad)
    assert len(checkpoint.verify(bad)) == 1
    found, ((path, problem),) = checkpoint.newest_valid(tmp_path)
    assert found == good and path == bad and problem and "\n" not in problem
    if attack.startswith(("a pipe of", "a negative", "tensors", "offsets", "one", "a shape", "no header")):
        with pytest.raises(UserError, match=r"embed\.safetensors"):
            checkpoint.load_unit(bad, "embed", units()[0][1])


def test_every_flipped_bit_of_a_manifest_is_found_or_changes_nothing(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, units())
    path = folder / "manifest.json"
    content, unnoticed = path.read_bytes(), 0
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        if not checkpoint.verify(folder):
            unnoticed += 1
            assert json.loads(bytes(changed)) == json.loads(content)  # white space
    assert unnoticed < 200


def test_a_checkpoint_of_the_first_version_is_still_read(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, units())
    files = json.loads((folder / "manifest.json").read_text())["files"]
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    assert checkpoint.verify(folder) == [] and checkpoint.load(folder).step == 1
