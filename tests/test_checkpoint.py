"""Checkpoints are whole or absent, verified, and read into place."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowres import checkpoint
from lowres.errors import UserError
from lowres.memory import LiveTensors


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
    return checkpoint.save(folder, step, units, {"tokens": step * 10}, keep)


def test_round_trip_and_format(tmp_path: Path) -> None:
    saved = save(tmp_path, 12)
    assert saved.name == "step_00000012" and checkpoint.verify(saved) == []
    assert checkpoint.load_state(saved) == {"tokens": 120, "step": 12}
    into = {k: torch.zeros_like(t) for k, t in tensors().items()}
    checkpoint.load_unit(saved, "layers.0", into)
    # the library reads what we wrote, and we read what it would
    library = load_file(saved / "layers.0.safetensors")
    for name, t in tensors(1).items():
        assert torch.equal(into[name], t) and torch.equal(library[name], t)


def test_loading_needs_no_second_copy(tmp_path: Path) -> None:
    big = {"w": torch.randn(1000, 1000)}
    saved = checkpoint.save(tmp_path, 1, [("embed", big)], {}, 0)
    into = {"w": torch.zeros(1000, 1000)}
    with LiveTensors() as live:
        checkpoint.load_unit(saved, "embed", into)
    assert torch.equal(into["w"], big["w"])
    assert live.peak <= 4_000_000  # the tensor itself, seen through its view


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
    found, notes = checkpoint.newest_valid(tmp_path)
    assert found == old and len(notes) == 1 and str(new) in notes[0]


def test_keeps_the_newest_and_clears_what_a_kill_left(tmp_path: Path) -> None:
    (tmp_path / "step_00000001.unfinished").mkdir()
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000010"]


def test_a_failing_disk_leaves_the_old_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        save(tmp_path, 2)
    assert checkpoint.find(tmp_path) == [old] and checkpoint.verify(old) == []


def test_every_tensor_must_be_used_and_fit(tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    fewer = {k: t for k, t in tensors().items() if k != "e"}
    with pytest.raises(UserError, match="other tensors"):
        checkpoint.load_unit(saved, "embed", fewer)
    checkpoint.load_unit(saved, "embed", fewer, all_used=False)
    with pytest.raises(UserError, match="norm is missing or of another shape or type"):
        checkpoint.load_unit(saved, "embed", tensors() | {"norm": torch.zeros(2)})
