#!/usr/bin/env bash
# torch 2.13.0 (CPU build): who can reach a launcher whose rendezvous is at localhost.
#
# A guess: `torchrun --standalone`, or rdzv_endpoint="localhost:0", listens on 127.0.0.1, as the address says. Seen:
# its TCPStore listens on all interfaces of the machine, without a password, and so does a second one for the ranks.
# The c10d rendezvous keeps its state there as a pickle, and unpickles what it finds. PyTorch's security policy says
# that its distributed features are for trusted networks; a job on one machine is no exception.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/look.py" <<'PY'
import os

import torch
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

parent = os.getppid()
inodes = {os.readlink(f"/proc/{parent}/fd/{name}") for name in os.listdir(f"/proc/{parent}/fd")}
found = []
for table in ("tcp", "tcp6"):
    for line in open(f"/proc/net/{table}").read().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:  # listens, and is the launcher's
            found.append(fields[1].split(":")[0])
everywhere = [address for address in found if set(address) == {"0"}]
print(f"torch {torch.__version__}: the launcher listens on {len(found)} ports, {len(everywhere)} on all interfaces")
unpickles = "pickle.loads(" in open(dynamic_rendezvous.__file__).read()
print("its rendezvous unpickles what is in the store:", unpickles)
assert everywhere and len(everywhere) == len(found) and unpickles, "that changed"
PY
for arguments in "--standalone" "--rdzv-backend=c10d --rdzv-endpoint=localhost:0"; do
    echo "torchrun $arguments"
    # shellcheck disable=SC2086
    "$folder/venv/bin/torchrun" $arguments --nproc-per-node=1 "$folder/look.py" 2>/dev/null
done
