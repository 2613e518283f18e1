#!/usr/bin/env bash
# lm_eval 0.4.13, transformers 5.24.0 (torch 2.13.0, CPU): log-likelihoods of two requests about one text.
#
# A guess: the log-likelihood of an answer depends on its context and nothing else, whatever requests come with it.
# Seen: the model class `hf` keeps logits by the text without its last token (`logits_cache`, on by default). If two
# requests are the same text, divided into context and answer at different places, one run of the model serves both,
# and the shorter answer is read at the places of the longer one. Its score is wrong, without a word; alone, or with
# logits_cache=False, it is right. Tasks in which answers of one question begin alike can meet this.
# loglikelihood_rolling has a mistake of another kind: with a tokenizer that puts bos in front of a text, as LLaMA's
# do, bos is predicted from bos too, so the perplexity of a text has a term that no text has.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 'lm_eval[hf]==0.4.13'
cat > "$folder/look.py" <<'PY'
from importlib.metadata import version
from types import SimpleNamespace as Request

import tokenizers
import torch
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print("lm_eval", version("lm_eval"), "transformers", version("transformers"), "torch", torch.__version__)
words = ["<s>", "</s>", "<unk>", "a", "b", "c", "d"]
made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
torch.manual_seed(0)
sizes = dict(vocab_size=7, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=32, initializer_range=1.0)).eval()


def direct(ids, first):
    """The log-probability of ids from place `first` on."""
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logs[i - 1, ids[i]].item() for i in range(first, len(ids)))


wanted = [direct([0, 3, 4, 5, 6], 4), direct([0, 3, 4, 5, 6], 2)]
requests = [Request(args=("a b c", " d"), task_name="t"), Request(args=("a", " b c d"), task_name="t")]
print("by the model itself:   ", [round(x, 3) for x in wanted])
found = {}
for cache in (False, True):
    scores = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, logits_cache=cache)
    found[cache] = [score for score, _ in scores.loglikelihood(requests, disable_tqdm=True)]
    print(f"lm_eval, logits_cache={cache}:", [round(x, 3) for x in found[cache]])
assert all(abs(a - b) < 1e-3 for a, b in zip(found[False], wanted))
assert abs(found[True][0] - wanted[0]) > 0.1, "the cache gives each answer its own place now"

(rolling,) = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2).loglikelihood_rolling(
    [Request(args=("a b",), task_name="t")], disable_tqdm=True
)
print(f"the text 'a b': {direct([0, 3, 4], 1):.3f}; rolling: {rolling:.3f}, which is that of bos a b after bos")
assert abs(rolling - direct([0, 0, 3, 4], 1)) < 1e-3 and abs(rolling - direct([0, 3, 4], 1)) > 1
PY
(cd "$folder" && HF_HOME="$folder/home" HF_HUB_OFFLINE=1 venv/bin/python look.py 2> err) || { cat "$folder/err"; exit 1; }
