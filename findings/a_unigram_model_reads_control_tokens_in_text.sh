#!/usr/bin/env bash
# tokenizers 0.23.3, sentencepiece 0.2.3: plain text that spells out a control token or a byte piece.
#
# A guess: with `encode_special_tokens = True`, which is there for that, no text becomes a control token: "</s>" in a
# web page is four characters. A byte piece such as "<0x0A>" is for a byte that has no other piece, never for these six
# characters. So it is in sentencepiece, and in tokenizers with a BPE model. Seen: a Unigram model of tokenizers looks
# up any string of its vocabulary, and control and byte pieces are among them; a control piece has the score 0, the
# best there is. "the </s> tag" ends a document, whatever the option says, and also where no special token was ever
# added; "press <0x0A>" is a line feed, and decodes as one. sentencepiece, where the vocabulary is from, tells kinds
# of pieces apart; tokenizer.json has none.
# (And the option is not in tokenizer.json nor in a pickle: issue 1839 of tokenizers.)
# A trainer with a Unigram model must look for these ids in the ids of plain text, or encode with sentencepiece.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3 sentencepiece==0.2.3
"$folder/venv/bin/python" - <<'PY'
import io
import random

import sentencepiece
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

print("tokenizers", tokenizers.__version__, "sentencepiece", sentencepiece.__version__)
rng = random.Random(0)
letters = "etaoinshrdlup<>/x0123456789A"
lines = [" ".join("".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(20)) for _ in range(500)]
file = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=file,
    model_type="unigram",
    vocab_size=400,
    byte_fallback=True,
    normalization_rule_name="identity",
    num_threads=1,
    minloglevel=2,
)
right = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
pieces = [(right.id_to_piece(i), right.get_score(i)) for i in range(right.get_piece_size())]


def wrap(model, special):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always"), decoders.Fuse()]
    )
    if special:
        tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.encode_special_tokens = True
    return tokenizer


unigram = wrap(models.Unigram(pieces, unk_id=0, byte_fallback=True), special=True)
bare = wrap(models.Unigram(pieces, unk_id=0, byte_fallback=True), special=False)
ids = {piece: i for i, (piece, _) in enumerate(pieces)}
bpe = wrap(models.BPE(ids, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True), special=True)
other = [line for line in lines if unigram.encode(line).ids != right.encode(line)]
assert other == [line for line in lines if "<s>" in line or "</s>" in line]  # the two agree on all other lines
for text, piece in (("the </s> tag", "</s>"), ("press <0x0A>", "<0x0A>")):
    print(f"{text!r}: sentencepiece {right.encode(text, out_type=str)}")
    assert ids[piece] not in right.encode(text) and right.decode(right.encode(text)) == text
    for name, tokenizer in (("Unigram", unigram), ("no special tokens", bare), ("BPE", bpe)):
        found = tokenizer.encode(text)
        print(f"  tokenizers, {name}: {found.tokens}, decoded {tokenizer.decode(found.ids)!r}")
        assert (ids[piece] in found.ids) == (name != "BPE"), "that changed"
assert unigram.decode(unigram.encode("press <0x0A>").ids) == "press \n"
assert unigram.decode(unigram.encode("the </s> tag").ids) == "the  tag"
PY
