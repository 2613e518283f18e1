"""What a terminal waits for: help and `lowres config` load neither PyTorch nor NumPy."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "tqdm", "yaml", "safetensors")


@pytest.mark.parametrize(
    "arguments",
    [[], ["config"], ["config", "--help"], ["completion", "--line", "lowres train x --set m"]],
    ids=" ".join,
)
def test_what_answers_at_once_loads_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from lowres.cli import main\n"
        f"try: main({arguments})\n"
        "except SystemExit: pass\n"
        f"print('loaded:', *(name for name in {HEAVY} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"
