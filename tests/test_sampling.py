"""Sampling: the KV cache compared with reading everything again and with transformers, texts that are written
together, the text while it is written, and the memory that it takes."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lowres import session
from lowres.config import ModelConfig
from lowres.config_file import load_config
from lowres.conversation import Conversation
from lowres.data import open_tokenizer
from lowres.engine import Choice, Engine, EngineSettings, LayerwiseEngine, layerwise, make_engine
from lowres.engine.cache import Rereading
from lowres.memory import GIB, choice, make_plan, plan_use
from lowres.meter import LiveTensors
from lowres.model import empty_units, initialize
from lowres.rooms import GPU, HOST, Homes, Rooms
from lowres.runs import OpenRun, open_run
from lowres.sample import END, LENGTH, STOP, Generation, Sampling, parts
from lowres.sample.text import _Stopped
from tests.helpers import (
    CPU,
    LLAMA3,
    ROOMS,
    SMALL,
    lowres_here,
    make_config,
    make_units,
    relora_config,
    save_run,
    weights_by_unit,
    with_adapters,
)
from tests.test_tokenizers import sentencepiece_model

EVERYTHING = Homes(frozenset(("layers.0", "layers.1", "layers.2", "head", "embed")))


def engine_of(
    model: ModelConfig = SMALL, homes: Homes = EVERYTHING, band: int = 1, **settings: Any
) -> LayerwiseEngine:
    rooms = Rooms(CPU)
    units = empty_units(model, settings.pop("weights", "fp32"), "fp32", rooms, homes.weights)
    initialize(units.values(), 0, CPU)
    return LayerwiseEngine(
        model, units, None, rooms, EngineSettings(3, torch.float32, band=band, homes=homes, **settings)
    )


def small(**keys: Any) -> ModelConfig:
    base = {"dim": 64, "n_layers": 3, "n_heads": 4, "ffn_dim": 172, "vocab_size": 300}
    return ModelConfig.model_validate(base | keys)


def adapted() -> Engine:
    _, _, engine = with_adapters(relora_config())
    for unit in engine.units():
        for name, weight in unit.weights.items():
            if "lora_B" in name:
                weight.fill(iter([(0, torch.randn(weight.shape) / 9)]))
    return engine


AUTOGRAD = make_config(memory={"engine": "autograd", "weights": "fp32"})
ENGINES: dict[str, Callable[[], Engine]] = {
    "plain, from the host": engine_of,
    "grouped": lambda: engine_of(small(n_kv_heads=2), band=2),
    "one key head, qwen3": lambda: engine_of(small(n_kv_heads=1, qk_norm=True, qkv_bias=True, **LLAMA3)),
    "tied": lambda: engine_of(small(tie_embeddings=True), Homes()),
    "int8 products": lambda: engine_of(weights="int8", int8=True, fused=True),
    "fused": lambda: engine_of(fused=True),
    "adapters": adapted,
    "autograd": lambda: make_engine(AUTOGRAD, make_units(SMALL), None, ROOMS, Choice(1)),
}


def drawn(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(0, 300, (count,), generator=generator).tolist()


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("at_once", [2048, 7])
def test_what_was_read_gives_the_same_logits_as_reading_it_again(
    name: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of different lengths grow, end, go back, and change their order."""
    monkeypatch.setattr(layerwise, "READ_TOKENS", at_once)
    engine, generator = ENGINES[name](), torch.Generator().manual_seed(1)
    reader = engine.reader(5, 40)
    texts = {row: drawn(generator, length) for row, length in enumerate((5, 9, 1, 20, 9))}
    for step in range(9):
        found = reader.logits(texts)
        wanted = torch.cat([engine.logits(torch.tensor([ids])) for ids in texts.values()])
        # INT8 codes of activations are rounded, so a last bit may change one of them
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3 if name == "int8 products" else 1e-5)
        assert found.std() > 0.05
        for row in texts:
            texts[row] += drawn(generator, 1 + (step == 5))
        if step == 2:
            del texts[1]
        if step == 4:
            texts[0] = [*texts[0][:4], 7, 8, 9]
        if step == 6:
            texts = {row: texts[row] for row in (3, 0, 4)}


