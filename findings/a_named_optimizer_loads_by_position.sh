#!/usr/bin/env bash
# torch 2.13.0 (CPU build): torch.optim.AdamW(model.named_parameters()), saved and loaded in another order.
#
# A guess: an optimizer that was given names, and whose state_dict holds them (`param_names`), gives each parameter
# the moments that were saved under its name, or refuses. Seen: the position alone decides. Where two parameters have
# one shape, each gets the other's moments without a word, and the next step differs from that of the same order.
# The optimizer then also carries the saved names: it calls a parameter by the name of the other, so saving again
# makes the mistake permanent. The documentation says that names do not affect loading.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch

print("torch", torch.__version__)
a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
saved = torch.optim.AdamW([("a", a), ("b", b)])
a.grad, b.grad = torch.full((2,), 1.0), torch.full((2,), -5.0)
saved.step()
state = saved.state_dict()
print("saved: ", state["param_groups"][0]["param_names"], [s["exp_avg"][0].item() for s in state["state"].values()])

other = torch.optim.AdamW([("b", b), ("a", a)])
other.load_state_dict(state)
found = {name: other.state[p]["exp_avg"][0].item() for name, p in (("a", a), ("b", b))}
first = "a" if other.param_groups[0]["params"][0] is a else "b"
print("loaded in the order b, a: moments", found)
print(f"the optimizer calls its first parameter {other.param_groups[0]['param_names'][0]}; it is {first}")
assert torch.equal(other.state[a]["exp_avg"], saved.state[b]["exp_avg"]), "names count now"
assert torch.equal(other.state[b]["exp_avg"], saved.state[a]["exp_avg"]), "names count now"
assert (first, other.param_groups[0]["param_names"]) == ("b", ["a", "b"])
PY
