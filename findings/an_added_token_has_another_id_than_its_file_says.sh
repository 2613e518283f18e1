#!/usr/bin/env bash
# tokenizers 0.23.3, transformers 5.24.0: the `id` of a token in `added_tokens` of a tokenizer.json.
#
# A guess: the id in the file is the token's id, or a file whose ids do not fit is refused. So a vocabulary of 1000
# pieces may have its pad token at 1023, the last row of a padded embedding, and tokens may be listed in any order.
# Seen: the ids are not read. Tokens that are not in the model's vocabulary get the next free ids in the order of the
# file, without an error or a warning: 1023 becomes 1000, the row of a token that a model with such a file has
# never seen; two that are listed the other way round change places. Saving writes the new ids. transformers does the
# same, also where `added_tokens_decoder` of tokenizer_config.json, keyed by id, says it again.
# A trainer must compare each `id` of the file with token_to_id, and refuse a file in which they differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3 transformers==5.24.0
cat > "$folder/look.py" <<'PY'
import json
import logging
import warnings
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

print("tokenizers", tokenizers.__version__, "transformers", transformers.__version__)
warnings.simplefilter("error")
said = []
listener = logging.Handler()
listener.emit = said.append
for name in (None, "tokenizers", "transformers"):
    logging.getLogger(name).addHandler(listener)
whole = Tokenizer(models.WordLevel({f"w{i}": i for i in range(1000)}, unk_token="w0"))
whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
whole.add_special_tokens(["<s>", "<pad>"])


def look(title, tokens, ids):
    """Write the file with these added tokens and ids, and return the ids that it is read with."""
    file = json.loads(whole.to_str())
    options = {k: v for k, v in file["added_tokens"][0].items() if k not in ("id", "content")}
    file["added_tokens"] = [{"id": i, "content": token} | options for token, i in zip(tokens, ids)]
    Path("model").mkdir(exist_ok=True)
    Path("model", "tokenizer.json").write_text(json.dumps(file))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "pad_token": "<pad>"}
    config["added_tokens_decoder"] = {str(i): {"content": token} | options for token, i in zip(tokens, ids)}
    Path("model", "tokenizer_config.json").write_text(json.dumps(config))
    read, auto = Tokenizer.from_file("model/tokenizer.json"), AutoTokenizer.from_pretrained("model")
    found = [read.token_to_id(token) for token in tokens]
    saved = [token["id"] for token in json.loads(read.to_str())["added_tokens"]]
    print(f"{title}: the file has {dict(zip(tokens, ids))}, read as {found}, saved as {saved}")
    assert found == read.encode(" ".join(tokens)).ids
    assert found == [auto.convert_tokens_to_ids(token) for token in tokens] == auto(" ".join(tokens))["input_ids"]
    assert sorted(found) == saved
    return found


assert look("one after the other", ["<s>", "<pad>"], [1000, 1001]) == [1000, 1001]
assert look("after a gap", ["<s>", "<pad>"], [1000, 1023]) == [1000, 1001], "the ids of the file count now"
assert look("in another order", ["<pad>", "<s>"], [1001, 1000]) == [1000, 1001], "the ids of the file count now"
print("warnings:", [record.getMessage() for record in said if "PyTorch" not in record.getMessage()])
assert not [record for record in said if "PyTorch" not in record.getMessage()]
PY
(cd "$folder" && HF_HOME="$folder/home" venv/bin/python look.py)
