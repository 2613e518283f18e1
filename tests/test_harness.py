"""`lowres eval --tasks`: the scores are those of lm_eval's own model for the same weights as a folder of
transformers."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from lowres.config import ModelConfig
from lowres.data.tokenizer import Vocabulary, open_tokenizer
from lowres.errors import UserError
from lowres.harness import tasks
from lowres.harness.model import RunModel
from lowres.runs import open_run
from tests.helpers import lowres_here
from tests.test_model import reference
from tests.test_tokenizers import PROSE, llama3

LENGTH = 48
MODEL = ModelConfig(dim=32, n_layers=2, n_heads=2, ffn_dim=64)
LONG = "the other cat sat on the mat. " * 12
QUESTIONS: list[dict[str, Any]] = [
    {"question": "The cat sat on the ", "choices": ["mat", "  cat", "o'clock"], "gold": 0},
    {"question": "", "choices": ["The cat", "return cats", "\n\n"], "gold": 1},
    {"question": LONG, "choices": ["The", " and the other cat (42 years old)", " x"], "gold": 2},
    {"question": "caf\u00e9 \u4e2d <|begin_of_text|>", "choices": ["\u3002", "s", "1,234,567"], "gold": 0},
    {"question": "It's 1,234,567", "choices": [" o'clock", " o'clocks", " \U0001f600"], "gold": 1},
    {"question": "[INST] we'll\n", "choices": ["user", "    return", "naive "], "gold": 1},
]
PROMPTS = ["The cat sat", LONG, "It's 1,234", ""]


def task(folder: Path, name: str, rows: Sequence[object], **keys: Any) -> None:
    """A task of lm_eval with its data."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"test": str(data), "train": str(data)}
    both = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(both | keys))


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer in transformers; the spelling of its control tokens in a text is text."""
    ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, split_special_tokens=True, **ends)


@dataclass(frozen=True)
class Made:
    """A run, the same weights as a folder of transformers, and a folder of tasks."""

    run: Path
    exported: Path
    tasks: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("harness")
    tokenizer = root / "tokenizer.json"
    llama3().save(str(tokenizer))
    (root / "prose.txt").write_text(PROSE * 5)
    (root / "config.toml").write_text(
        f"""
[model]
dim = {MODEL.dim}
n_layers = {MODEL.n_layers}
n_heads = {MODEL.n_heads}
ffn_dim = {MODEL.ffn_dim}

[data]
source = "{root / "prose.txt"}"
cache = "{root / "cache"}"
tokenizer = "{tokenizer}"
seq_len = {LENGTH}
document_mask = true

[train]
steps = 12
batch_tokens = 384
micro_batch = 3
eval_every = 0

[optim]
name = "adamw"
lr = 0.02

[memory]
weights = "fp32"
compute = "fp32"

[log]
progress = false
"""
    )
    lowres_here("train", root / "config.toml", "--run", root / "run")
    (saved,) = (root / "run" / "checkpoints").iterdir()
    weights = {n: t for file in saved.glob("*.safetensors") for n, t in load_file(file).items()}
    theirs = reference(MODEL.model_copy(update={"vocab_size": len(weights["model.embed_tokens.weight"])}))
    theirs.load_state_dict({name: weights[name] for name in theirs.state_dict()})
    theirs.config.max_position_embeddings = LENGTH
    theirs.save_pretrained(root / "exported")
    fast(llama3()).save_pretrained(root / "exported")
    (root / "tasks").mkdir()
    task(
        *(root / "tasks", "choice", QUESTIONS),
        output_type="multiple_choice",
        fewshot_split="train",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="gold",
        target_delimiter="",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    task(
        *(root / "tasks", "text", [{"text": text} for text in (LONG, PROSE[:300], "a")]),
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        metric_list=[{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    )
    task(
        *(root / "tasks", "answer", [{"q": prompt, "a": "mat"} for prompt in PROMPTS[:3]]),
        output_type="generate_until",
        doc_to_text="{{q}}",
        doc_to_target="{{a}}",
        generation_kwargs={"until": ["\n", "cat"], "max_gen_toks": 9},
        metric_list=[{"metric": "chrf"}],
    )
    return Made(root / "run", root / "exported", root / "tasks")


# its cache reads the wrong positions of a text that another request divides at another place
HF: dict[str, Any] = {"device": "cpu", "dtype": "float32", "batch_size": 2, "logits_cache": False}


@pytest.fixture(scope="module")
def theirs(made: Made) -> HFLM:
    return HFLM(pretrained=str(made.exported), **HF)


def near(found: Any, wanted: Any) -> None:
    """Numbers may differ by 1e-4 of them."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        found, wanted = ([value for value in of.values() if value != "N/A"] for of in (found, wanted))
        assert [v for v in found if isinstance(v, str)] == [v for v in wanted if isinstance(v, str)]
        found, wanted = ([v for v in of if not isinstance(v, str)] for of in (found, wanted))
    assert found == pytest.approx(wanted, rel=1e-4)


