"""How long a run takes: the words, the arithmetic of goals, and what the command line says."""

import json
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lowres.outlook
from lowres import pace
from lowres.catalogue import CARDS, find_card, recognise
from lowres.cli import main
from lowres.config import Config
from lowres.config_file import load_config
from lowres.errors import UserError
from lowres.memory import make_plan
from lowres.outlook import Stopwatch, outlook, preset_sizes
from lowres.probe import forecast
from lowres.probe.roofline import estimate, version_of, why_not
from lowres.start import _foretell
from tests.helpers import lowres_here, make_config

CUDA = torch.device("cuda")
NOW = datetime(2026, 11, 28, 18, 30)  # a Saturday
CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0.0421, "0.042 s"),
        (7.26, "7.3 s"),
        (89.4, "89 s"),
        (89.6, "1 min 30 s"),
        (120, "2 min"),
        (599.6, "10 min"),
        (3580, "1 h"),
        (3 * 3600 + 20 * 60 + 29, "3 h 20 min"),
        (36 * 3600, "36 h"),
        (2 * 86400, "2 days"),
        (5.53 * 86400, "5.5 days"),
        (364.4 * 86400, "364 days"),
        (365 * 86400, "1 year"),
        (500 * 86400, "1.4 years"),
        (float("inf"), "for ever"),
    ],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert pace.in_words(seconds) == words


@pytest.mark.parametrize(
    "seconds, words",
    [
        (600, "at 18:40"),
        (6 * 3600, "tomorrow at 00:30"),
        (3 * 86400, "on Tue 1 Dec at 18:30"),
        (33 * 86400, "on 31 December"),
        (34 * 86400, "on 1 January 2027"),
        (1e15, "never"),
    ],
)
def test_the_end_of_a_run(seconds: float, words: str) -> None:
    assert pace.ends(NOW, seconds) == words


def test_compute_optimal_goals() -> None:
    """Chinchilla: 70 billion parameters on 1.4 trillion tokens."""
    found = pace.optimal(6 * 70e9 * 1.4e12)
    assert (found.parameters, found.tokens) == (pytest.approx(70e9), pytest.approx(1.4e12))
    # all operations of an hour, at 1,000 tokens/s of a model of 1e9
    hour = pace.optimal_in(3600, 1e9, 1000)
    assert hour.operations == pytest.approx(6e9 * 1000 * 3600) and hour.tokens == 20 * hour.parameters
    assert pace.nearest(1.2e9, preset_sizes()) == "1b" and pace.nearest(1, preset_sizes()) == "9m"
    assert [pace.count(n) for n in (850, 52_431, 5.24e6, 999_960_000, 19.66e9)] == [
        *("850", "52,400", "5.24 M", "1 billion", "19.7 billion")
    ]


def config_of(**train: object) -> Config:
    return make_config(train={"steps": 1000, **train})


def test_the_outlook_of_a_run() -> None:
    (line,) = outlook(config_of(), 2.0, "measured here", NOW)
    assert line.startswith("measured here: 112 tokens/s, 2 s a step, 103 days per billion tokens")
    assert line.endswith("the run, 224,000 tokens, takes 33 min and ends at 19:03")
    (line,) = outlook(config_of(), 2.0, "", NOW, done=400, more_s=600)
    assert line.endswith("the rest of the run, 134,000 tokens, takes 30 min and ends at 19:00")
    (line,) = outlook(config_of(steps=None, epochs=1.5), 2.0, "", NOW)
    assert line.endswith("; the run has 1.5 times those of the data, which lowres data inspect counts")


