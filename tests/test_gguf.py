"""GGUF files, read back with the package gguf; one slow test runs them in llama.cpp."""

from __future__ import annotations

import heapq
import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import Regex, models, pre_tokenizers
from torch import Tensor

from lowres.config import ModelConfig
from lowres.data import Tokenizer, open_tokenizer
from lowres.data.tokenizer import Vocabulary, train
from lowres.data.tokenizer import exported as exported_tokenizer
from lowres.data.tokenizer.base import PROBES, SPACE
from lowres.data.tokenizer.sentencepiece_file import Type
from lowres.errors import DoesNotFit, UserError
from lowres.exchange import export, open_model, target
from lowres.exchange.gguf_file import export_gguf
from lowres.model import Llama, rope_tables, rotate
from lowres.storage import TensorSpec, Unit, UnitSpec
from tests.helpers import make_config, make_units, save_run, weights_by_unit

VOCAB = 420
SMALL = ModelConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=VOCAB, max_positions=200
)
SHAPES = {
    "llama": SMALL.model_copy(update={"head_dim": 24, "rope_theta": 5e5, "norm_eps": 1e-6}),
    "linear": SMALL.model_copy(update={"rope_scaling": "linear", "rope_factor": 4.0}),
    "llama3": SMALL.model_copy(
        update={"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_length": 32}
    ),
    "tied": SMALL.model_copy(update={"tie_embeddings": True}),
    "qwen2": SMALL.model_copy(update={"qkv_bias": True}),
    "wide qwen2": SMALL.model_copy(update={"qkv_bias": True, "head_dim": 24}),
    "qwen3": SMALL.model_copy(update={"qk_norm": True, "head_dim": 32}),
}
DOWN = "model.layers.0.mlp.down_proj.weight"
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TEXT = "the theory of three things that there then thaw 12 123  two   spaces\n\tand tabs, don't! " * 20


@dataclass
class Weight:
    unit: Unit
    name: str

    @property
    def kind(self) -> str:
        return self.unit.kinds[self.name]

    @property
    def merged(self) -> float:
        return 0.0

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        storage = self.unit.weights[self.name]
        for start in range(0, storage.shape[0], 50):
            index = torch.arange(start, min(start + 50, storage.shape[0]))
            yield start, storage.rows(index, torch.float32)

    def tensors(self) -> dict[str, Tensor]:
        return self.unit.weights[self.name].tensors()


@dataclass
class Model:
    """A model in memory. alive: the most weights that were in use at one time."""

    model: ModelConfig
    units: dict[str, Unit]
    tokenizer: Path | None = None
    path: Path = Path("a model")
    alive: int = 0
    kind: str = "fp32"
    trained_on_text: bool = True
    about: str = "a model in memory"
    notes: list[str] = field(default_factory=list)
    _given: list[weakref.ref[Weight]] = field(default_factory=list)

    def weights(self, unit: UnitSpec) -> Iterator[tuple[TensorSpec, Weight]]:
        for spec in unit.tensors:
            yield spec, self._weight(unit, spec)

    def _weight(self, unit: UnitSpec, spec: TensorSpec) -> Weight:
        weight = Weight(self.units[unit.name], spec.name)
        self._given.append(weakref.ref(weight))
        self.alive = max(self.alive, sum(ref() is not None for ref in self._given))
        return weight

    def value(self, name: str) -> Tensor:
        (unit,) = (unit for unit in self.units.values() if name in unit.weights)
        return unit.weights[name].dense(torch.float32)


def make_model(config: ModelConfig, kind: str = "fp32", tokenizer: Path | None = None) -> Model:
    units = make_units(config, kind)
    noise = torch.Generator().manual_seed(1)
    for unit in units.values():
        for spec in unit.spec.tensors:
            if len(spec.shape) == 1:
                rows = unit.weights[spec.name].dense(torch.float32)
                unit.fill(spec.name, iter([(0, rows + torch.randn(rows.shape, generator=noise) / 4)]))
    return Model(config, units, tokenizer)


