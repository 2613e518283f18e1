#!/usr/bin/env bash
# transformers 5.24.0 and 4.57.6: a config.json that has rope_parameters and the older keys too; a tied head.
#
# A guess: version 5 writes rope_parameters in the place of rope_scaling and rope_theta, so where a file has both, for
# readers of both kinds, 5 takes the new key, and 4 the old ones. Seen: 5 takes rope_scaling first and ignores
# rope_parameters, without a word; only rope_theta outside loses against rope_parameters. So a file in which a tool has
# edited the new key keeps the old rotary embedding under both versions.
# A guess: tie_word_embeddings = true means that the head is the embedding. Seen: with a lm_head.weight of its own in
# the file, 4 ties and drops it; 5 keeps the head of the file and leaves the two untied. One folder, two models.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$folder/four" \
    transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check requests
cat > "$folder/look.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

major = int(transformers.__version__.split(".")[0])
print("transformers", transformers.__version__)
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
common = dict(model_type="llama", architectures=["LlamaForCausalLM"], max_position_embeddings=64, **sizes)
new = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}


def angle(**keys):
    """The slowest rotation of a model with this config.json."""
    place = Path("angle")
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(common | keys))
    config = transformers.AutoConfig.from_pretrained(place)
    return AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq[-1].item()


both = angle(rope_parameters=new, rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_theta=1e4)
base = 1 / 1e4 ** (6 / 8), 1 / 5e5 ** (6 / 8)
print(f"rope_scaling factor 2 beside rope_parameters factor 4: {base[0] / both:.2f} times as slow as base 1e4")
if major == 5:
    alone = angle(rope_parameters=new, rope_theta=1e4)
    print(f"only rope_theta beside it: {base[1] / alone:.2f} times as slow as base 5e5")
    assert abs(base[1] / alone - 4) < 1e-3
assert abs(base[0] / both - 2) < 1e-3, "rope_parameters counts now"

torch.manual_seed(0)
config = transformers.AutoConfig.from_pretrained("angle")
tensors = {k: v.clone() for k, v in AutoModelForCausalLM.from_config(config).state_dict().items()}
tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
tied = Path("tied")
tied.mkdir(exist_ok=True)
(tied / "config.json").write_text(json.dumps(common | {"tie_word_embeddings": True}))
save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
model = AutoModelForCausalLM.from_pretrained(tied)
own = torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
print("tie_word_embeddings beside another head in the file:", "the head of the file" if own else "the embedding")
assert own == (major == 5)
PY
for path in "" "$folder/four"; do
    (cd "$folder" && PYTHONPATH=$path HF_HOME="$folder/home" HF_HUB_OFFLINE=1 venv/bin/python look.py 2> err) \
        || { cat "$folder/err"; exit 1; }
done