def test_logits_are_those_of_transformers() -> None:
    """Which read the whole text."""
    engine = engine_of(small(n_kv_heads=2))
    theirs = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=172,
            vocab_size=300,
            rms_norm_eps=1e-5,
        )
    ).eval()
    weights = {n: s.dense(torch.float32) for unit in engine.units() for n, s in unit.weights.items()}
    theirs.load_state_dict(weights)
    generator = torch.Generator().manual_seed(2)
    whole = [drawn(generator, 60), drawn(generator, 60)]
    with torch.no_grad():
        wanted = theirs(torch.tensor(whole)).logits
    reader = engine.reader(2, 60)
    for length in (17, 18, 19, 40, 41, 60):
        found = reader.logits({0: whole[0][:length], 1: whole[1][: length - 9]})
        for row, last in enumerate((length - 1, length - 10)):
            assert (found[row] - wanted[row, last]).abs().max() < 1e-5


def test_a_token_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the work for a token grows no faster than what it attends to."""
    engine, read = engine_of(), list[int]()
    extend = engine._extend_band

    def counted(x: Tensor, *others: Any) -> None:
        read.append(len(x))
        extend(x, *others)

    monkeypatch.setattr(engine, "_extend_band", counted)
    how = Sampling(30, 64, top_k=0)
    prompts = [[1, 2, 3], [4] * 20]
    assert len(list(Generation(engine.reader(2, 50), prompts, how, 300, ()))) == 60
    assert read[::3] == [23] + [2] * 29


def test_what_does_not_fit_is_read_in_smaller_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if memory runs out in the second layer of a band, when the first has kept its keys."""
    engine, sizes = engine_of(band=2), list[int]()
    texts = {0: list(range(40)), 1: list(range(9))}
    wanted = engine.reader(2, 40).logits(texts)
    block = layerwise.block

    def full(x: Tensor, *others: Any) -> Tensor:
        sizes.append(x.shape[1])
        if x.shape[1] > 15 and len(sizes) > 1:
            raise torch.OutOfMemoryError
        return block(x, *others)

    monkeypatch.setattr(layerwise, "block", full)
    torch.testing.assert_close(engine.reader(2, 40).logits(texts), wanted, rtol=0, atol=1e-6)
    assert sizes[:4] == [49, 49, 24, 12] and set(sizes[4:]) == {12, 1}


