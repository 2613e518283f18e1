#!/usr/bin/env bash
# torch 2.13.0: what a TorchDispatchMode that only looks at operations costs a process.
#
# A guess: a mode of one's own is a Python call for each operation, and nothing else is loaded. Seen: the first
# operation inside it imports torch._dynamo (with it 823 modules, about a second), because by default every mode asks
# the compiler to leave it alone. A mode whose classmethod `_should_skip_dynamo` returns False does not import it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/look.py" <<'PY'
import sys, time
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Look(TorchDispatchMode):
    if sys.argv[1] == "not skipped":

        @classmethod
        def _should_skip_dynamo(cls):
            return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


before = len(sys.modules)
with Look():
    entered = "torch._dynamo" in sys.modules
    began = time.perf_counter()
    torch.ones(2)
    seconds = time.perf_counter() - began
loaded = "torch._dynamo" in sys.modules
print(f"torch {torch.__version__}, {sys.argv[1]}: entered {entered}, after one operation {loaded}, "
      f"{len(sys.modules) - before} more modules, {seconds:.2f} s")
assert (entered, loaded) == (False, sys.argv[1] == "default"), "that changed"
PY
"$folder/venv/bin/python" "$folder/look.py" default
"$folder/venv/bin/python" "$folder/look.py" "not skipped"
