"""What other programs get of a tokenizer, and what comes along with one."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from lowres.config import DataConfig
from lowres.data import open_data
from lowres.data.tokenizer import Exported, Tokenizer, Vocabulary, exported, open_tokenizer, train
from lowres.data.tokenizer.base import SPACE, digest
from lowres.data.tokenizer.conversion import splits
from lowres.errors import UserError
from tests.test_tokenizers import PROSE, SPECIAL, gpt2, llama3, sentencepiece_model

HARD = [
    " ",
    "  ",
    "\n\n",
    "\t",
    "\0",
    SPACE,
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "<0xC3>",
    "<tool>",
    "cat sat",
    " x ",
]
HARD += [
    "\u0301",
    "\u00e9",
    "\u4e2d",
    "\U0001f600",
    "\u2585",
    "\ufffd",
    "the",
    "cat",
    "ca",
    "<",
    "0x",
    "s>",
    "1234",
]
TEXTS = st.lists(st.sampled_from(HARD) | st.characters(exclude_categories=["Cs"]), max_size=12).map("".join)
FIXED = [*SPECIAL, PROSE, *HARD, *map("".join, product(HARD, HARD))]
SYMBOLS = ["\n", "\n\n", "<tool>", f"cat{SPACE}sat", f"{SPACE}x{SPACE}"]
UNIGRAM: dict[str, Any] = {"model_type": "unigram", "vocab_size": 390}
# name: form, options of the model; None is one of ours
MODELS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "ours": ("exact", None),
    "llama": ("own", {}),
    "llama, exact": ("exact", {}),
    "symbols": ("exact", {"user_defined_symbols": SYMBOLS, "vocab_size": 420}),
    "removes spaces": ("own", {"remove_extra_whitespaces": True}),
    "suffix": ("own", {"treat_whitespace_as_suffix": True}),
    "characters": ("exact", {"model_type": "char"}),
    "unigram": ("exact", UNIGRAM),
    "unigram, symbols": ("own", {**UNIGRAM, "user_defined_symbols": SYMBOLS, "vocab_size": 400}),
}
CHAT = "{{ bos_token }}{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


def opened(folder: Path, content: bytes, form: Any = None) -> Tokenizer:
    name = "tokenizer.json" if content[:1] == b"{" else "tokenizer.model"
    return open_tokenizer(written(folder, {name: content}) / name, form=form)


def written(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def model(name: str) -> bytes:
    options = MODELS[name][1]
    return train([PROSE], 400, exact=False)[0] if options is None else sentencepiece_model(**options)


@dataclass(frozen=True)
class Made:
    tokenizer: Tokenizer
    found: Exported
    library: Any


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    tokenizer = opened(tmp_path_factory.mktemp("model"), model(request.param), MODELS[request.param][0])
    found = exported(tokenizer)
    theirs = library.Tokenizer.from_str(found.files["tokenizer.json"].decode())
    theirs.encode_special_tokens = True  # text is only text
    return Made(tokenizer, found, theirs)


# ---------------------------------------------------------------------------- SentencePiece


@settings(max_examples=50, deadline=None)
@given(text=TEXTS)
def test_the_library_has_our_ids_and_our_text(made: Made, text: str) -> None:
    ids, ours = made.library.encode(text).ids, made.tokenizer.prompt(text)
    assert made.library.decode(ids) == made.library.decode(ours) == made.tokenizer.decode(ours)
    bos, eos = made.tokenizer.bos_id, made.tokenizer.eos_id
    assert ids[0] == bos and not {bos, eos} & set(ids[1:])
    if not any("Unigram" in note for note in made.found.notes):  # whose ties depend on rounding
        assert ids == ours


def test_fixed_texts_have_our_ids(made: Made) -> None:
    theirs = made.library.encode_batch(FIXED, add_special_tokens=False)
    assert [one.ids for one in theirs] == [ids.tolist() for ids in made.tokenizer.encode_batch(FIXED)]
    assert not [note for note in made.found.notes if "otherwise" in note]


@pytest.mark.parametrize(
    ("options", "note"),
    [
        # the library takes accents away
        ({"normalization_rule_name": "nmt_nfkc"}, "come out otherwise by the library tokenizers, e.g. "),
        # and it puts a prefix behind each of these
        ({"user_defined_symbols": ["<tool>"]}, "e.g. '<tool>' is "),
        (UNIGRAM, "adds the scores of a Unigram model with other precision"),
    ],
)
def test_what_the_library_cannot_do_is_said(options: dict[str, Any], note: str, tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, sentencepiece_model(**options), "own")
    found = exported(tokenizer)
    assert any(note in line and str(tokenizer.path) in line for line in found.notes)
    assert found.files["tokenizer.model"] == tokenizer.content


def test_without_the_library_nothing_is_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, model("ours"))
    compared = exported(tokenizer)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    found = exported(tokenizer)
    assert found.files == compared.files and not compared.notes
    assert "pip install tokenizers" in found.notes[0]


def test_of_two_splits_that_fit_the_left_one_is_merged_first() -> None:
    """Where neighbours x, y, z have xy = yz, xy comes first among the merges."""
    strings = ["".join(letters) for size in range(1, 8) for letters in product("ab", repeat=size)]
    decided = 0
    for piece in strings:
        rank = {pair: number for number, pair in enumerate(splits(piece, dict.fromkeys(strings, 0)))}
        assert {x + y for x, y in rank} <= {piece} and len(rank) == len(piece) - 1
        for (x, y), place in rank.items():
            z = piece[len(y) :]
            if piece.startswith(y) and z != x:  # x, y, x has no right order
                assert place < rank[y, z]
                decided += 1
    assert decided > 100


# ---------------------------------------------------------------------------- transformers


def check_in_transformers(folder: Path) -> None:
    """In this process or another one, with the version of transformers that it has."""
    from transformers import AutoTokenizer

    for place in sorted(folder.iterdir()):
        expected = json.loads((place / "expected.json").read_text("utf-8"))
        theirs = AutoTokenizer.from_pretrained(place)
        found = theirs(expected["texts"])
        assert set(found) == {"input_ids", "attention_mask"}  # all that a LLaMA takes
        assert found["input_ids"] == expected["ids"]
        documents = [[*ids, theirs.eos_token_id] for ids in expected["ids"]]
        assert theirs.batch_decode(documents, skip_special_tokens=True) == expected["decoded"]
        assert [theirs.bos_token_id, theirs.eos_token_id, len(theirs)] == expected["numbers"]
        if chat := expected["chat"]:
            messages = [{"role": "user", "content": "the <s> cat"}]
            assert theirs.apply_chat_template(messages, tokenize=False) == chat["text"]
            found = theirs.apply_chat_template(messages, tokenize=True, return_dict=True)
            assert found["input_ids"] == chat["ids"]
        theirs.save_pretrained(place / "saved")
        again = AutoTokenizer.from_pretrained(place / "saved")
        assert again(expected["texts"])["input_ids"] == expected["ids"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported models, and what is expected of them."""
    root, models = tmp_path_factory.mktemp("folders"), tmp_path_factory.mktemp("models")
    for name, chat in (("ours", False), ("unigram", False), ("llama", True)):
        beside = {"chat_template.jinja": CHAT.encode()} if chat else {}
        tokenizer = opened(written(models / name, beside), model(name), MODELS[name][0])
        place = written(root / name, exported(tokenizer).files)
        (place / "config.json").write_text(json.dumps({"model_type": "llama"}))
        texts = [text for text in FIXED if not chat or not set("<>") & set(text)]
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        # a prefix is put in front of each part between control tokens
        parts = [tokenizer.encode(text) for text in ("user: the ", " cat")]
        of_chat = {"text": "<s><s>user: the <s> cat</s>", "ids": [bos, bos, *parts[0], bos, *parts[1], eos]}
        expected = {
            "texts": texts,
            "ids": [tokenizer.prompt(text) for text in texts],
            "decoded": [tokenizer.decode(tokenizer.encode(text)) for text in texts],
            "numbers": (bos, eos, tokenizer.vocab_size),
            "chat": of_chat if chat else None,
        }
        (place / "expected.json").write_text(json.dumps(expected))
    return root


