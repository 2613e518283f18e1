"""Models of ours in other programs: what `lowres export` writes, read by the libraries it is for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lowres.config import ModelConfig
from lowres.config_file import load_config
from lowres.data import open_tokenizer
from lowres.data.tokenizer import Vocabulary
from lowres.errors import UserError
from lowres.exchange import export, initialize_from, open_model, shards, target
from lowres.exchange.casts import DTYPES
from lowres.model import Llama, Units, empty_units, initialize, storage_kinds, unit_specs
from lowres.runs import open_run
from lowres.storage import weight_fields
from tests.helpers import (
    RELORA,
    ROOMS,
    lowres_here,
    make_config,
    make_units,
    save_run,
    weights_by_unit,
    with_adapters,
)

# n_heads times head_dim is not dim, except in "tied"
SHAPE: dict[str, Any] = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 24,
    "ffn_dim": 100,
    "vocab_size": 300,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_embeddings": True, "head_dim": None, "n_kv_heads": None},
    "linear": {"rope_scaling": "linear", "rope_factor": 2.0, "norm_eps": 1e-6},
    "llama3": {
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "rope_theta": 500000.0,
        "rope_original_length": 64,
        "max_positions": 512,
    },
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "qwen3 with biases": {"qk_norm": True, "qkv_bias": True},
}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TOKENS = torch.arange(2 * 100).view(2, 100) % 300


def run_of(folder: Path, shape: dict[str, Any], weights: str = "fp32") -> tuple[Path, Units]:
    """A run with weights that are nowhere 0 or 1."""
    config = make_config(model=SHAPE | shape, memory={"weights": weights})
    units = empty_units(config.model, weights, config.memory.embeddings_kept_in, ROOMS)
    initialize(units.values(), 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for unit in units.values():
        for name, weight in unit.weights.items():
            noise = torch.randn(weight.shape, generator=generator) * 0.1
            unit.fill(name, iter([(0, weight.dense(torch.float32) + noise)]))
    return save_run(folder, config, weights_by_unit(units)), units


def dense(units: Units) -> dict[str, Tensor]:
    return {n: w.dense(torch.float32) for unit in units.values() for n, w in unit.weights.items()}


def stored(folder: Path) -> dict[str, Tensor]:
    """The tensors of an exported folder, by the library."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def read_again(folder: Path) -> dict[str, Tensor]:
    """The weights of a model on the disk, as fp32."""
    model = open_model(folder)
    return {
        spec.name: torch.cat([rows for _, rows in weight.rows()])
        for unit in unit_specs(model.model)
        for spec, weight in model.weights(unit)
    }


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def written(folder: Path, variant: str) -> dict[str, Tensor]:
    """A run and its export in shards, and the logits that the model has; returns its weights."""
    run, units = run_of(folder / "run", VARIANTS[variant])
    export(run, folder / "out", shard_size="100KB")
    ours, values = Llama(open_model(run).model), dense(units)
    ours.load_state_dict(values)
    with torch.no_grad():
        save_file({"logits": ours(TOKENS)}, folder / "logits")
    return values


