#!/usr/bin/env bash
# transformers 5.24.0, tokenizers 0.23.3: AutoTokenizer on a folder whose config.json says qwen2.
#
# A guess: a tokenizer.json with tokenizer_class = "PreTrainedTokenizerFast" is loaded as it is; config.json describes
# the model, and a model can be trained with any tokenizer. Seen: for llama and mistral that is so. With model_type
# qwen2, AutoTokenizer takes Qwen2Tokenizer whatever tokenizer_class says, and that builds a byte-level BPE of its own
# from vocabulary and merges, with Qwen's normaliser and splitting. A tokenizer that writes spaces as U+2581 gives
# other ids, mostly unknown ones, and loses the spaces, without a word. PreTrainedTokenizerFast.from_pretrained reads
# the same folder right. Whoever writes a model of this type with a tokenizer of their own has to compare the ids.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3
cat > "$folder/look.py" <<'PY'
import json
from pathlib import Path

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
text = "the cat sat on the mat"
made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
made.train_from_iterator([text] * 9, trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
wanted = made.encode(text).ids
found = {}
for kind in ("llama", "mistral", "qwen3", "qwen2"):
    folder = Path(kind)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    read = AutoTokenizer.from_pretrained(kind)
    ids = read(text, add_special_tokens=False)["input_ids"]
    found[kind] = ids == wanted
    print(f"{kind}: {type(read).__name__}, ids {'equal' if ids == wanted else 'differ'}, decodes to {read.decode(ids)!r}")
    direct = PreTrainedTokenizerFast.from_pretrained(kind)
    assert direct(text, add_special_tokens=False)["input_ids"] == wanted
assert found["llama"] and found["mistral"]
assert not found["qwen2"], "the tokenizer of a qwen2 is loaded as it is now"
PY
(cd "$folder" && HF_HOME="$folder/home" HF_HUB_OFFLINE=1 venv/bin/python look.py 2> err) || { cat "$folder/err"; exit 1; }