def test_transformers_has_our_ids_and_our_text(folders: Path) -> None:
    pytest.importorskip("transformers")
    check_in_transformers(folders)


@pytest.mark.slow
def test_version_4_of_transformers_has_them_too(folders: Path, transformers_4: dict[str, str]) -> None:
    program = (
        "import sys, transformers; from pathlib import Path; assert transformers.__version__ == '4.57.6'; "
        "from tests.test_tokenizer_export import check_in_transformers as check; check(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(folders)]
    subprocess.run(command, check=True, env=transformers_4, timeout=300)


# ---------------------------------------------------------------------------- what comes along


FILES: dict[str, dict[str, Any]] = {
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHAT}],
        "model_max_length": 8192,
    },
    "special_tokens_map.json": {"bos_token": "<|begin_of_text|>"},
    "added_tokens.json": {"<|im_start|>": 2},
}


@pytest.fixture
def llama3_folder(tmp_path: Path) -> Path:
    """A tokenizer.json whose post-processor is not ours, with files beside it."""
    folder = written(tmp_path / "llama3", {name: json.dumps(file).encode() for name, file in FILES.items()})
    llama3().save(str(folder / "tokenizer.json"))
    return folder


def test_a_tokenizer_json_goes_out_as_it_came(llama3_folder: Path, tmp_path: Path) -> None:
    """By way of a run's copy, which the library opens as before."""
    original = open_tokenizer(llama3_folder)
    copy = opened(tmp_path / "run", original.content)
    assert copy.content == original.content and copy.chat_template == CHAT
    theirs = library.Tokenizer.from_file(str(copy.path))
    assert theirs.encode("a cat").ids == original.prompt("a cat")
    found = exported(copy)
    assert found.notes == [] and set(found.files) == {*FILES, "tokenizer.json"}
    for name in FILES:
        assert found.files[name] == (llama3_folder / name).read_bytes()
    file = (llama3_folder / "tokenizer.json").read_bytes()
    assert json.loads(found.files["tokenizer.json"]) == json.loads(file)
    again = open_tokenizer(written(tmp_path / "out", found.files))
    assert (again.fingerprint, again.content) == (original.fingerprint, original.content)


