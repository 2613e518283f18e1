"""`lowres eval --tasks`: the scores are those of lm_eval's own model for the same weights as a folder of
transformers."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from lowres import harness, metrics, ranks, report, start
from lowres.config import ModelConfig
from lowres.config_file import load_resolved, to_toml, with_values
from lowres.data.tokenizer import Vocabulary, open_tokenizer
from lowres.errors import UserError
from lowres.exchange.card import without_places
from lowres.harness import tasks
from lowres.harness.model import RunModel
from lowres.memory import make_plan
from lowres.runs import open_run
from lowres.scores import of_tasks, task_in_words
from lowres.view import View
from tests.helpers import lowres_here, make_config, train_and_kill
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
    "a score": (
        {"process_results": "!function own.scored"},
        "bad",
        None,
        "cannot be used (KeyError: 'gone')",
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
    (tmp_path / "bad.yaml").write_text(re.sub(r"'(!function [\w.]+)'", r"\1", written))
    scored = "def scored(doc, results):\n    return doc['gone']\n"
    (tmp_path / "own.py").write_text(scored if case == "a score" else "import gone\n")
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


def test_requests_are_packed_or_have_windows_of_their_own(made: Made) -> None:
    _, engine, tokenizer = open_run(made.run, packed=False)
    asked = [Asked((row["question"], answer)) for row in QUESTIONS for answer in row["choices"]]
    alone = [RunModel(engine, tokenizer, LENGTH, LENGTH).loglikelihood([one])[0] for one in asked]
    packed, narrow = (RunModel(engine, tokenizer, LENGTH, 3 * w, window=w) for w in (LENGTH, 16))
    for model in (packed, narrow):
        found = model.loglikelihood(asked)
        near([score for score, _ in found], [score for score, _ in alone])
        assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in alone]


# ---------------------------------------------------------------------------- on the way

ON_THE_WAY = ["choice", "text", "answer"]


def judged(made: Made, run: Path, *settings: str) -> list[object]:
    """A command that trains with tasks."""
    keys: dict[str, Any] = {"eval_every": 4, "eval_tasks_every": 2, "eval_tasks_limit": 4}
    keys |= {"eval_tasks": json.dumps(ON_THE_WAY), "eval_tasks_folder": str(made.tasks)}
    sets = [f"train.{key}={value}" for key, value in keys.items()] + [*settings]
    return [made.run.parent / "config.toml", "--run", run, *(word for one in sets for word in ("--set", one))]


def of_steps(run: Path) -> list[dict[str, Any]]:
    """The numbers that do not depend on time."""
    found = metrics.read(run / "metrics.jsonl")
    timed = {"tokens_per_s", "wall_s", "peak_rss_gib", "peak_mem_gib", "host_mem_gib"}
    return [{key: value for key, value in record.items() if key not in timed} for record in found]


def test_tasks_on_the_way_change_nothing(made: Made, tmp_path: Path) -> None:
    """In a run that keeps documents apart, where requests must not be cut; also if it is killed."""
    plain, run, killed = (tmp_path / name for name in ("plain", "run", "killed"))
    lowres_here("train", made.run.parent / "config.toml", "--run", plain, "--set", "train.eval_every=4")
    done = lowres_here("train", *judged(made, run))
    train_and_kill(judged(made, killed, "train.checkpoint_every=3"), after=10)
    lowres_here("train", killed, "--resume")
    found = of_steps(run)
    assert of_steps(killed) == found
    without = [{k: v for k, v in record.items() if not k.startswith("task/")} for record in found]
    assert without == of_steps(plain)
    last = "checkpoints/step_00000012"
    files = [sorted((one / last).glob("*.safetensors")) for one in (plain, run)]
    assert len(files[0]) == 4
    for ours, theirs in zip(*files, strict=True):
        weights, others = load_file(ours), load_file(theirs)
        assert all(torch.equal(weights[name], others[name]) for name in others)

    scored = [record for record in found if "task/choice/acc" in record]
    assert [record["step"] for record in scored] == [0, 8, 12]
    # the last ones are those of `lowres eval` for the same weights
    arguments = ("eval", run, "--include-path", made.tasks, "--json", "--limit", 4)
    results = json.loads(lowres_here(*arguments, "--tasks", ",".join(ON_THE_WAY)).stdout)["results"]
    wanted = {
        f"task/{task}/{key.removesuffix(',none')}": value
        for task, values in results.items()
        for key, value in values.items()
        if isinstance(value, int | float) and key.endswith(",none")
    }
    assert {"task/choice/acc_stderr", "task/choice/acc_norm", "task/text/bits_per_byte"} <= wanted.keys()
    numbers = {key: value for key, value in scored[-1].items() if key.startswith("task/")}
    near(numbers, wanted)
    summary = json.loads((run / "summary.json").read_text())
    assert {key: summary[key] for key in numbers} == numbers

    # nothing of lm_eval is printed, and all who look at a run see the scores
    accuracy = f"{numbers['task/choice/acc']:.4f} ± {numbers['task/choice/acc_stderr']:.4f}"
    assert f"step 12: tasks: choice: acc {accuracy}, acc_norm " in done.stderr and "%|" not in done.stderr
    assert done.stderr.count(f"which saw their last {LENGTH} tokens") == 1
    assert "every 8 steps: scored on choice, text, answer, at most 4 questions of each" in done.stderr
    assert f"choice acc {accuracy}, acc_norm " in lowres_here("watch", run, "--once").stdout
    page = report.page([View(run)])
    assert "Task: choice" in page and f"choice: acc, last<td>{accuracy}<" in page
    lowres_here("export", run, tmp_path / "out")
    assert f"| `choice` | acc | {accuracy} |" in (tmp_path / "out" / "README.md").read_text()
    assert str(made.tasks) not in to_toml(without_places(load_resolved(run / "config.toml")))


AT_THE_START: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None], str]] = {
    "unknown": (
        "train.eval_tasks=['chioce']",
        few_tasks,
        "train.eval_tasks: 'chioce' is neither a task, group or tag nor a YAML file; near it: choice",
    ),
    "no package": ("", without_lm_eval, "train.eval_tasks: needs the package lm_eval: pip install"),
    "no folder": ("train.eval_tasks_folder=gone", few_tasks, "eval_tasks_folder: gone is not a folder"),
    "never evaluated": ("train.eval_every=0", few_tasks, "train.eval_every is 0, so nothing is evaluated"),
}


@pytest.mark.parametrize("case", AT_THE_START)
def test_what_is_wrong_is_said_before_the_first_step(
    case: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, before, message = AT_THE_START[case]
    before(monkeypatch)
    done = lowres_here("train", *judged(made, tmp_path / "run", *filter(None, [setting])), code=2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("lowres: ")]
    assert message in line and not (tmp_path / "run").exists()


def test_several_ranks_score_no_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "size", lambda: 2)
    with pytest.raises(UserError, match=r"train\.eval_tasks: several ranks score no tasks; .*--tasks x,y`$"):
        start.loaded_tasks(make_config(train={"eval_every": 1, "eval_tasks": ["x", "y"]}))


def test_a_task_that_fails_on_the_way_does_not_end_a_run(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = harness.score_in_training

    def fails(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise UserError("train.eval_tasks: a task cannot be used (KeyError: x); leave it out")
        return real(*arguments)

    monkeypatch.setattr(harness, "score_in_training", fails)
    one = ["train.eval_tasks=['choice']", "memory.rehearse=true"]
    done = lowres_here("train", *judged(made, tmp_path / "run", *one))
    assert "note: train.eval_tasks: a task cannot be used (KeyError: x)" in done.stderr and len(calls) == 2
    calls[:] = [1]  # of a run that has just begun nothing is lost
    lowres_here("train", *judged(made, tmp_path / "other", *one), code=2)


def test_a_group_stands_for_its_tasks() -> None:
    results = {
        "mmlu": {"alias": "mmlu", "acc,none": 0.5, "acc_stderr,none": 0.1},
        "stem": {"acc,none": 0.4, "acc_stderr,none": "N/A"},
        "physics": {"acc,none": 0.3},
        "gsm8k": {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.01},
    }
    groups = {"mmlu": {"acc,none": 0.5}}
    found = {"results": results, "groups": groups, "group_subtasks": {"mmlu": ["stem"], "stem": ["physics"]}}
    numbers = tasks.Scores(found, 0, 1).numbers()
    assert numbers == {
        "task/mmlu/acc": 0.5,
        "task/mmlu/acc_stderr": 0.1,
        "task/gsm8k/exact_match,strict": 0.25,
        "task/gsm8k/exact_match_stderr,strict": 0.01,
    }
    assert of_tasks(numbers) == {"mmlu": {"acc": (0.5, 0.1)}, "gsm8k": {"exact_match,strict": (0.25, 0.01)}}
    assert task_in_words(of_tasks(numbers)["mmlu"]) == "acc 0.5000 ± 0.1000"


def test_the_plan_has_the_memory_of_an_answer() -> None:
    config, cpu = make_config(train={"eval_every": 1}), torch.device("cpu")
    judged = make_plan(with_values(config, "train", eval_tasks=("choice",)), cpu)
    assert judged.size("keys and values") > 0 == make_plan(config, cpu).size("keys and values")