def check_in_transformers(folder: Path, variant: str) -> None:
    """The version of transformers that is installed reads what was written, and computes the same."""
    theirs, loading = AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(loading.values()) and theirs.dtype == torch.float32
    with torch.no_grad():
        difference = (theirs(TOKENS).logits - load_file(folder / "logits")["logits"]).abs().max()
    assert float(difference) < 1e-6
    assert theirs.config.max_position_embeddings == VARIANTS[variant].get("max_positions", 32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_computes_the_same(variant: str, tmp_path: Path) -> None:
    values = written(tmp_path, variant)
    check_in_transformers(tmp_path, variant)
    # and so do we: the shape is that of the run, and another export of what was exported is the same
    again = open_model(tmp_path / "out").model
    before = open_model(tmp_path / "run").model
    assert again == ModelConfig(**{**before.model_dump(), **given(again)})
    found = read_again(tmp_path / "out")
    assert found.keys() == values.keys() and all(torch.equal(found[name], values[name]) for name in values)
    export(tmp_path / "out", tmp_path / "again", shard_size="100KB")
    first, second = everything(tmp_path / "out"), everything(tmp_path / "again")
    assert second.keys() == first.keys() - {"lowres/config.toml"}
    assert {name for name, content in second.items() if content != first[name]} == {"README.md"}


def given(model: ModelConfig) -> dict[str, Any]:
    """What a config.json says also where ours follows from other keys."""
    return {
        "n_kv_heads": model.kv_heads,
        "head_dim": model.head_width,
        "max_positions": model.max_positions,
    }


@pytest.mark.slow
def test_version_4_of_transformers_computes_the_same(tmp_path: Path, transformers_4: dict[str, str]) -> None:
    for variant in VARIANTS:
        written(tmp_path / variant, variant)
    program = (
        "import sys, transformers; from pathlib import Path; assert transformers.__version__ == '4.57.6'; "
        "from tests.test_export import check_in_transformers as check; "
        "[check(Path(sys.argv[1]) / variant, variant) for variant in sys.argv[2:]]"
    )
    command = [sys.executable, "-c", program, str(tmp_path), *VARIANTS]
    subprocess.run(command, check=True, env=transformers_4, timeout=300)


def test_the_files_are_those_of_the_libraries(tmp_path: Path) -> None:
    run, units = run_of(tmp_path / "run", {"n_layers": 11})
    export(run, tmp_path / "one")
    export(run, tmp_path / "shards", shard_size="100KB")
    assert not (tmp_path / "one" / shards.INDEX).exists()
    for file in (*(tmp_path / "one").glob("*.safetensors"), *(tmp_path / "shards").glob("*.safetensors")):
        save_file(load_file(file), tmp_path / "theirs", metadata={"format": "pt"})
        assert (tmp_path / "theirs").read_bytes() == file.read_bytes()
    # the index is that of transformers, whose shards hold the same tensors as its model has another order
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(
        tmp_path / "saved", max_shard_size="100KB"
    )
    ours, theirs = (json.loads((tmp_path / f / shards.INDEX).read_text()) for f in ("shards", "saved"))
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys() == dense(units).keys()
    for file in set(ours["weight_map"].values()):
        names = [name for name, where in ours["weight_map"].items() if where == file]
        tensors = load_file(tmp_path / "shards" / file)
        assert sorted(tensors) == sorted(names) and sum(t.nbytes for t in tensors.values()) <= 100_000


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_cast_is_that_of_torch_and_its_cost_is_said(dtype: str, tmp_path: Path) -> None:
    run, units = run_of(tmp_path / "run", {})
    lines = export(run, tmp_path / "out", dtype=dtype)
    found = stored(tmp_path / "out")
    values = dense(units)
    for name, value in values.items():
        assert torch.equal(found[name], value.to(DTYPES[dtype])), name
    matrices = {name: value.flatten() for name, value in values.items() if value.dim() == 2}
    lost = {name: found[name].flatten().float() - value for name, value in matrices.items()}
    of_all = float(torch.cat([*lost.values()]).norm() / torch.cat([*matrices.values()]).norm())
    of_each = {name: float(lost[name].norm() / value.norm()) for name, value in matrices.items()}
    worst = max(of_each, key=lambda name: of_each[name])
    assert lines[-1] == (
        f"{dtype} changes the matrices by {of_all:.2g} of their norm, at most {of_each[worst]:.2g} ({worst})"
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_comes_back_code_by_code(dtype: str, tmp_path: Path) -> None:
    run, units = run_of(tmp_path / "run", {}, "int8")
    export(run, tmp_path / "out", dtype=dtype)
    again = empty_units(open_model(run).model, "int8", "bf16", ROOMS)
    initialize_from(again.values(), open_model(tmp_path / "out"))
    wanted = {n: t for unit in units.values() for n, t in unit.weight_tensors().items()}
    found = {n: t for unit in again.values() for n, t in unit.weight_tensors().items()}
    names = [n for n, t in wanted.items() if t.dtype == torch.int8 or n.endswith(".scales")]
    assert len(names) == 2 * 7 * 2 and all(torch.equal(found[name], wanted[name]) for name in names)


def test_recorded_scales_count_only_for_what_they_explain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = run_of(tmp_path / "run", {}, "int8")
    export(run, tmp_path / "out", dtype="bf16")
    file, changed = tmp_path / "out" / shards.ONE, "model.layers.1.mlp.up_proj.weight"
    values = load_file(file)
    values[changed][3, 4] *= 1.01
    save_file(values, file, metadata={"format": "pt"})
    kinds = {spec.name: weight.kind for spec, weight in weights_of(tmp_path / "out") if len(spec.shape) == 2}
    assert kinds.pop(changed) == "bf16" and kinds.pop("lm_head.weight") == "bf16"
    assert kinds.pop("model.embed_tokens.weight") == "bf16" and set(kinds.values()) == {"int8"}
    # what transformers reads counts, whatever is recorded
    assert torch.equal(read_again(tmp_path / "out")[changed], values[changed].float())
    record = tmp_path / "out" / "lowres" / "int8_scales.safetensors"
    record.write_bytes(record.read_bytes()[:-1])
    assert {weight.kind for _, weight in weights_of(tmp_path / "out")} == {"bf16"}
    assert "codes will be rounded anew" in capsys.readouterr().err


def weights_of(folder: Path) -> Iterable[tuple[Any, Any]]:
    model = open_model(folder)
    return (pair for unit in unit_specs(model.model) for pair in model.weights(unit))


@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_adapters_are_merged_before_the_cast(weights: str, tmp_path: Path) -> None:
    config = make_config(model=SHAPE, memory={"weights": weights}, relora=RELORA | {"cycle_steps": 0})
    units, _, _ = with_adapters(config)
    generator = torch.Generator().manual_seed(1)
    merged = {}
    for unit in units.values():
        for spec in unit.spec.adapters.values():
            drawn = torch.randn(spec.shape, generator=generator) * 1e-4
            unit.fill(spec.name, iter([(0, drawn)]))
        for name, weight in unit.weights.items():
            merged[name] = weight.dense(torch.float64)
            if f"{name.removesuffix('.weight')}.lora_A.weight" in unit.weights:
                path = name.removesuffix(".weight")
                a, b = (unit.weights[f"{path}.lora_{part}.weight"].dense(torch.float64) for part in "AB")
                merged[name] += config.relora.scaling * b @ a
    run = save_run(tmp_path / "run", config, weights_by_unit(units))
    export(run, tmp_path / "exact", dtype="fp32")
    exact = stored(tmp_path / "exact")
    assert all("lora" not in name for name in exact)
    for name, value in exact.items():
        torch.testing.assert_close(value.double(), merged[name], rtol=1e-6, atol=1e-9)
    lines = export(run, tmp_path / "out")
    for name, value in stored(tmp_path / "out").items():
        assert torch.equal(value, exact[name].bfloat16()), name
    # so small a change does not survive, which is said
    change, whole = 0.0, 0.0
    for unit in units.values():
        for name in [name for name in unit.weights if name in exact and merged[name].dim() == 2]:
            change += float((merged[name] - unit.weights[name].dense(torch.float64)).square().sum())
            whole += float(merged[name].square().sum())
    assert f"adapters is {(change / whole) ** 0.5:.2g} of it; --dtype fp32 keeps" in lines[-1]


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of INT8 weights with checkpoints of steps 6 and 12."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "c.toml").write_text(
        f"""
[run]
name = "my-model"
[model]
dim = 32
n_layers = 2
n_heads = 2
ffn_dim = 64
[data]
source = "{prepared}"
seq_len = 32
[train]
steps = 12
batch_tokens = 256
eval_every = 6
eval_tokens = 512
checkpoint_every = 6
[memory]
compute = "fp32"
[log]
progress = false
"""
    )
    lowres_here("train", folder / "c.toml", "--run", folder / "run")
    return folder / "run"


def test_a_run_is_taken_along(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = lowres_here("export", trained, out, "--dtype", "fp32")
    assert "LlamaForCausalLM" in said.stdout and "changes" not in said.stdout
    _, engine, tokenizer = open_run(trained)
    theirs = AutoModelForCausalLM.from_pretrained(out)
    text = "  def main(arguments):\n\n    return 1 <s>"
    tokens = torch.tensor([tokenizer.prompt(text)])
    encoded = AutoTokenizer.from_pretrained(out)(text, return_tensors="pt")
    assert torch.equal(encoded.input_ids, tokens)
    with torch.no_grad():
        difference = (theirs(tokens).logits[:, -1] - engine.logits(tokens)).abs().max()
    assert float(difference) < 1e-6
    ends = GenerationConfig.from_pretrained(out)
    assert (ends.bos_token_id, ends.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    # the tokenizer of a run that begins here is this one to the byte, unless the folder has got another
    again = open_model(out).tokenizer
    assert again is not None and open_tokenizer(again, form="own").fingerprint == tokenizer.fingerprint
    seen = out / "tokenizer.json"
    seen.write_bytes(seen.read_bytes() + b"\n")
    assert open_model(out).tokenizer == seen


def test_the_card_says_what_the_model_is(trained: Path, tmp_path: Path) -> None:
    lowres_here("export", trained, tmp_path / "out", "--checkpoint", 6)
    card = (tmp_path / "out" / "README.md").read_text()
    front, text = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front) == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert "# license:" in front and "# my-model" in text
    assert "| tokens | 1,536 |" in text and "| steps | 6 of 12 |" in text and "`data`" in text
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses, bits = (
        {r["step"]: r[key] for r in records if key in r} for key in ("val_loss", "val_bits_per_byte")
    )
    assert f"| 0 |  | {bits[0]:.4f} | {losses[0]:.4f} |" in text and f"{losses[6]:.4f}" in text
    assert f"{losses[12]:.4f}" not in text and "loss.png" not in text
    # nobody's folders are given away
    for name, content in everything(tmp_path / "out").items():
        assert str(tmp_path.parent).encode() not in content, name


def test_the_card_names_what_is_on_the_hub(tmp_path: Path) -> None:
    cached = tmp_path / "models--org--small" / "snapshots" / ("0" * 40)
    parts = [{"source": "hf:org/books:en", "weight": 3.0}, {"source": str(tmp_path / "mine"), "weight": 1.0}]
    begun = tmp_path / "begun"
    for folder, before in ((begun, cached), (tmp_path / "run", begun)):
        config = make_config(
            model=SHAPE,
            data={"mixture": parts},
            run={"init_from": str(before), "name": folder.name},
            memory={"weights": "fp32"},
        )
        save_run(folder, config, weights_by_unit(make_units(config.model)))
    export(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["datasets"] == ["org/books"] and front["base_model"] == "org/small"
    assert "75.0% `hf:org/books:en`, 25.0% `mine`" in card
    assert all(str(tmp_path).encode() not in content for content in everything(tmp_path / "out").values())


def test_transformers_takes_the_tokenizer_as_it_is(trained: Path, tmp_path: Path) -> None:
    """It replaces the steps of a tokenizer beside a qwen2, so only a model with such steps becomes one."""
    text = "  12 o\u0308 don't  x\n\n y"
    normaliser = normalizers.NFC()
    for name, before, pattern, family in (
        ("as of qwen2", normaliser, QWEN2, "qwen2"),
        ("without a normaliser", None, QWEN2, "llama"),
        ("other digits", normaliser, QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"), "llama"),
        ("sentencepiece", None, None, "llama"),
    ):
        run, _ = run_of(tmp_path / name, {"qkv_bias": True, "vocab_size": 400})
        if pattern is None:
            shutil.copy(trained / "tokenizer.model", run)
        else:
            library = Tokenizer(BPE())
            library.normalizer = before
            split, on_bytes = pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel
            library.pre_tokenizer = pre_tokenizers.Sequence([split, on_bytes(False, use_regex=False)])
            library.decoder = decoders.ByteLevel()
            words = BpeTrainer(
                vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=on_bytes.alphabet()
            )
            library.train_from_iterator([text * 9], words)
            library.save(str(run / "tokenizer.json"))
        out = tmp_path / f"{name}-out"
        export(run, out)
        theirs, ours = AutoTokenizer.from_pretrained(out), open_model(run).tokenizer
        assert ours is not None
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == open_tokenizer(ours, form="own").encode(text), name
        assert json.loads((out / "config.json").read_text())["model_type"] == family, name
        assert not any(AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)[1].values()), name
        before_it, after = read_again(run), read_again(out)
        assert all(torch.equal(after[key], value) for key, value in before_it.items())
        assert open_model(out).model.qkv_bias


def test_two_exports_to_one_place_do_not_meet(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with target.whole(out, 1) as place:
        place.mkdir()
        (place / "file").write_text("first")
        with pytest.raises(UserError, match="out is being written by"), target.whole(out, 1):
            pass
        assert (place / "file").read_text() == "first"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "file").read_text() == "first"


def test_a_run_on_token_ids_has_no_tokenizer_to_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = run_of(tmp_path / "run", {"n_layers": 1})
    (run / Vocabulary.file_name).write_bytes(Vocabulary.content_of(300, None, None))
    export(run, tmp_path / "out")
    assert "knows token ids without text" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").glob("*token*")] == []
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id is None
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.eos_token_id is None
    assert open_model(tmp_path / "out").tokenizer == tmp_path / "out" / "lowres" / Vocabulary.file_name


def test_what_is_refused(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "file").write_text("kept")
    out = tmp_path / "out"

    def refused(*arguments: object, code: int = 2) -> str:
        said = lowres_here("export", *arguments, code=code).stderr
        assert len(said.splitlines()) == 1 and not out.exists()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]
        return said

    (there / "empty").mkdir()
    monkeypatch.chdir(there / "empty")
    assert "exists already" in refused(trained, ".")
    assert "file: this is not a folder" in refused(trained, there / "file" / "out")
    assert "exists already" in refused(trained, there) and (there / "file").read_text() == "kept"
    assert "no such folder" in refused(tmp_path / "nothing", out)
    assert "has none of this step, but 6, 12" in refused(trained, out, "--checkpoint", 7)
    assert "hf does not have it; use one of" in refused(trained, out, "--dtype", "q8_0")
    for size in ("5 apples", "9" * 400):
        assert "write it as 5GB" in refused(trained, out, "--shard-size", size)
    assert "is one file; leave it out" in refused(trained, tmp_path / "a.gguf", "--shard-size", "5GB")
    monkeypatch.setattr(target, "free_bytes", lambda folder: 1 << 16)
    assert "GiB are needed" in refused(trained, out, code=3)
    monkeypatch.undo()
    monkeypatch.setattr(shards, "_look_at", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    assert "nothing was written" in refused(trained, out, code=130)


def test_numbers_that_a_format_does_not_have_are_refused(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path / "run", {"n_layers": 1})
    export(run, tmp_path / "out")
    file = tmp_path / "out" / shards.ONE
    values = load_file(file)
    for bad, problem in ((7e4, "70000 in model.norm.weight is too large"), (float("nan"), "not finite")):
        values["model.norm.weight"][5] = bad
        save_file(values, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=problem):
            export(tmp_path / "out", tmp_path / "half", dtype="fp16")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


# in a process of its own: the high-water mark of its memory, after what it needs for any command
_MEASURED = """
import sys
from lowres.cli import main
def peak():
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
code = main(sys.argv[1:])
print(before, peak())
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_7b_is_exported_in_little_memory(tmp_path: Path) -> None:
    """From INT8 codes on the disk to bf16, 20 GB in all."""
    config = load_config("configs/llama_7b_12gb.toml", ["model.vocab_size=32000"])[0]
    kept, made = config.memory, dict[tuple[torch.dtype, tuple[int, ...]], Tensor]()

    def drawn(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if (dtype, shape) not in made:
            codes = torch.randint(-127, 128, shape, dtype=torch.int8)
            values = codes if dtype == torch.int8 else (codes.float() + 0.5).abs() * 1e-3
            made[dtype, shape] = values.to(dtype)
        return made[dtype, shape]

    def units() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for unit in unit_specs(config.model):
            fields = weight_fields(unit, storage_kinds([unit], kept.weights, kept.embeddings_kept_in))
            yield unit.name, {name: drawn(*field) for name, field in fields.items()}

    try:
        save_run(tmp_path / "run", config, units())
        command = [sys.executable, "-c", _MEASURED, "export", str(tmp_path / "run"), str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        before, peak = (int(number) / 2**20 for number in done.stdout.splitlines()[-1].split())
        print(f"{before:.2f} GiB before, {peak:.2f} GiB at most")
        assert peak < 2 and peak - before < 0.6
        index = json.loads((tmp_path / "out" / shards.INDEX).read_text())
        assert index["metadata"] == {"total_parameters": 6_738_415_616, "total_size": 2 * 6_738_415_616}
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.31.mlp.down_proj.weight"):
            with safe_open(tmp_path / "out" / index["weight_map"][name], "pt") as file:
                found = file.get_tensor(name)
            shape = tuple(found.shape)
            codes, scales = made[torch.int8, shape], made[torch.float32, (shape[0], 1)]
            assert torch.equal(found, (codes * scales).bfloat16())
    finally:
        shutil.rmtree(tmp_path)