def test_a_bare_tokenizer_json_is_named_to_transformers(tmp_path: Path) -> None:
    auto = pytest.importorskip("transformers").AutoTokenizer
    path = tmp_path / "tokenizer.json"
    gpt2().save(str(path))
    tokenizer = open_tokenizer(path)
    found = exported(opened(tmp_path / "run", tokenizer.content))
    assert json.loads(found.files["tokenizer.json"]) == json.loads(path.read_bytes())
    (note,) = found.notes
    assert "it puts nothing around a text; the model was trained with <|endoftext|> in front" in note
    theirs = auto.from_pretrained(written(tmp_path / "out", found.files))
    assert theirs("the cat")["input_ids"] == tokenizer.encode("the cat")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.bos_id)


def test_what_comes_along_does_not_change_the_fingerprint(llama3_folder: Path, tmp_path: Path) -> None:
    """Nor what it was before anything came along: the hash of a file with our post-processor."""
    tokenizer = open_tokenizer(llama3_folder)
    content = json.loads(tokenizer.content)
    del content["post_processor"]["lowres"]
    earlier = json.dumps(content).encode()
    assert tokenizer.fingerprint == digest(earlier)
    assert opened(tmp_path / "earlier", earlier).content == earlier
    (llama3_folder / "chat_template.jinja").write_text("{{ other }}")
    other = open_tokenizer(llama3_folder)
    assert other.chat_template == "{{ other }}"  # the file of its own counts
    assert other.fingerprint == tokenizer.fingerprint and other.content != tokenizer.content
    path = written(tmp_path / "x", {"tokenizer.json": other.content}) / "tokenizer.json"
    assert open_tokenizer(path, fingerprint=tokenizer.fingerprint).chat_template == "{{ other }}"
    path.write_bytes(other.content.replace(b"{{ other }}", b"{{ wrong }}"))
    with pytest.raises(UserError, match=r"tokenizer\.json: changed; put the original back"):
        open_tokenizer(path, fingerprint=tokenizer.fingerprint)
    with pytest.raises(UserError, match=r"tokenizer\.json: .* damaged \(does not match its seal\); give"):
        open_tokenizer(path)