def test_a_long_run_gets_a_goal() -> None:
    config = load_config(CONFIGS / "llama_7b_12gb.toml", ["train.steps=150000"])[0].with_vocab(32000)
    _, advice = outlook(config, 73.0, "", NOW, machine="an RTX 4070")
    # 3 days of 6 * 6.738e9 * 131072 / 73 operations a second: sqrt(C / 120) parameters
    operations = 6 * 6.738e9 * 131072 / 73 * 3 * 86400
    assert (operations / 120) ** 0.5 == pytest.approx(3.96e8, rel=0.01)
    assert "note: 127 days is a long run; in 3 days an RTX 4070 trains 400 M parameters on 7.9 bill" in advice
    assert "--set model.preset=350m --set train.tokens=8_500_000_000" in advice
    assert operations / 6 / preset_sizes()["350m"] == pytest.approx(8.5e9, rel=0.01)
    # a model that exists has its size
    tuned = config.model_copy(update={"run": config.run.model_copy(update={"init_from": "x"})})
    assert "model.preset" not in outlook(tuned, 73.0, "", NOW)[1]


def test_the_first_steps_are_measured_once() -> None:
    watch = Stopwatch(config_of(eval_every=100))
    watch.evaluation = 30.0
    assert watch.after(1, 99.0, NOW) == []  # it warms up
    assert watch.after(2, 4.0, NOW) == [] and watch.after(3, 4.0, NOW) == []  # too short to tell
    (line,) = watch.after(4, 5.0, NOW)
    # 996 steps of 4 s, and 10 evaluations of 30 s
    assert "4 s a step" in line and "takes 1 h 11 min and ends at 19:41" in line
    assert watch.after(5, 50.0, NOW) == []
    slow = Stopwatch(config_of())
    assert slow.after(1, 60.0, NOW) == slow.after(2, 60.0, NOW) == []
    assert "60 s a step" in slow.after(3, 60.0, NOW)[0]


@pytest.mark.parametrize("name", ["4090", "rtx4090", "GeForce RTX 4090", "NVIDIA GeForce RTX 4090"])
def test_names_of_cards(name: str) -> None:
    assert find_card(name) == "RTX 4090"


def test_cards_that_a_driver_names() -> None:
    gib = 1 << 30
    assert recognise("NVIDIA GeForce RTX 3060", 12 * gib) == "RTX 3060"
    assert recognise("NVIDIA GeForce RTX 3060", 8 * gib) is None  # another card of this name
    assert recognise("NVIDIA GeForce RTX 4060 Ti", 16 * gib) == "RTX 4060 Ti 16 GB"
    assert recognise("NVIDIA GeForce RTX 4060 Ti", 8 * gib) is None
    assert recognise("NVIDIA GeForce RTX 4090 Laptop GPU", 16 * gib) is None
    assert recognise("NVIDIA H100 80GB HBM3", 80 * gib) == "H100"
    with pytest.raises(UserError, match=r"--card: '4060 Ti' is not known; use one of RTX 3060, .*16 GB"):
        find_card("4060 Ti")


def test_a_forecast_follows_the_config() -> None:
    wide = {"dim": 1024, "n_layers": 2, "n_heads": 8, "ffn_dim": 2736, "vocab_size": 1000}
    config = make_config(model=wide, data={"seq_len": 256}, train={"batch_tokens": 65536})
    plan = make_plan(config, CUDA)

    def rate(clip: float = 0.0, **memory: object) -> float:
        other = make_config(
            model=wide,
            data={"seq_len": 256},
            train={"batch_tokens": 65536},
            memory=memory,
            optim={"grad_clip": clip},
        )
        return estimate(other, plan, CARDS["RTX 4090"]).tokens_per_s

    fastest = rate()
    assert fastest == rate(compute="int8")  # auto takes INT8 with INT8 weights
    bf16 = rate(compute="bf16")
    assert fastest > rate(compute="int8", compute_wgrad="dense") > bf16
    assert bf16 > rate(compute="bf16", kernels="plain") and bf16 > rate(1.0, compute="bf16")
    assert version_of(make_config(memory={"weights": "bf16"})).products == "bf16"
    for key, value in (("engine", "autograd"), ("compute", "fp32")):
        assert f"memory.{key}={value}" in why_not(make_config(memory={key: value}))


