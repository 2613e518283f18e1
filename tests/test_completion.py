"""What a shell is told to complete."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowres.catalogue import RULES
from lowres.cli import main
from lowres.cli.completion import SCRIPTS, candidates
from lowres.cli.parser import SHELLS

CASES = {
    "lowres ch": ["checkpoint"],
    "lowres data ": ["inspect", "overlap", "prepare"],
    "lowres train c.toml --res": ["--resume", "--restart"],
    "lowres train c.toml --resume --set model.pres": ["model.preset="],
    "lowres train c.toml --set schedule.name=co": ["schedule.name=cosine", "schedule.name=constant"],
    "lowres train --set=train.keep_b": ["--set=train.keep_best="],
    "lowres sweep c.toml --grid optim.name=": [f"optim.name={name}" for name in RULES],
    "lowres export runs/a out --dtype q": ["q8_0"],
    "lowres export runs/a out --dtype=q": ["--dtype=q8_0"],
    "lowres completion ": [*SHELLS],
    # files, or nothing that is known
    "lowres train ": [],
    "lowres train 'my con": [],
    "lowres train c.toml --run ": [],
    "lowres train c.toml --set model.dim=1": [],
    "lowres data prepare a --tokenizer ": [],
    "lowres sample 'a b' --tokens 3 --temp": ["--temperature"],
    "lowres nonsense ": [],
    "lowres completion bash ": [],
}


@pytest.mark.parametrize("line", CASES)
def test_candidates(line: str) -> None:
    wanted = CASES[line]
    if line == "lowres nonsense ":
        assert "train" in candidates(line)
    else:
        assert candidates(line) == wanted


def test_data_options_know_keys_of_data_only() -> None:
    found = candidates("lowres data prepare x y --set ")
    assert "data.separator=" in found and all(key.startswith("data.") for key in found)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert script == SCRIPTS[shell] and "lowres completion --line" in script
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=script, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    assert main(["completion"]) == 2


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
@pytest.mark.parametrize(
    "line, wanted",
    [
        ("lowres checkpoint ", "list verify"),
        ("lowres train x --set schedule.name=w", "wsd"),  # bash has broken the word at =
    ],
)
def test_in_bash(line: str, wanted: str) -> None:
    program = (
        f'lowres() {{ "{sys.executable}" -m lowres "$@"; }}\n{SCRIPTS["bash"]}'
        f'COMP_LINE="{line}" COMP_POINT={len(line)}; _lowres; echo "${{COMPREPLY[*]}}"'
    )
    here = os.environ | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True, env=here)
    assert done.stdout.split() == wanted.split() and not done.stderr