@pytest.mark.parametrize("form", ["exact", "own"])
def test_a_chat_template_comes_along_with_a_sentencepiece_model(form: str, tmp_path: Path) -> None:
    bare = opened(tmp_path / "bare", model("llama"), form)
    config = FILES["tokenizer_config.json"]
    beside = {"tokenizer_config.json": config, "added_tokens.json": {"<|im_start|>": 400}}
    folder = written(tmp_path / "model", {name: json.dumps(file).encode() for name, file in beside.items()})
    tokenizer = opened(folder, model("llama"), form)
    assert any(
        "has no '<|im_start|>', which files in the same folder add" in note for note in tokenizer.notes
    )
    assert (tokenizer.chat_template, tokenizer.fingerprint) == (CHAT, bare.fingerprint)
    copy = opened(tmp_path / "run", tokenizer.content, "own")
    assert (copy.content, copy.chat_template) == (tokenizer.content, CHAT)
    assert not any("<|im_start|>" in note for note in copy.notes)
    assert copy.encode(PROSE) == bare.encode(PROSE)
    found = json.loads(exported(copy).files["tokenizer_config.json"])
    assert found["chat_template"] == config["chat_template"]
    assert found["split_special_tokens"] is False  # the template spells <s>
    copy.path.write_bytes(tokenizer.content.replace(b"tool_use", b"tool-use"))
    with pytest.raises(UserError, match=r"tokenizer\.model: .* damaged"):
        open_tokenizer(copy.path, form="own", fingerprint=bare.fingerprint)


def test_a_folder_of_ours_is_opened_as_what_it_was_made_of(tmp_path: Path) -> None:
    for name in ("llama", "llama, exact"):
        tokenizer = opened(tmp_path / name / "model", model(name), MODELS[name][0])
        folder = written(tmp_path / name / "out", exported(tokenizer).files)
        for path in (folder, folder / "tokenizer.json"):
            found = open_tokenizer(path)
            assert (found.path, found.content) == (folder / "tokenizer.model", tokenizer.content)
            assert not any("not used" in note for note in found.notes)
        # not if it was made of another one
        (folder / "tokenizer.model").write_bytes(model("ours"))
        assert open_tokenizer(folder).path == folder / "tokenizer.json"
        (folder / "tokenizer.model").unlink()
        found = open_tokenizer(folder)
        assert found.prompt(PROSE) == tokenizer.prompt(PROSE)
        assert found.decode(found.encode(PROSE)) == PROSE


def test_ids_without_text_have_no_files(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_bytes(Vocabulary.content_of(100, 0, None))
    assert exported(open_tokenizer(path)) == Exported()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "tokenizer_config.json",
            b"{",
            "tokenizer_config.json: is not JSON; get the file again, or remove it",
        ),
        ("added_tokens.json", b"[]", "added_tokens.json: is not a JSON object; get"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: is not UTF-8; get"),
        (
            "chat_template.jinja",
            b"x" * ((8 << 20) + 1),
            "chat_template.jinja: has more than 8,388,608 bytes; ",
        ),
    ],
)
def test_a_hostile_companion_is_named(name: str, content: bytes, problem: str, tmp_path: Path) -> None:
    written(tmp_path, {name: content, "tokenizer.model": model("ours")})
    gpt2().save(str(tmp_path / "tokenizer.json"))
    for file in ("tokenizer.json", "tokenizer.model"):
        with pytest.raises(UserError) as error:
            open_tokenizer(tmp_path / file)
        assert problem in str(error.value) and "\n" not in str(error.value)


def test_a_companion_that_is_no_file_is_left_behind(tmp_path: Path) -> None:
    gpt2().save(str(tmp_path / "tokenizer.json"))
    os.mkfifo(tmp_path / "chat_template.jinja")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 7}')
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.chat_template is None
    said = "chat_template.jinja in the same folder is not an ordinary file"
    assert any(said in note for note in tokenizer.notes)


def test_prepared_data_serve_another_chat_template(llama3_folder: Path, tmp_path: Path) -> None:
    """The run gets what is given now, and not what came along when the data were prepared."""
    source = tmp_path / "text.txt"
    source.write_text(PROSE)
    cache, given_ = str(tmp_path / "cache"), str(llama3_folder)
    config = DataConfig(source=str(source), cache=cache, tokenizer=given_, seq_len=16)
    first = open_data(config, None, seed=0, progress=False)
    (llama3_folder / "chat_template.jinja").write_text("{{ other }}")
    second = open_data(config, None, seed=0, progress=False)
    assert (second.folder, second.fingerprint) == (first.folder, first.fingerprint)
    assert (first.tokenizer.chat_template, second.tokenizer.chat_template) == (CHAT, "{{ other }}")