def test_plan_predicts_for_cards(capsys: pytest.CaptureFixture[str]) -> None:
    seven = str(CONFIGS / "llama_7b_12gb.toml")
    assert main(["plan", seven]) == 0
    printed = capsys.readouterr().out
    assert "RTX 3060" in printed and "RTX 4060  " not in printed  # it has 8 GB
    assert "predicted, not measured" in printed and "in 3 days an RTX 4070 trains" in printed
    # a budget is never above that of the card; the other way round it is kept
    assert main(["plan", seven, "--card", "rtx 4060", "--set", "memory.host_budget_gib=40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpu_peak_bytes"] <= 6.5 * (1 << 30)
    ((name, own),) = found["predicted"].items()
    assert name == "RTX 4060" and own["limit"] == "products"
    assert own["step_s"] == pytest.approx(131072 / own["tokens_per_s"])
    assert own["days_to_target"] == pytest.approx(4000 * own["step_s"] / 86400)
    assert own["days_per_billion_tokens"] == pytest.approx(1e9 / own["tokens_per_s"] / 86400)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_refusals_and_hints(config: Path) -> None:
    assert "--probe measures this CPU" in lowres_here("plan", config).stdout
    assert "use one of RTX 3060" in lowres_here("plan", config, "--card", "Voodoo", code=2).stderr
    other = ("--set", "memory.engine=autograd", "--card", "4090")
    assert "memory.engine=autograd" in lowres_here("plan", config, *other, code=2).stderr


def test_a_plan_knows_data_that_are_prepared(config: Path, prepared: Path) -> None:
    """Their vocabulary, and how long an epoch is."""
    shown = lowres_here(
        "plan", config, "--card", "4090", "--set", "train.epochs=3", "--set", "data.vocab_size=999"
    )
    manifest = json.loads((prepared / "data.json").read_text())
    tokens = 3 * sum((one["tokens"] - 1) // 64 * 64 for one in manifest["train"])
    assert f"the run, {pace.count(-(-tokens // 1024) * 1024)} tokens, takes " in shown.stdout
    assert "training tokens 3 times" in shown.stderr
    planned = json.loads(lowres_here("plan", config, "--json").stdout)
    assert planned["parameters"] == 500 * 32 * 2 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32


@pytest.mark.parametrize(
    "name, card",
    [("llama_1b_8gb", "RTX 4060"), ("llama_7b_8gb", "RTX 4060"), ("llama_7b_12gb", "RTX 4070")],
)
def test_presets_take_a_week_at_most(name: str, card: str) -> None:
    """As their files say, with BF16 products; half of it with INT8. With the plan of their own budget."""
    config = load_config(CONFIGS / f"{name}.toml", ["memory.compute=bf16"])[0].with_vocab(32000)
    plan = make_plan(config, CUDA)
    assert config.memory.budget_gib == CARDS[card].budget_gib
    own = estimate(config, plan, CARDS[card])
    assert 6 < config.train.total_steps * own.step_s / pace.DAY < 7.5
    assert f"{config.train.total_steps:,} steps are predicted" in (CONFIGS / f"{name}.toml").read_text()
    assert card in (CONFIGS / f"{name}.toml").read_text()


def test_a_run_says_how_long_it_takes(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowres.outlook, "ENOUGH_SECONDS", 0.0)
    few = ("--set", "train.steps=6", "--set", "train.eval_every=0", "--set", "log.sample_tokens=0")
    said = lowres_here("train", config, *few, "--run", tmp_path / "run").stderr
    (line,) = (line for line in said.splitlines() if "measured on this machine" in line)
    assert "per billion tokens; the rest of the run, 3,070 tokens, takes " in line and " and ends " in line


@pytest.mark.parametrize("known", [True, False])
def test_a_run_on_a_known_card_is_predicted_before_it_starts(
    known: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(train={"steps": 100})
    parts = SimpleNamespace(rooms=SimpleNamespace(device=CUDA), adapted=False, plan=make_plan(config, CUDA))
    monkeypatch.setattr(forecast, "card_here", lambda: "RTX 4090" if known else None)
    _foretell(SimpleNamespace(config=config, parts=parts))  # type: ignore[arg-type]
    assert ("predicted for an RTX 4090 (INT8; from its data sheet" in capsys.readouterr().err) == known