def test_scores_are_those_of_the_exported_folder(
    made: Made, theirs: HFLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "add_env_info", lambda _: None)  # it takes seconds
    names = ["choice", "text", "answer"]
    arguments = ("eval", made.run, "--include-path", made.tasks, "--json")
    done = lowres_here(*arguments, "--tasks", ",".join(names))
    found = json.loads(done.stdout)["results"]
    manager = TaskManager(include_path=str(made.tasks), include_defaults=False)
    wanted = evaluator.simple_evaluate(theirs, tasks=names, task_manager=manager, bootstrap_iters=1000)
    assert wanted is not None and found.keys() == set(names)
    for name in names:
        near(found[name], wanted["results"][name])
    assert 0 < found["choice"]["acc,none"] < 1
    assert "note: " in done.stderr and f"which saw their last {LENGTH} tokens" in done.stderr
    fewer = json.loads(lowres_here(*arguments, "--tasks", "choice", "--limit", 4, "--num-fewshot", 2).stdout)
    wanted = evaluator.simple_evaluate(theirs, tasks=["choice"], task_manager=manager, limit=4, num_fewshot=2)
    assert wanted is not None
    near(fewer["results"]["choice"], wanted["results"]["choice"])
    assert fewer["n-shot"] == {"choice": 2} and fewer["n-samples"]["choice"]["effective"] == 4


@dataclass(frozen=True)
class Asked:
    args: tuple[Any, ...]


@pytest.mark.parametrize("bos_in_front", [True, False])
def test_answers_are_those_of_the_exported_folder(
    made: Made, theirs: HFLM, bos_in_front: bool, tmp_path: Path
) -> None:
    """Request by request: scores may be the same by chance. Also if the tokenizer puts no bos in front."""
    _, engine, tokenizer = open_run(made.run, packed=False)
    if not bos_in_front:
        bare = llama3()
        bare.post_processor = processors.ByteLevel(trim_offsets=False)
        bare.save(str(tmp_path / "tokenizer.json"))
        tokenizer = open_tokenizer(tmp_path)
        theirs = HFLM(theirs.model, tokenizer=fast(bare), **HF)
    ours = RunModel(engine, tokenizer, LENGTH, 5 * LENGTH, sequences=2)
    pairs = [Asked((row["question"], answer)) for row in QUESTIONS for answer in row["choices"]]
    # what the model itself would say, so that some answers are the likeliest
    ending = {"until": ["\n", "cat"], "max_gen_toks": 9, "top_p": 0.9}
    asked = [Asked((prompt, ending)) for prompt in PROMPTS[:3]]
    written = theirs.generate_until(asked)
    assert ours.generate_until(asked) == written and max(map(len, written)) > 3
    asked = [Asked((prompt, {"max_gen_toks": 3, "do_sample": False})) for prompt in PROMPTS[:3]]
    greedy = theirs.generate_until(asked)
    assert ours.generate_until(asked) == greedy
    pairs += [Asked((prompt, answer)) for prompt, answer in zip(PROMPTS, greedy, strict=False)]
    wanted, found = theirs.loglikelihood(pairs), ours.loglikelihood(pairs)
    near([score for score, _ in found], [score for score, _ in wanted])
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in wanted]
    assert {likeliest for _, likeliest in found} == {False, True}
    texts = [Asked((text,)) for text in (LONG, PROSE[:400], "a", "")]
    near(ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts))


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(sys.modules[module], "HF_HUB_OFFLINE", True)


