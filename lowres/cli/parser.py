"""What the command line understands. Imports nothing but the standard library, so that help is there at once.

A command is named by the function that runs it, "module:function" of this package.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowres import __version__

Commands = argparse._SubParsersAction  # the type has no public name
# of `lowres export`; a test compares them with `lowres.exchange`
FORMATS, DTYPES = ("hf", "gguf"), ("bf16", "fp16", "fp32", "q8_0")
COMPLETION, SHELLS = "completion", ("bash", "zsh", "fish")


class Parser(argparse.ArgumentParser):
    """tell_more: what is shown below the help, made when it is asked for."""

    tell_more: Callable[[], str] | None = None

    def format_help(self) -> str:
        if self.tell_more is not None:
            self.epilog = self.tell_more()
        return super().format_help()


def make_parser() -> Parser:
    """Every command with its arguments."""
    parser = Parser(prog="lowres", description="Pretrain LLaMA-style models on one consumer GPU.")
    parser.add_argument("--version", action="version", version=f"lowres {__version__}")
    commands = _add_commands(parser)
    _add_training(commands)
    _add_plan(commands)
    _add_data(commands)
    _add_exchange(commands)
    _add_use(commands)
    sub = _command(
        commands, "doctor", "machine:run_doctor", "Check this machine, and say what to mend before a run."
    )
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub = _command(
        commands, "presets", "machine:run_presets", "List what fits which graphics card, and how fast it is."
    )
    sub.add_argument("--card", metavar="NAME", help='of one card, such as "RTX 4090"')
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub = _command(
        commands,
        "config",
        "configs:run_config",
        "Print a config with the documentation of every key, or the defaults without CONFIG.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.tell_more = _all_keys
    _add_config(sub, optional=True)
    sub = _command(
        commands,
        COMPLETION,
        "completion:run_completion",
        "Print what makes a shell complete commands, options and keys.",
        epilog='bash: eval "$(lowres completion bash)" in ~/.bashrc; zsh: the same with zsh in ~/.zshrc, '
        "after compinit; fish: lowres completion fish > ~/.config/fish/completions/lowres.fish",
    )
    sub.add_argument("shell", nargs="?", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    sub.add_argument("--line", help=argparse.SUPPRESS)  # print what may stand at the end of this command line
    return parser


def _all_keys() -> str:
    from lowres.reference import describe

    return describe()


def _add_commands(parser: argparse.ArgumentParser) -> Commands:
    """Commands of a parser, which without one prints its help."""
    parser.set_defaults(command=None, help=parser.print_help)
    return parser.add_subparsers(metavar="COMMAND")


def _command(commands: Commands, name: str, function: str, text: str, **more: Any) -> Parser:
    sub: Parser = commands.add_parser(name, help=text, description=text, **more)
    sub.set_defaults(command=function)
    return sub


def _add_training(commands: Commands) -> None:
    sub = _command(commands, "train", "training:run_train", "Train a model, or continue a run.")
    _add_train(sub)
    sub.add_argument(
        "--profile",
        type=_positive,
        default=0,
        metavar="N",
        help="show where the time of N steps goes, and write a trace into the run's folder",
    )

    sub = _command(
        commands, "launch", "training:run_launch", "Train on several GPUs with memory.engine = deepspeed."
    )
    _add_train(sub)
    sub.add_argument("--gpus", type=_positive, metavar="N", help="processes, one per GPU (default: all GPUs)")
    sub.add_argument(
        "--hostfile",
        type=Path,
        metavar="F",
        help="machines, in DeepSpeed's format: one line `host slots=N` each",
    )

    sub = _command(
        commands,
        "sweep",
        "training:run_sweep",
        "Train a grid of runs on the same number of tokens, and compare them.",
    )
    _add_config(sub)
    sub.add_argument(
        "--grid",
        action="append",
        required=True,
        metavar="section.key=value,value",
        help="an axis of the grid; give several for all combinations",
    )
    length = sub.add_mutually_exclusive_group(required=True)
    length.add_argument(
        "--tokens",
        type=_positive,
        metavar="N",
        help="train each run on N tokens; a chat or pair counts as data.seq_len of them",
    )
    length.add_argument(
        "--epochs", type=_positive_float, metavar="X", help="... or on X times the data, which are no stream"
    )
    _add_tasks(sub, "also score each run on tasks of lm-evaluation-harness (needs lm_eval)")
    _add_init_from(sub)
    sub.add_argument(
        "--run", type=Path, metavar="DIR", help="folder of the runs (default: runs/sweep-<run.name>)"
    )


def _add_plan(commands: Commands) -> None:
    sub = _command(
        commands,
        "plan",
        "planning:run_plan",
        "Print the memory that a run needs, and how long it takes, before anything is allocated.",
    )
    _add_config(sub)
    _add_init_from(sub)
    sub.add_argument(
        "--gpus", type=_positive, metavar="N", help="plan for one of N ranks on a machine (deepspeed)"
    )
    sub.add_argument(
        "--machines", type=_positive, default=1, metavar="M", help="with --gpus ranks on each of M machines"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument(
        "--probe", action="store_true", help="measure this machine for a few seconds and predict the speed"
    )
    sub.add_argument(
        "--card",
        metavar="NAME",
        help='plan for a graphics card, such as "RTX 4090", and predict the speed from its data sheet',
    )
    sub.add_argument("--optimizer", action="store_true", help="show the optimizer and state of every tensor")
    sub.add_argument(
        "--explain",
        action="store_true",
        help="say what limits memory and speed, and plan the changes that would help most",
    )
    budget = sub.add_mutually_exclusive_group()
    budget.add_argument(
        "--hours", type=_positive_float, metavar="H", help="with --explain: what size H hours train best"
    )
    budget.add_argument(
        "--tokens", type=_positive, metavar="N", help="with --explain: what size N tokens train best"
    )

    sub = _command(
        commands,
        "bench",
        "planning:run_bench",
        "Measure how fast a config trains, on random tokens; nothing is read or written.",
    )
    _add_config(sub)
    _add_init_from(sub)
    sub.add_argument("--steps", type=_positive, default=5, metavar="N", help="timed steps; default 5")
    sub.add_argument("--json", action="store_true", help="print JSON")


def _add_data(commands: Commands) -> None:
    data = _add_commands(commands.add_parser("data", help="Work with training data."))
    sub = _command(
        data, "inspect", "data:run_inspect", "Show what a source holds, and what would be left out."
    )
    sub.add_argument("source", help="stdlib, a path, or hf:<dataset>[:<config>[:<split>]]")
    _add_data_set(sub)
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = _command(
        data,
        "overlap",
        "data:run_overlap",
        "Say how many evaluation documents share words in a row with a training text.",
    )
    sub.add_argument("train", metavar="TRAIN", help="text, chats or pairs to train on")
    sub.add_argument("evaluation", metavar="EVAL", help="text, chats or pairs to evaluate on")
    sub.add_argument("--ngram", type=_positive, default=13, metavar="N", help="words in a row; default 13")
    _add_data_set(sub, "how to read TRAIN")
    sub.add_argument(
        "--eval-set", action="append", default=[], metavar="section.key=value", help="how to read EVAL"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = _command(data, "prepare", "data:run_prepare", "Tokenise a source into a folder of shards.")
    sub.add_argument("source", help="stdlib, a path, or hf:<dataset>[:<config>[:<split>]]")
    sub.add_argument("out", type=Path, help="folder to build")
    sub.add_argument(
        "--tokenizer", metavar="PATH", help="SentencePiece model or tokenizer.json (default: train one)"
    )
    sub.add_argument(
        "--vocab-size", type=_positive, metavar="N", help="pieces of a tokenizer that is trained"
    )
    sub.add_argument("--max-tokens", type=_positive, metavar="N", help="stop after N training tokens")
    _add_data_set(sub)


def _add_data_set(sub: argparse.ArgumentParser, text: str = "how to read the source") -> None:
    sub.add_argument("--set", action="append", default=[], metavar="data.key=value", help=text)


def _add_exchange(commands: Commands) -> None:
    """Commands that take models from other programs, or give them some."""
    sub = _command(
        commands,
        "import",
        "models:run_import",
        "Make a run at step 0 of a model that exists, such as a Hugging Face folder; see docs/models.md.",
    )
    sub.add_argument(
        "model", type=Path, metavar="HF_DIR", help="folder with config.json and safetensors files"
    )
    sub.add_argument("run", type=Path, metavar="RUN", help="folder of the run, which must not exist")
    _add_set(sub)


def _add_use(commands: Commands) -> None:
    """Commands that use a run without training it."""
    sub = _command(
        commands, "sample", "use:run_sample", "Print text from a trained model, while it is written."
    )
    sub.add_argument(
        "model", type=Path, metavar="MODEL", help="a run, a checkpoint, or a Hugging Face folder"
    )
    sub.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="what is continued; several, given one by one, go on together; with --chat, what is asked",
    )
    sub.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt on each line; - is the input")
    sub.add_argument("--interactive", action="store_true", help="continue every line that is typed")
    sub.add_argument(
        "--chat",
        action="store_true",
        help="answer the prompt, or without one every line of the input, with the chat template",
    )
    sub.add_argument("--system", metavar="TEXT", help="with --chat: what the model is told first")
    sub.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a text where this follows, and leave it out; give several for the first of them",
    )
    sub.add_argument("--tokens", type=_positive, default=200, metavar="N")
    sub.add_argument(
        "--temperature",
        type=_not_negative_float,
        default=0.8,
        metavar="T",
        help="0 takes the likeliest token",
    )
    sub.add_argument(
        "--top-k", type=_not_negative, default=50, metavar="K", help="0 chooses among all tokens"
    )
    sub.add_argument("--seed", type=_not_negative, default=0, metavar="S")
    sub.add_argument("--json", action="store_true", help="print a JSON object for each prompt")

    sub = _command(
        commands, "eval", "use:run_eval", "Loss, perplexity, bits per byte; of pairs also accuracy."
    )
    sub.add_argument(
        "model", type=Path, metavar="MODEL", help="a run, a checkpoint, or a Hugging Face folder"
    )
    sub.add_argument(
        "--data", metavar="SOURCE", help="what to evaluate on (default: the validation data of the run)"
    )
    _add_data_set(sub)
    _add_tasks(sub, "tasks of lm-evaluation-harness instead, such as hellaswag,arc_easy (needs lm_eval)")
    sub.add_argument(
        "--num-fewshot", type=_not_negative, metavar="K", help="show K examples before each question"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = _command(
        commands,
        "export",
        "models:run_export",
        "Write a model for other programs: a Hugging Face folder or a GGUF file.",
    )
    sub.add_argument("run", type=Path, metavar="RUN", help="a run, a checkpoint, or a Hugging Face folder")
    sub.add_argument("out", type=Path, metavar="OUT", help="folder or file to write, which must not exist")
    sub.add_argument("--format", choices=FORMATS, help="default: gguf if OUT ends in .gguf, otherwise hf")
    sub.add_argument(
        "--dtype",
        choices=DTYPES,
        help="number format of the weights (q8_0: gguf only); default: as they are stored, bf16 for int8",
    )
    sub.add_argument(
        "--checkpoint", type=_not_negative, metavar="STEP", help="of this step (default: the newest)"
    )
    sub.add_argument("--shard-size", metavar="SIZE", help="most bytes in a file of weights; default 5GB")

    sub = _command(
        commands, "report", "looking:run_report", "Write an HTML page about runs; see docs/watching.md."
    )
    sub.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run or of a sweep")
    sub.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help="default: report.html in the folder of the only run, otherwise in this one",
    )

    sub = _command(commands, "watch", "looking:run_watch", "Show a run while it trains, in this terminal.")
    sub.add_argument("run", type=Path, metavar="RUN", help="folder of the run, which another process has")
    sub.add_argument(
        "--every", type=_positive_float, default=2.0, metavar="S", help="seconds between looks; default 2"
    )
    sub.add_argument("--once", action="store_true", help="look once, and end")

    checkpoints = _add_commands(commands.add_parser("checkpoint", help="Look at checkpoints."))
    for name, function, text in (
        ("list", "checkpoints:run_list", "List the checkpoints of a run."),
        ("verify", "checkpoints:run_verify", "Check every file against its checksum."),
    ):
        sub = _command(checkpoints, name, function, text)
        sub.add_argument("folder", type=Path, metavar="DIR", help="a run or one checkpoint")


def _add_config(sub: argparse.ArgumentParser, optional: bool = False) -> None:
    sub.add_argument("config", type=Path, metavar="CONFIG", **({"nargs": "?"} if optional else {}))  # type: ignore[arg-type]
    _add_set(sub)


def _add_set(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="section.key=value",
        help="override a key of the config; `lowres config --help` lists them",
    )


def _add_train(sub: argparse.ArgumentParser) -> None:
    _add_config(sub)
    sub.add_argument("--run", type=Path, metavar="DIR", help="folder of the run (default: runs/<run.name>)")
    sub.add_argument("--resume", action="store_true", help="continue from the newest valid checkpoint")
    sub.add_argument(
        "--restart",
        action="store_true",
        help="begin again at step 0; what the run's folder holds is moved into a folder old-1 in it",
    )
    _add_init_from(sub)


def _add_tasks(sub: argparse.ArgumentParser, about: str) -> None:
    sub.add_argument("--tasks", type=_names, metavar="NAME,NAME", help=about)
    sub.add_argument("--include-path", type=Path, metavar="DIR", help="a folder with more tasks, in YAML")
    sub.add_argument("--limit", type=_positive, metavar="N", help="N questions of each task, at most")


def _add_init_from(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--init-from",
        metavar="MODEL",
        help="take the first weights, the model and the tokenizer from a run, a checkpoint or a Hugging Face "
        "folder (also run.init_from)",
    )


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} has no names")
    return names


def _positive(text: str) -> int:
    """Also 5_000_000, as the configs and our own messages write it."""
    digits = text.replace("_", "")
    if not digits.isdigit() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(digits)


def _not_negative(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _not_negative_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return value
