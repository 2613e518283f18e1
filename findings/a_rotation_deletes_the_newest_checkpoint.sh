#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0: Accelerator.save_state() with automatic_checkpoint_naming and total_limit=2.
#
# A guess: the oldest checkpoint is deleted once a newer one is on the disk, so with a limit of 2 there is always a
# whole one; load_state() takes the newest. Seen, on a full disk (here a limit on file sizes) and after a restart:
# - The oldest is deleted first, and a save that failed counts as a checkpoint. Tried again, save_state deletes the last
#   whole one and then refuses, as the folder of the failed one is in its way. Nothing is left.
# - After load_state() numbers begin at 0 again (save_iteration is not restored). Age is judged by the number, so each
#   save deletes what the save before it wrote, and keeps the checkpoint of before the restart; load_state() takes that
#   one, without a word. When the numbers meet, save_state deletes one more and raises ValueError.
# So whoever resumes must set project_configuration.iteration to the next number, and move a failed save away before
# the next one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check accelerate==1.15.0 torch==2.13.0 numpy==2.4.6
cat > "$folder/look.py" <<'PY'
import os
import resource
import signal
import sys

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load_file

# a process is a session; the weight is the step
session, project, width = sys.argv[1], sys.argv[2], 300
accelerator = Accelerator(
    cpu=True,
    project_config=ProjectConfiguration(project_dir=project, automatic_checkpoint_naming=True, total_limit=2),
)
model = accelerator.prepare(torch.nn.Linear(width, width, bias=False))


def checkpoints():
    """The step of each checkpoint; None for one without weights."""
    found, root = {}, f"{project}/checkpoints"
    for name in sorted(os.listdir(root)):
        file = f"{root}/{name}/model.safetensors"
        found[name] = int(load_file(file)["weight"][0, 0]) if os.path.exists(file) else None
    return found


def save(step):
    with torch.no_grad():
        model.weight.fill_(step)
    try:
        accelerator.save_state()
        how = "saved"
    except Exception as error:
        how = type(error).__name__
    print(f"  step {step}: {how:<17}", checkpoints())
    return how


if session == "begin":
    print("accelerate", accelerate.__version__)
    assert [save(step) for step in (1, 2, 3)] == ["saved"] * 3
    assert checkpoints() == {"checkpoint_1": 2, "checkpoint_2": 3}
elif session == "full":
    print("the disk is full:")
    assert [save(step) for step in (1, 2)] == ["saved"] * 2
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    save(3)
    assert checkpoints() == {"checkpoint_1": 2, "checkpoint_2": None}, "it writes first now"
    assert save(3) == "ValueError"
    assert checkpoints() == {"checkpoint_2": None}, "it keeps the whole one now"
elif session == "resume":
    accelerator.load_state()
    print(f"a new process loads step {int(model.weight[0, 0])} and goes on:")
    save(4)
    assert checkpoints() == {"checkpoint_0": 4, "checkpoint_2": 3}, "it counts on now"
    save(5)
    assert checkpoints() == {"checkpoint_1": 5, "checkpoint_2": 3}, "age is not the number any more"
    assert save(6) == "ValueError"
    assert checkpoints() == {"checkpoint_2": 3}, "it keeps the newest now"
elif session == "counted":
    accelerator.load_state()
    accelerator.project_configuration.iteration = 3
    print("its number set after loading:")
    assert [save(step) for step in (4, 5)] == ["saved"] * 2
    assert checkpoints() == {"checkpoint_3": 4, "checkpoint_4": 5}
elif session == "again":
    accelerator.load_state()
    print(f"another one loads step {int(model.weight[0, 0])}; it had trained to step 6")
    assert int(model.weight[0, 0]) == 3, "it takes the newest now"
PY
for session in begin resume again; do
    "$folder/venv/bin/python" -W ignore "$folder/look.py" "$session" "$folder/project" 2>/dev/null
done
for session in begin counted; do
    "$folder/venv/bin/python" -W ignore "$folder/look.py" "$session" "$folder/counted" 2>/dev/null
done
"$folder/venv/bin/python" -W ignore "$folder/look.py" full "$folder/full" 2>/dev/null
