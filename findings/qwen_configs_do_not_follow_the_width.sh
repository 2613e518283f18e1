#!/usr/bin/env bash
# transformers 5.24.0: what a config of a LLaMA-shaped model means where a key is missing.
#
# A guess: as in LLaMA, num_key_value_heads is num_attention_heads and head_dim is hidden_size over the heads, where
# config.json does not say. Seen: Llama derives both; Qwen2 and Qwen3 take 32 key-value heads whatever the number of
# heads is, and Qwen3 takes a head_dim of 128 whatever the width is, so the projections of a 64 wide model with 4
# heads have 512 rows. Whoever writes or reads such a file must write, or ask for, both keys.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import transformers
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

print("transformers", transformers.__version__)
wanted = {LlamaConfig: (4, 16), Qwen2Config: (32, None), Qwen3Config: (32, 128)}
for kind, (heads, width) in wanted.items():
    config = kind(hidden_size=64, num_attention_heads=4)
    found = config.num_key_value_heads, getattr(config, "head_dim", None)
    print(f"{kind.__name__:<12} 64 wide, 4 heads: num_key_value_heads {found[0]}, head_dim {found[1]}")
    assert found == (heads, width), "that changed"
PY
