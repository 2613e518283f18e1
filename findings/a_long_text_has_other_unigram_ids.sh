#!/usr/bin/env bash
# sentencepiece 0.2.3, tokenizers 0.23.3: a Unigram model on a whole document and on its words one by one.
#
# A guess: where no piece spans a white space, the best segmentation of a text is that of its words one after the
# other, so a document may be cut at white space and encoded in parallel; and two libraries with the same pieces and
# scores give the same ids. Seen: sentencepiece adds the scores up in fp32, from the beginning of the text. At 10,000
# words the sum is at -170,000, where the next number is 1/64 away, so what differs by less is decided by chance: some
# words have other ids than on their own, and a lower score. The longer the text, the more. tokenizers adds in fp64: a
# text has the ids of its words, with the scores of sentencepiece's words.
# Issue 843 of sentencepiece says that sums are rounded; that ids depend on how far a word is from the beginning is in
# no documentation. So a trainer that cuts long documents, or encodes with the other library, has not the ids of the
# model's first owner, though the better ones. One that wants the same data twice must cut in the same places.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check sentencepiece==0.2.3 tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PY'
import io
import math
import random

import sentencepiece
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers

print("sentencepiece", sentencepiece.__version__, "tokenizers", tokenizers.__version__)
rng = random.Random(0)


def words(count):
    return ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(count)]


file = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([" ".join(words(20)) for _ in range(2000)]),
    model_writer=file,
    model_type="unigram",
    vocab_size=2000,
    normalization_rule_name="identity",
    num_threads=1,
    minloglevel=2,
)
google = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
pieces = [(google.id_to_piece(i), google.get_score(i)) for i in range(google.get_piece_size())]
assert not any("▁" in piece[1:] for piece, _ in pieces), "no piece spans a white space"
face = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
face.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)


def score(ids):
    return sum(pieces[i][1] for i in ids)  # fp64


def by_word(ids):
    """The ids of each word, which begins with a piece that begins with a white space."""
    found = []
    for i in ids:
        found.extend([[]] if pieces[i][0].startswith("▁") else [])
        found[-1].append(i)
    return found


different = []
for count in (100, 10_000, 400_000):
    text = words(count)
    whole, parts = google.encode(" ".join(text)), [i for word in google.encode(text) for i in word]
    different.append(sum(a != b for a, b in zip(by_word(whole), by_word(parts), strict=True)))
    print(f"{count} words: sentencepiece gives {different[-1]} of them other ids in the whole text than alone;")
    print(f"  the scores are {score(whole):.3f} and {score(parts):.3f}")
    whole64, parts64 = face.encode(" ".join(text)).ids, [i for word in face.encode_batch(text) for i in word.ids]
    print("  tokenizers gives the ids of the words alone:", whole64 == parts64, f"with the score {score(whole64):.3f}")
    assert whole64 == parts64 and math.isclose(score(whole64), score(parts), rel_tol=1e-12)
    assert score(whole) <= score(parts)
assert different[0] == 0 < different[1] < different[2], "the sum is exact enough now"
PY