@pytest.mark.parametrize("length", [1, 2, 9, 16])
def test_a_context_loses_its_older_half_when_it_is_full(length: int) -> None:
    """The cache and reading again write the same, and see what the rule says."""
    engine, seen = engine_of(), list[list[int]]()

    def logits(tokens: Tensor) -> Tensor:
        seen.append(tokens[0].tolist())
        return engine.logits(tokens)

    how, prompt = Sampling(40, length, top_k=0, seed=3), drawn(torch.Generator().manual_seed(0), 12)
    again = [token for _, token in Generation(Rereading(logits), [prompt], how, 300, ())]
    cached = [token for _, token in Generation(engine.reader(1, length), [prompt], how, 300, ())]
    assert cached == again and len(set(again)) > 10
    whole = prompt + again
    for number, context in enumerate(seen):
        end = len(prompt) + number
        assert context == whole[end - len(context) : end]
        assert max(1, length // 2) <= len(context) <= length
    sizes = [len(context) for context in seen]
    wanted = [min(12, length)]
    while len(wanted) < 40:
        wanted.append(wanted[-1] + 1 if wanted[-1] < length else max(1, length // 2))
    assert sizes == wanted


def test_texts_that_are_written_together_are_those_that_are_written_alone() -> None:
    """One ends early, one is stopped from outside, and one fills its context."""
    engine, generator = engine_of(), torch.Generator().manual_seed(4)
    prompts = [drawn(generator, length) for length in (3, 30, 11, 1)]
    how, seeds = Sampling(25, 40, top_k=100), [0, 1, 0, 7]

    def written(some: Sequence[int], ends: Sequence[int]) -> dict[int, list[int]]:
        texts: dict[int, list[int]] = {i: [] for i in some}
        chosen = [prompts[i] for i in some]
        reader = engine.reader(len(some), 40)
        made = Generation(reader, chosen, how, 300, ends, [seeds[i] for i in some])
        for number, token in made:
            texts[some[number]].append(token)
            if some[number] == 2 and len(texts[2]) == 5:
                made.stop(number)
        return texts

    alone = {i: written([i], ())[i] for i in range(4)}
    assert written(range(4), ()) == alone and [len(text) for text in alone.values()] == [25, 25, 5, 25]
    end = alone[0][9]
    together = written(range(4), [end])
    assert together[0] == alone[0][: alone[0].index(end)] and len(together[0]) < 25
    assert together == {i: written([i], [end])[i] for i in range(4)}


# ---- text


@given(
    pieces=st.lists(st.text("abc", max_size=3), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
@settings(deadline=None)
def test_a_text_ends_in_front_of_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    """Wherever the pieces divide it, and nothing of it was given out before."""
    texts = list(itertools.accumulate(pieces))
    first = next((text for text in texts if any(stop in text for stop in stops)), None)
    wanted = "".join(pieces)
    if first is not None:
        wanted = first[: min(first.index(stop) for stop in stops if stop in first)]
    found, given_out = _Stopped(stops), ""
    for piece in pieces:
        text, stopped = found.add(piece)
        given_out += text
        assert wanted.startswith(given_out)
        if stopped:
            break
    assert given_out + found.rest == wanted
    assert (first is not None) == bool(pieces and stopped)


class Scripted:
    """An engine that writes what it is told to. interrupt: the number of the token at which Ctrl-C comes."""

    fetched = 0

    def __init__(self, vocab_size: int, ids: Sequence[int], interrupt: int = -1) -> None:
        self._vocab_size, self._ids, self._interrupt = vocab_size, list(ids), interrupt
        self.settings = EngineSettings(1, torch.float32)

    def logits(self, tokens: Tensor) -> Tensor:
        self._interrupt -= 1
        if self._interrupt == -1:
            raise KeyboardInterrupt
        return torch.eye(self._vocab_size)[[self._ids.pop(0)]]

    def reader(self, sequences: int, length: int) -> Rereading:
        return Rereading(self.logits)


def test_parts_have_whole_characters_and_say_why_a_text_ends(run: Path) -> None:
    tokenizer = open_tokenizer(run)
    text = "h\u00e9 \u6587\U0001f600 end"
    ids = [*tokenizer.encode(text), tokenizer.end_id, *tokenizer.encode("ab"), 0]
    assert len(tokenizer.encode("\u6587")) == 3  # bytes
    for stop, tokens, wanted, end in (
        ([], 99, text, END),
        ([], 4, None, LENGTH),
        (["\U0001f600 e"], 99, "h\u00e9 \u6587", STOP),
    ):
        engine = cast(Any, Scripted(tokenizer.vocab_size, ids))
        made = Generation(
            engine.reader(1, 99), [[1]], Sampling(tokens, 99, 0), tokenizer.vocab_size, {tokenizer.end_id}
        )
        *some, last = parts(made, [tokenizer.stream()], stop)
        assert [part.token for part in some] == ids[: len(some)] and last.token is None and last.end == end
        found = "".join(part.text for part in (*some, last))
        if wanted is None:
            assert found == tokenizer.decode(ids[:4]) and not any("\ufffd" in part.text for part in some)
        else:
            assert found == wanted and "\ufffd" not in found


# ---- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on text, whose weights are on the host, with two checkpoints."""
    folder = tmp_path_factory.mktemp("sampled") / "run"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(add_dummy_prefix=False))
    vocabulary = open_tokenizer(folder).vocab_size
    config = make_config(
        model={"vocab_size": vocabulary},
        memory={"weights": "fp32", "compute": "fp32", "weights_on": "host"},
        data={"seq_len": 64},
        train={"batch_tokens": 64},
    )
    for step in (2, 4):
        save_run(folder, config, weights_by_unit(make_units(config.model, seed=step)), step)
    return folder


GREEDY = ("--temperature", 0, "--tokens", 12)


def test_the_command_writes_one_text_or_several(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ("def ", "class Action", "x")
    alone = [lowres_here("sample", run, "--prompt", prompt, *GREEDY).stdout for prompt in prompts]
    assert all(text.startswith(prompt) for text, prompt in zip(alone, prompts, strict=True))
    asked = [part for prompt in prompts for part in ("--prompt", prompt)]
    together = lowres_here("sample", run, *asked, *GREEDY).stdout
    assert together == "".join(f"--- {i} ---\n{text}" for i, text in enumerate(alone, 1))
    (tmp_path / "prompts.txt").write_text("\n".join((*prompts, "", "")))
    found = lowres_here("sample", run, "--prompts", tmp_path / "prompts.txt", "--json", *GREEDY).stdout
    records = [json.loads(line) for line in found.splitlines()]
    assert [record["prompt"] + record["text"] + "\n" for record in records] == alone
    assert {record["end"] for record in records} == {LENGTH}
    stop = records[0]["text"][3:5]
    cut = json.loads(lowres_here("sample", run, "--prompt", "def ", "--stop", stop, "--json", *GREEDY).stdout)
    assert cut["text"] == records[0]["text"].partition(stop)[0] and cut["end"] == STOP
    monkeypatch.setattr("sys.stdin", io.StringIO("def \n\nclass Action"))
    assert lowres_here("sample", run, "--interactive", *GREEDY).stdout == "".join(alone[:2])
    # the library
    opened = open_run(run, texts=2)
    texts = [""] * 3
    for part in opened.generate(prompts, 12, temperature=0):
        texts[part.prompt] += part.text
    assert [prompt + text + "\n" for prompt, text in zip(prompts, texts, strict=True)] == alone


def test_the_command_takes_any_model(run: Path, tmp_path: Path) -> None:
    how = ("--prompt", "def ", "--temperature", 1, "--tokens", 12)
    wanted = lowres_here("sample", run, *how).stdout
    newest = run / "checkpoints" / "step_00000004"
    assert lowres_here("sample", newest, *how).stdout == wanted
    older = run / "checkpoints" / "step_00000002"
    assert lowres_here("sample", older, *how).stdout != wanted
    hf, text = tmp_path / "hf", tmp_path / "text.txt"
    lowres_here("export", run, hf, "--dtype", "fp32")
    assert lowres_here("sample", hf, *how).stdout == wanted
    text.write_text("def words(self):\n    return self\n" * 20)
    own, theirs = (
        json.loads(lowres_here("eval", model, "--data", text, "--json").stdout) for model in (newest, hf)
    )
    assert theirs == pytest.approx(own)
    assert "was not trained here" in lowres_here("eval", hf, code=2).stderr
    for path, more, reason in (
        (
            run / "config.toml",
            ["--prompt", "x"],
            "is a file; give a run, a checkpoint, or a Hugging Face folder",
        ),
        (tmp_path, ["--prompt", "x"], "is not a run"),
        (run, [], "--prompt: give the text"),
        (run, ["--interactive", "--prompt", "x"], "--interactive: "),
        (run, ["--prompt", "x", "--stop", ""], "--stop: "),
        (run, ["--prompts", run / "no"], "cannot be read"),
        (run, ["--json", "--interactive"], "--json: "),
    ):
        assert reason in lowres_here("sample", path, *more, code=2).stderr


def test_streamed_weights_and_too_little_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run keeps all weights on the host."""
    done = lowres_here("sample", run, "--prompt", "a", "--prompt", "b", *GREEDY)
    found = re.search(r"note: (\S+) GiB of weights .* at most (\S+) tokens/s, (\S+) for 2 texts", done.stderr)
    assert found and float(found[3]) == pytest.approx(2 * float(found[2]), rel=0.01)
    units = open_run(run).engine._units.values()
    assert float(found[1]) == pytest.approx(sum(u.weights_slab.nbytes for u in units) / GIB, rel=0.01)
    assert session.rate(engine_of(homes=Homes()), 1) == ""
    monkeypatch.setattr(choice, "_budgets", lambda *_: {GPU: 20_000, HOST: None})
    error = lowres_here("sample", run, "--prompt", "a", code=3).stderr
    assert re.search(r"lowres: memory.budget_gib: .* needs 0.00 GiB of gpu memory", error)


class Typing(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_ctrl_c_ends_an_answer_and_then_the_session(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = open_tokenizer(run)
    ids = tokenizer.encode("one two three four")
    lines: Iterator[Any] = iter(["def ", "import ", KeyboardInterrupt()])

    def typed(shown: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    class Model:
        config = make_config(data={"seq_len": 32})

        def open(self, *_: object, **__: object) -> OpenRun:
            engine = Scripted(tokenizer.vocab_size, [*ids, *ids, tokenizer.end_id], interrupt=4)
            return OpenRun(self.config, cast(Any, engine), tokenizer)

    Model.tokenizer = tokenizer  # type: ignore[attr-defined]
    monkeypatch.setattr("lowres.session.find_model", lambda path: Model())
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin", Typing())
    done = lowres_here("sample", run, "--interactive", "--temperature", 0)
    first, second = tokenizer.decode(ids[:4]), tokenizer.decode([*ids[4:], *ids])
    assert done.stdout == f"def {first}\nimport {second}\n\n" and done.stderr == ""
    # where nothing is typed, it ends the command
    ended = lowres_here("sample", run, "--prompt", "def ", "--temperature", 0, code=130)
    assert ended.stdout == f"def {first}\n"


def test_what_was_said_before_ctrl_c_is_the_answer(run: Path) -> None:
    class Plain:
        ends = frozenset[int]()

    tokenizer, asked = open_tokenizer(run), list[Any]()
    ids = [*tokenizer.encode("one two three"), tokenizer.end_id]
    engine = Scripted(tokenizer.vocab_size, ids, interrupt=3)

    def prompt(_: object, __: object, messages: Sequence[Any]) -> list[int]:
        asked.append([*messages])
        return [1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowres.conversation.prompt", prompt)
        talk = Conversation(cast(Any, engine), tokenizer, cast(Any, Plain()), Sampling(9, 99, 0))
        with pytest.raises(KeyboardInterrupt), closing(talk.answering("hello")) as pieces:
            said = [*pieces]
        said = []
        with closing(talk.answering("again")) as pieces:
            said.append(next(pieces))
        talk.answer("once more")
    begun = tokenizer.decode(ids[:3])
    assert [message["content"] for message in asked[-1]] == ["hello", begun, "again", *said, "once more"]


# ---- memory


def test_a_plan_for_use_is_what_sampling_takes() -> None:
    """A 7B model, whose sizes are known; and a small one, measured."""
    config = load_config("configs/llama_7b_8gb.toml", ["memory.budget_gib=7"])[0].with_vocab(32000)
    cuda, per_token = torch.device("cuda"), 2 * 32 * 4096 * 2
    plan = plan_use(config, cuda, evaluates=False, on_this_machine=False)
    assert not plan.problems and plan.peak(GPU) > 6.8 * GIB
    tables = 2 * 4 * 2048 * 128
    assert plan.size("keys and values") == 2048 * per_token + tables
    # what is on the host is what does not fit, to a layer
    matrices, layer = plan.size("block matrices: int8 codes"), (4 * 4096 + 3 * 11008) * 4096
    on_host = plan.size("block matrices: int8 codes", HOST)
    assert matrices == 32 * layer and on_host == len(plan.choice.homes.weights) * layer
    assert plan.peak(GPU) + layer > 7 * GIB
    many = plan_use(config, cuda, texts=16, length=64, evaluates=False, on_this_machine=False)
    assert many.choice.texts == 16 and not many.problems
    assert many.size("block matrices: int8 codes", HOST) < on_host

    config = make_config(
        model={"dim": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 344, "vocab_size": 1000},
        data={"seq_len": 600},
        train={"batch_tokens": 1200},
        memory={"weights_on": "host", "compute": "bf16"},
    )
    assert make_plan(config, CPU).as_dict()["kv_bytes_per_token"] == 2 * 4 * 64 * 2
    for evaluates in (False, True):
        plan = plan_use(config, CPU, texts=3, evaluates=evaluates, on_this_machine=False)
        assert plan.choice.texts == 3 and len(plan.choice.homes.weights) == 6
        rooms = Rooms(CPU)
        with LiveTensors(rooms) as live:
            units = empty_units(config.model, "int8", "bf16", rooms, plan.choice.homes.weights)
            initialize(units.values(), 0, CPU)
            live.reset()
            engine = make_engine(config, units, None, rooms, plan.choice)
            if evaluates:
                engine.evaluate(torch.ones(2, 601, dtype=torch.int64))
            reader = engine.reader(3, 600)
            for ids in ([1] * 600, [1] * 300 + [2] * 300, [1] * 300 + [2] * 299 + [3]):
                reader.logits(dict.fromkeys(range(3), ids))
        for room in (GPU, HOST):
            assert abs(live.peak[room] - plan.peak(room)) < 0.05 * plan.peak(room), evaluates