def exported(model: Model, folder: Path, dtype: str) -> tuple[gguf.GGUFReader, list[str]]:
    out = folder / "model.gguf"
    lines = export_gguf(model, out, dtype)
    return gguf.GGUFReader(out), lines


def values(reader: gguf.GGUFReader) -> dict[str, Tensor]:
    """Every tensor as fp32, by gguf's own arithmetic."""
    found = {}
    for tensor in reader.tensors:
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = torch.from_numpy(np.array(numbers)).reshape(*reversed(tensor.shape.tolist()))
    return found


def types(reader: gguf.GGUFReader) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


def keys(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def their_name(ours: str) -> str:
    """By the list of names that the package gguf has."""
    arch = gguf.MODEL_ARCH.QWEN3
    found = gguf.get_tensor_name_map(arch, 2).get_name(ours, try_suffixes=(".weight", ".bias"))
    assert found is not None
    return found


def interleaved(x: Tensor, head: int) -> Tensor:
    """Rows of halves of a head as rows of pairs."""
    found = torch.empty_like(x)
    for row in range(len(x)):
        start, half = row // head * head, row % head
        found[start + (2 * half if half < head // 2 else 2 * half - head + 1)] = x[row]
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_every_tensor_and_key_is_read_back(shape: str, tmp_path: Path) -> None:
    config = SHAPES[shape]
    model = make_model(config)
    dtype = {"llama": "fp16", "qwen2": "bf16"}.get(shape, "fp32")
    reader, _ = exported(model, tmp_path, dtype)
    found, number_types, about = values(reader), types(reader), keys(reader)
    architecture = {"qwen2": "qwen2", "qwen3": "qwen3"}.get(shape, "llama")
    names = [spec for unit in model.units.values() for spec in unit.spec.tensors]
    assert found.keys() - {"rope_freqs.weight"} == {their_name(spec.name) for spec in names}
    assert ("output.weight" in found) == (shape != "tied")
    for spec in names:
        name, kept = their_name(spec.name), torch.float32 if len(spec.shape) == 1 else TORCH[dtype]
        wanted = model.value(spec.name)
        if architecture == "llama" and spec.role.startswith(("q", "k")):
            wanted = interleaved(wanted, config.head_width)
        assert torch.equal(found[name], wanted.to(kept).float()), name
        assert (
            number_types[name] == {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[kept]
        )
    expected = {
        "context_length": 200,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
        "attention.layer_norm_rms_epsilon": np.float32(config.norm_eps),
        "rope.freq_base": np.float32(config.rope_theta),
        "rope.dimension_count": config.head_width,
        "vocab_size": VOCAB,
    }
    if shape == "linear":
        expected |= {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    assert {k: v for k, v in about.items() if k.startswith(architecture)} == {
        f"{architecture}.{key}": value for key, value in expected.items()
    }
    assert about["general.architecture"] == architecture and about["general.name"] == "model"
    assert about["general.file_type"] == {"fp32": 0, "fp16": 1, "bf16": 32}[dtype]
    assert about["tokenizer.ggml.model"] == "no_vocab"
    assert model.alive <= 2


def test_interleaved_rope_gives_the_same_attention(tmp_path: Path) -> None:
    """llama.cpp turns neighbours, and divides the angles by rope_freqs."""
    config = SHAPES["llama3"]
    model, length, head = make_model(config), 150, config.head_width
    found = values(exported(model, tmp_path, "fp32")[0])
    x = torch.randn(length, config.dim, generator=torch.Generator().manual_seed(2))
    cos, sin = rope_tables(config, length, torch.device("cpu"))
    powers = config.rope_theta ** (-torch.arange(0, head, 2) / head) / found["rope_freqs.weight"]
    angles = torch.outer(torch.arange(length).float(), powers)
    theirs, ours = [], []
    for letter, count in (("q", config.n_heads), ("k", config.kv_heads)):
        weight = model.value(f"model.layers.0.self_attn.{letter}_proj.weight")
        y = (x @ weight.T).view(length, count, head).transpose(0, 1)
        ours.append(rotate(y, cos, sin).repeat_interleave(4 // count, 0))
        y = (x @ found[f"blk.0.attn_{letter}.weight"].T).view(length, count, head // 2, 2).transpose(0, 1)
        turned = torch.view_as_complex(y.contiguous()) * torch.polar(torch.ones_like(angles), angles)
        theirs.append(torch.view_as_real(turned).flatten(-2).repeat_interleave(4 // count, 0))
    torch.testing.assert_close(
        theirs[0] @ theirs[1].transpose(1, 2), ours[0] @ ours[1].transpose(1, 2), atol=1e-5, rtol=1e-4
    )


# --- Q8_0 -----------------------------------------------------------------------------------------------


def test_int8_codes_are_kept(tmp_path: Path) -> None:
    model = make_model(SMALL, "int8")
    reader, lines = exported(model, tmp_path, "q8_0")
    found, kinds = values(reader), types(reader)
    assert {kinds[name] for name in found if found[name].dim() == 2} == {"Q8_0"}
    for name, spec in ((spec.name, spec) for unit in model.units.values() for spec in unit.spec.tensors):
        if spec.kind == "matrix":
            (unit,) = (unit for unit in model.units.values() if name in unit.weights)
            stored = unit.weights[name].tensors()
            wanted = stored[""].float() * stored[".scales"].half().float()
            if spec.role in ("q", "k"):
                wanted = interleaved(wanted, SMALL.head_width)
            assert torch.equal(found[their_name(name)], wanted), name
    errors = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # not INT8: gguf's own quantiser
        before = model.value(name)
        anew = gguf.quantize(before.numpy(), gguf.GGMLQuantizationType.Q8_0)
        kept = torch.from_numpy(gguf.dequantize(anew, gguf.GGMLQuantizationType.Q8_0))
        assert torch.equal(found[their_name(name)], kept)
        errors[float((kept - before).norm() / before.norm())] = name
    worst = max(errors)
    assert lines[1].endswith(f" of their norm, at most {worst:.2g} ({errors[worst]})")
    assert lines[2] == "14 of 16 matrices keep their INT8 codes, with scales rounded to fp16"


@pytest.mark.parametrize(
    ("kind", "dtype", "size", "expected"),
    [
        ("int8", "q8_0", 2e-7, "BF16"),  # scales and numbers are below those of fp16
        ("int8", "q8_0", 1e-6, "F16"),  # only the scales are
        ("fp32", "q8_0", 1e-6, "F16"),
        ("fp32", "q8_0", 1e8, "BF16"),  # above
        ("fp32", "fp16", 1e6, "BF16"),
        ("fp32", "fp16", 1e-9, "BF16"),
        ("fp32", "fp16", 1e-30, "BF16"),  # its square is no fp32 number
        ("fp32", "fp16", 1e30, "BF16"),
    ],
)
def test_a_format_that_loses_too_much_gives_way(
    kind: str, dtype: str, size: float, expected: str, tmp_path: Path
) -> None:
    model = make_model(SMALL, kind)
    rows = torch.randn(SMALL.dim, SMALL.ffn_dim, generator=torch.Generator().manual_seed(3)) * size
    model.units["layers.0"].fill(DOWN, iter([(0, rows)]))
    reader, lines = exported(model, tmp_path, dtype)
    wanted = {"q8_0": "Q8_0", "fp16": "F16"}[dtype]
    assert {n: t for n, t in types(reader).items() if t not in (wanted, "F32")} == {
        their_name(DOWN): expected
    }
    about = f"note: 1 matrices, such as {DOWN}, are stored as {expected}"
    assert f"{about}: {wanted} would change them by 2% or more" in lines
    kept, stored = values(reader)[their_name(DOWN)], model.value(DOWN)
    assert (kept - stored).double().norm() < 0.02 * stored.double().norm()


def test_the_better_scales_are_taken(tmp_path: Path) -> None:
    """fp16 rounds the scale of the codes by 6 %; the scales of blocks, whose largest code is 120, by less."""
    model = make_model(SMALL, "int8")
    stored = model.units["layers.0"].weights[DOWN].tensors()
    stored[""].random_(-120, 120, generator=torch.Generator().manual_seed(4))[:, ::32] = 120
    stored[".scales"].fill_(8.5 * 2.0**-24)
    reader, lines = exported(model, tmp_path, "q8_0")
    found, wanted = values(reader)["blk.0.ffn_down.weight"], model.value(DOWN)
    anew = gguf.quantize(wanted.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(found, torch.from_numpy(gguf.dequantize(anew, gguf.GGMLQuantizationType.Q8_0)))
    assert float((found - wanted).norm() / wanted.norm()) < 0.015
    assert any("13 of 16 matrices keep their INT8 codes" in line for line in lines)


def test_rows_that_blocks_do_not_divide_are_fp16(tmp_path: Path) -> None:
    model = make_model(SMALL.model_copy(update={"ffn_dim": 100}))
    reader, lines = exported(model, tmp_path, "q8_0")
    assert {name for name, kind in types(reader).items() if kind == "F16"} == {
        "blk.0.ffn_down.weight",
        "blk.1.ffn_down.weight",
    }
    (line,) = (line for line in lines if "are stored as F16: their rows are no multiple of 32" in line)
    assert "note: 2 matrices" in line


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
def test_what_llama_cpp_has_not_is_named(scaled: bool, tmp_path: Path) -> None:
    other = {"rope_scaling": "llama3"} if scaled else {"qkv_bias": True}
    model = make_model(SMALL.model_copy(update={"qk_norm": True, **other}))
    with pytest.raises(UserError, match=r"model\.qk_norm: .*model\.(qkv_bias|rope_scaling)"):
        exported(model, tmp_path, "fp32")


def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(SMALL)
    model.value(DOWN)[3, 5] = torch.nan
    for dtype in ("fp32", "q8_0"):
        with pytest.raises(UserError, match=f"{DOWN} has numbers that are not finite"):
            exported(model, tmp_path, dtype)
    monkeypatch.setattr(target, "free_bytes", lambda path: 300_000)
    with pytest.raises(DoesNotFit):
        exported(make_model(SMALL), tmp_path, "fp32")
    exported(make_model(SMALL), tmp_path, "q8_0")  # which needs a quarter
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="needs the package gguf: pip install gguf"):
        export_gguf(make_model(SMALL), tmp_path / "model.gguf", "fp32")


def test_a_name_that_llama_cpp_reads_is_left_out(tmp_path: Path) -> None:
    export_gguf(make_model(SMALL), tmp_path / "my-Phi3.gguf", "fp32")
    assert "general.name" not in keys(gguf.GGUFReader(tmp_path / "my-Phi3.gguf"))


# --- tokenizers -----------------------------------------------------------------------------------------


def encode_by_scores(about: dict[str, Any], text: str) -> list[int]:
    """As llama.cpp does for SentencePiece: the best pair of neighbours first."""
    ids = {token: i for i, token in enumerate(about["tokenizer.ggml.tokens"])}
    scores = about["tokenizer.ggml.scores"]
    prefix = " " if text and about["tokenizer.ggml.add_space_prefix"] else ""
    parts: list[str] = list((prefix + text).replace(" ", SPACE))
    while True:
        pairs = [
            (-scores[ids[left + right]], i)
            for i, (left, right) in enumerate(itertools.pairwise(parts))
            if left + right in ids
        ]
        if not pairs:
            break
        _, i = heapq.nsmallest(1, pairs)[0]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    found: list[int] = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


@cache
def sentencepiece_model(**more: Any) -> bytes:
    model = io.BytesIO()
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **more}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_writer=model,
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
        **{"model_type": "bpe", **settings},
    )
    return model.getvalue()


def with_tokenizer(
    content: bytes, folder: Path, trained_on_text: bool = True
) -> tuple[Tokenizer, dict[str, Any], list[str]]:
    """The tokenizer, the keys of a file with it, and the notes."""
    path = folder / ("tokenizer.json" if content[:1] == b"{" else "tokenizer.model")
    path.write_bytes(content)
    model = make_model(SMALL, tokenizer=path)
    model.trained_on_text = trained_on_text
    reader, lines = exported(model, folder, "fp32")
    notes = [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]
    return open_tokenizer(path, form="own"), keys(reader), notes


def as_merges(model: bytes) -> dict[str, Any]:
    """The BPE of a tokenizer.json from a SentencePiece model: all pairs that make a piece, by its score."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    normal = [text for text, i in ids.items() if not (pieces.is_byte(i) or pieces.is_control(i))]
    pairs = [
        (-pieces.get_score(ids[text]), text[:cut], text[cut:])
        for text in normal
        for cut in range(1, len(text))
        if {text[:cut], text[cut:]} <= ids.keys() and not pieces.is_unknown(ids[text])
    ]
    return {
        "type": "BPE",
        "vocab": ids,
        "merges": [[left, right] for _, left, right in sorted(pairs)],
        "byte_fallback": True,
        "fuse_unk": True,
        "unk_token": "<unk>",
    }


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, REPLACE]}
META = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}


def pieces_json(**more: Any) -> bytes:
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": text, **special} for i, text in enumerate(("<unk>", "<s>", "</s>"))]
    return json.dumps({"added_tokens": added, "model": as_merges(sentencepiece_model()), **more}).encode()


def test_a_tokenizer_of_ours(tmp_path: Path) -> None:
    content, size = train([TEXT], 400, exact=False)
    tokenizer, about, notes = with_tokenizer(content, tmp_path)
    assert about["tokenizer.ggml.model"] == "llama"
    pieces = about["tokenizer.ggml.tokens"]
    assert len(pieces) == len(set(pieces)) == VOCAB and pieces[size:] == [
        f"[PAD{i}]" for i in range(VOCAB - size)
    ]
    kinds = about["tokenizer.ggml.token_type"]
    assert kinds[:3] == [Type.UNKNOWN, Type.CONTROL, Type.CONTROL] and kinds[3:259] == [Type.BYTE] * 256
    assert set(kinds[259:size]) == {Type.NORMAL} and set(kinds[size:]) == {Type.UNUSED}
    assert (about["tokenizer.ggml.bos_token_id"], about["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert about["tokenizer.ggml.add_bos_token"] and not about["tokenizer.ggml.add_eos_token"]
    assert not about["tokenizer.ggml.remove_extra_whitespaces"] and notes == []
    for text in PROBES:
        if SPACE not in text:  # which has no spelling there
            assert encode_by_scores(about, text) == tokenizer.encode(text), text
    # and as it is exported for Hugging Face's libraries, alone in another folder
    again = tmp_path / "again"
    again.mkdir()
    _, same, _ = with_tokenizer(exported_tokenizer(tokenizer).files["tokenizer.json"], again)
    assert same["tokenizer.ggml.tokens"] == pieces and same["tokenizer.ggml.token_type"] == kinds
    assert encode_by_scores(same, TEXT[:500]) == encode_by_scores(about, TEXT[:500])


@pytest.mark.parametrize("kind", ["sentencepiece", "prepend", "metaspace", "none"])
def test_a_tokenizer_with_a_prefix(kind: str, tmp_path: Path) -> None:
    parts: dict[str, dict[str, Any]] = {
        "prepend": {"normalizer": PREPEND},
        "metaspace": {"pre_tokenizer": META},
        "none": {"normalizer": REPLACE},
    }
    content = sentencepiece_model() if kind == "sentencepiece" else pieces_json(**parts[kind])
    tokenizer, about, notes = with_tokenizer(content, tmp_path)
    assert about["tokenizer.ggml.add_space_prefix"] == (kind != "none")
    for text in (*PROBES, TEXT[:200], "theththe  tthth", "aaa\n\n\n\n"):
        if kind == "metaspace" and text.startswith((" ", SPACE)):
            continue  # as the note says
        assert encode_by_scores(about, text) == tokenizer.encode(text), text
    assert notes == ["llama.cpp also puts a space in front of a text that begins with one"] * (
        kind == "metaspace"
    )


L3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
ONLY_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def by(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, ONLY_BYTES])


PRE = {
    "gpt-2": (BYTES, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]), False),
    "llama-bpe": (by(L3), True),
    "smaug-bpe": (by(L3), False),
    "qwen2": (by(L3.replace("{1,3}", "")), False),
}


def bytes_json(pre: Any, ignore_merges: bool = False) -> bytes:
    library = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    library.pre_tokenizer = pre
    library.train_from_iterator(
        [TEXT],
        tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>"],
        ),
    )
    library.add_tokens([tokenizers.AddedToken("<tool>", normalized=False), "    "])
    library.add_special_tokens(["he"])  # a piece that merges make, but no text may
    found: str = library.to_str()
    return found.encode()


@pytest.mark.parametrize("name", PRE)
def test_bpe_on_bytes(name: str, tmp_path: Path) -> None:
    pre, ignore_merges = PRE[name]
    tokenizer, about, notes = with_tokenizer(bytes_json(pre, ignore_merges), tmp_path)
    assert (about["tokenizer.ggml.model"], about["tokenizer.ggml.pre"]) == ("gpt2", name)
    pieces, kinds = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"]
    of = dict(zip(pieces, kinds, strict=True))
    assert (of["<|endoftext|>"], of["<tool>"], of["    "]) == (
        Type.CONTROL,
        Type.USER_DEFINED,
        Type.USER_DEFINED,
    )
    assert about["tokenizer.ggml.bos_token_id"] == about["tokenizer.ggml.eos_token_id"] == tokenizer.bos_id
    assert len(pieces) == VOCAB and kinds[tokenizer.vocab_size :] == [Type.UNUSED] * (
        VOCAB - tokenizer.vocab_size
    )
    assert notes == [
        "llama.cpp finds 1 added tokens, such as '<tool>', in text, where they were spelt out in training"
    ]
    assert of["he"] == Type.CONTROL
    merges = [tuple(pair.split(" ")) for pair in about["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(pieces) if kinds[i] == Type.NORMAL}
    again = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    again.pre_tokenizer = pre
    for text in (*PROBES, TEXT[:300]):
        assert again.encode(text).ids == tokenizer.encode(text), text


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (lambda: sentencepiece_model(model_type="unigram"), "another type than BPE"),
        (lambda: sentencepiece_model(normalization_rule_name="nmt_nfkc"), "has a normaliser"),
        (lambda: sentencepiece_model(remove_extra_whitespaces=True), "has a normaliser"),
        (lambda: bytes_json(BYTES, ignore_merges=True), r"\(ByteLevel with ignore_merges\)"),
        (lambda: bytes_json(by(r"\p{N}+")), r"pre-tokenizer of its own \(Split and ByteLevel\)"),
        (lambda: bytes_json(pre_tokenizers.ByteLevel(add_prefix_space=True)), r"of its own \(ByteLevel\)"),
        (lambda: pieces_json(normalizer={"type": "NFKC"}), "nor like one of SentencePiece"),
        # as after training with the library, which lists one pair for each piece; and in another order
        (lambda: others_json(lambda merges, i: merges[:i] + merges[i + 1 :]), "do not follow from scores"),
        (lambda: others_json(lambda merges, i: [*merges[:i], *merges[i + 1 :], merges[i]]), "not follow"),
    ],
)
def test_other_tokenizers_are_refused(content: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=what):
        with_tokenizer(content(), tmp_path)
    assert not (tmp_path / "model.gguf").exists()


def others_json(changed: Callable[[list[list[str]], int], list[list[str]]]) -> bytes:
    """A tokenizer.json with other merges; the function gets the place of one that makes a piece again."""
    model = as_merges(sentencepiece_model())
    merges = model["merges"]
    made = ["".join(pair) for pair in merges]
    merges = changed(merges, next(i for i, way in enumerate(made) if way in made[:i]))
    return pieces_json(normalizer=REPLACE, model=model | {"merges": merges})


def test_text_that_llama_cpp_takes_for_a_token_is_said(tmp_path: Path) -> None:
    model = as_merges(sentencepiece_model())
    size = len(model["vocab"])
    model["vocab"] |= {"s>": size, ">": size + 1}
    model["merges"] = [*model["merges"], ["s", ">"]]
    _, _, notes = with_tokenizer(pieces_json(normalizer=REPLACE, model=model), tmp_path)
    assert notes == ["llama.cpp may take the text '<s>' in a document for the token of this name"]


def test_what_came_along(tmp_path: Path) -> None:
    """The chat template; and of a model that was not trained on text here, whether its tokenizer puts bos in
    front."""
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    _, about, _ = with_tokenizer(bytes_json(BYTES), tmp_path)
    assert about["tokenizer.chat_template"] == "{{ messages }}" and about["tokenizer.ggml.add_bos_token"]
    (tmp_path / "model.gguf").unlink()
    _, about, _ = with_tokenizer(bytes_json(BYTES), tmp_path, trained_on_text=False)
    assert not about["tokenizer.ggml.add_bos_token"]


CHATS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)


@pytest.mark.parametrize(
    "objective, step, on_text", [("pretrain", 3, True), ("sft", 3, False), ("pretrain", 0, False)]
)
def test_what_begins_a_text_and_ends_an_answer(
    objective: str, step: int, on_text: bool, tmp_path: Path
) -> None:
    """Chats of ours, and a model that was only imported, need not begin with bos. Whatever opens an export of
    chats has to stop where an answer ends."""
    config = make_config(
        objective={"name": objective}, model={"vocab_size": VOCAB}, memory={"weights": "fp32"}
    )
    run = tmp_path / "run"
    library = tokenizers.Tokenizer.from_str(bytes_json(BYTES).decode())
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(CHATS)
    run.mkdir()
    (run / "tokenizer.json").write_bytes(open_tokenizer(tmp_path).content)
    end = library.token_to_id("<|im_end|>")
    save_run(run, config, weights_by_unit(make_units(config.model)), step)
    assert open_model(run).trained_on_text == on_text
    export(run, tmp_path / "hf")
    ids = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    export(run, tmp_path / "model.gguf")
    about = keys(gguf.GGUFReader(tmp_path / "model.gguf"))
    assert about["tokenizer.ggml.add_bos_token"] == on_text
    card = (tmp_path / "hf" / "README.md").read_text()
    if objective == "sft":
        assert end in ids and about["tokenizer.ggml.eot_token_id"] == end
        assert "Tuned on chats (sft)" in card and "apply_chat_template" in card
    else:
        assert isinstance(ids, int) and "tokenizer.ggml.eot_token_id" not in about
        assert "apply_chat_template" not in card


def test_ids_only(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_bytes(Vocabulary.content_of(VOCAB, 1, None))
    reader, lines = exported(make_model(SMALL, tokenizer=path), tmp_path, "fp32")
    found = {k: v for k, v in keys(reader).items() if k.startswith("tokenizer")}
    assert found == {"tokenizer.ggml.model": "no_vocab"} and "ids only" in lines[-1]


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    model = make_model(SMALL.model_copy(update={"vocab_size": 300}), tokenizer=path)
    with pytest.raises(UserError, match="but the model 300"):
        exported(model, tmp_path, "fp32")


# --- llama.cpp ------------------------------------------------------------------------------------------

# runs in a process of its own, as errors in llama.cpp end the process; without flash attention and with an
# fp32 cache, as both would compute in fp16
CHILD = r"""
import json, sys
import llama_cpp as l

path, texts, prompt, steps = json.load(sys.stdin)
l.llama_log_set(quiet := l.llama_log_callback(lambda *_: None), None)
model = l.llama_model_load_from_file(path.encode(), l.llama_model_default_params())
assert model, "llama.cpp does not open the file"
vocab = l.llama_model_get_vocab(model)
found = {"ids": [], "logits": []}
for text in texts:
    room = len(text.encode()) + 8
    ids = (l.llama_token * room)()
    count = l.llama_tokenize(vocab, text.encode(), len(text.encode()), ids, room, True, False)
    found["ids"].append(ids[:count])
settings = l.llama_context_default_params()
settings.n_ctx, settings.n_threads, settings.n_threads_batch = 128, 1, 1
settings.type_k = settings.type_v = settings.flash_attn_type = 0
context, size = l.llama_init_from_model(model, settings), l.llama_vocab_n_tokens(vocab)
for _ in range(steps):
    ids = (l.llama_token * len(prompt))(*prompt)
    assert l.llama_decode(context, l.llama_batch_get_one(ids, len(prompt))) == 0
    logits = l.llama_get_logits_ith(context, -1)[:size]
    found["logits"].append(logits)
    prompt = [max(range(size), key=logits.__getitem__)]
print(json.dumps(found))
"""
PROMPT, STEPS = [1, *range(30, 60)], 64


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python that has llama.cpp, which is compiled if it is not there: 8 minutes."""
    if importlib.util.find_spec("llama_cpp"):
        return dict(os.environ)
    folder = tmp_path_factory.mktemp("llama")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, "llama-cpp-python==0.3.36", "diskcache"], check=True)
    return {**os.environ, "PYTHONPATH": str(folder)}


def in_llama_cpp(llama_cpp: dict[str, str], path: Path, texts: list[str], steps: int) -> dict[str, Any]:
    request = json.dumps([str(path), texts, PROMPT, steps])
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(command, input=request, env=llama_cpp, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "most"), [("fp32", 2e-6), ("fp16", 1e-3), ("bf16", 1e-2), ("q8_0", 2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_llama_cpp_goes_on_as_the_model_does(
    shape: str, dtype: str, most: float, tmp_path: Path, llama_cpp: dict[str, str]
) -> None:
    """The same 64 tokens; where another one follows, it is one whose logit differs by less than the formats
    do. most: how far a logit may differ, where their standard deviation is 0.16."""
    model = make_model(SHAPES[shape], "int8" if dtype == "q8_0" else "fp32")
    export_gguf(model, tmp_path / "model.gguf", dtype)
    theirs = torch.tensor(in_llama_cpp(llama_cpp, tmp_path / "model.gguf", [], STEPS)["logits"])
    module = Llama(model.model)
    for name, value in module.state_dict().items():
        value.copy_(model.value(name))
    ids = list(PROMPT)
    for step in range(STEPS):
        ours = module(torch.tensor([ids]))[0, -1]
        difference = float((ours - theirs[step]).abs().max())
        assert difference < most, step
        token = int(ours.argmax())
        if (other := int(theirs[step].argmax())) != token:
            assert dtype != "fp32" and float(ours[token] - ours[other]) <= 2 * difference
            return
        ids.append(token)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ours", "prefix", "json", "json with a prefix", *PRE])
def test_llama_cpp_has_the_same_ids(kind: str, tmp_path: Path, llama_cpp: dict[str, str]) -> None:
    others: dict[str, Callable[[], bytes]] = {
        "ours": lambda: train([TEXT], 400, exact=False)[0],
        "prefix": sentencepiece_model,
        "json": lambda: pieces_json(normalizer=REPLACE),
        "json with a prefix": lambda: pieces_json(normalizer=PREPEND),
    }
    content = bytes_json(*PRE[kind]) if kind in PRE else others[kind]()
    tokenizer, _, _ = with_tokenizer(content, tmp_path)
    texts = [*PROBES, TEXT, "<s>", "</s>", "<|endoftext|>", "a\0b", "\r\n\r\n", "x\u2028\u3000y", "    "]
    if kind == "ours":
        texts = [text for text in texts if SPACE not in text]
    found = in_llama_cpp(llama_cpp, tmp_path / "model.gguf", texts, 0)["ids"]
    assert found == [tokenizer.prompt(text) for text in texts]