def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those of the folder: to list all takes seconds."""
    monkeypatch.setattr(tasks, "_manager", lambda make, _, include: make(None, str(include), False))


def without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.manager", None)


CHOICE = {"output_type": "multiple_choice", "doc_to_text": "x", "doc_to_choice": ["a"], "doc_to_target": 0}
# the keys of a task, how its names are given, what is changed before, and what is said
REFUSED: dict[str, tuple[dict[str, Any], str, Callable[[pytest.MonkeyPatch], None] | None, str]] = {
    "unknown": (
        {},
        "bad,bda",
        few_tasks,
        "'bda' is neither a task, group or tag nor a YAML file; near it: bad",
    ),
    "no package": ({}, "bad", without_lm_eval, "pip install 'lm_eval>=0.4.12'"),
    "offline": ({"dataset_path": "lowres/nothing"}, "bad", offline, "the data of a task are not here"),
    "no file": ({"dataset_kwargs": {"data_files": "gone.jsonl"}}, "bad", None, "gone.jsonl"),
    "a module": (
        {"doc_to_text": "!function own.text"},
        "bad",
        None,
        "needs a package (No module named 'gone'",
    ),
    "a filter": (
        {"doc_to_text": "{{x | gone}}"},
        "bad",
        None,
        "cannot be used (TemplateAssertionError: No filter",
    ),
    "unsafe": ({"unsafe_code": True}, "bad", None, "marked as unsafe"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said_in_one_line(
    case: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, names, before, message = REFUSED[case]
    task(tmp_path, "bad", QUESTIONS, **(CHOICE | keys))
    written = (tmp_path / "bad.yaml").read_text()
    (tmp_path / "bad.yaml").write_text(written.replace("'!function own.text'", "!function own.text"))
    (tmp_path / "own.py").write_text("import gone\n")
    if before is not None:
        before(monkeypatch)
    done = lowres_here("eval", made.run, "--tasks", names, "--include-path", tmp_path, code=2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("lowres: ")]
    assert line.startswith("lowres: --tasks: ") and message in line and not done.stdout
    print(line)
    assert done.stderr.endswith(line + "\n") and "Traceback" not in done.stderr


def test_what_a_run_cannot_answer(made: Made, tmp_path: Path) -> None:
    config, engine, tokenizer = open_run(made.run, packed=False)
    model = RunModel(engine, tokenizer, LENGTH, LENGTH)
    for kwargs, message in (
        ({"max_gen_toks": LENGTH}, f"asks for {LENGTH} tokens"),
        ({"max_gen_toks": 4, "num_beams": 2}, "generation_kwargs.num_beams = 2, which is not supported"),
        ({"max_gen_toks": 4, "do_sample": True, "top_p": 0.9}, "generation_kwargs.top_p = 0.9"),
    ):
        with pytest.raises(UserError, match=message):
            model.generate_until([Asked(("a", kwargs))])
    assert model.loglikelihood([Asked(("a", ""))]) == [(0.0, True)]
    with pytest.raises(
        UserError, match=f"an answer of [0-9]+ tokens, but the context of the model is {LENGTH} "
    ):
        model.loglikelihood([Asked(("a", LONG))])
    # with one seed, one text; another for each request
    sampled = [Asked(("The cat", {"max_gen_toks": 20, "temperature": 1.5}))] * 2
    first = model.generate_until(sampled)
    assert model.generate_until(sampled) == first and first[0] != first[1]
    ids = Vocabulary(tmp_path, Vocabulary.content_of(300, None, None))
    with pytest.raises(UserError, match="ids without text"):
        tasks.score({"tasks": {}}, config, engine, ids)
    for options in (["--limit", 2], ["--tasks", "choice", "--data", "x"]):
        refused = lowres_here("eval", made.run, *options, code=2).stderr
        assert refused.startswith(f"lowres: {options[-2]}: ") and len(refused.splitlines()) == 1
