"""README.md and docs/ say what is so: see tests/documented.py."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path

import pytest

from tests.commands import HERE, PageError
from tests.conftest import MODULES
from tests.documented import TABLES, Page, Table, blocks, commands, pages, table_of
from tests.mentioned import absent, unlinked
from tests.workshop import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Workshop:
    folder = tmp_path_factory.mktemp("documented")
    (folder / "text").mkdir()
    for module in MODULES[:4]:
        shutil.copy(corpus / f"{module}.py", folder / "text")
    return Workshop(folder, folder / "text")


@pytest.mark.parametrize("page", pages())
@pytest.mark.usefixtures("points_here")
def test_a_page_says_what_is_so(page: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    # takes seconds to measure, and is tested elsewhere
    monkeypatch.setattr(import_module("lowres.speed.bench"), "gemm_peak", lambda *_: 0.1)
    table = table_of(page)
    monkeypatch.chdir(workshop.new_page(table.has))
    Page(page, (HERE / page).read_text("utf-8"), table, workshop).use()


@pytest.mark.parametrize("page", [*pages(), "SECURITY.md"])
def test_what_a_page_names_is_there(page: str) -> None:
    assert not list(absent(page, (HERE / page).read_text("utf-8")))


def test_every_page_is_linked() -> None:
    assert not unlinked()


@pytest.mark.parametrize(
    "text, said",
    [
        ("see `lowres train\nCONFIG --fast`", "unrecognized arguments: --fast"),
        ("x\n`python scripts/what_fits.py --x`", "page:2: `python"),
        ("`train.step = 3`", "`train.step` is no key"),
        ("(`tests/test_no.py`)", "there is no tests/test_no.py"),
        ("[this](docs/no.md)", "nothing is at docs/no.md"),
        ("[this](docs/data.md#no)", "nothing is at docs/data.md#no"),
    ],
)
def test_what_is_not_there_is_found(text: str, said: str) -> None:
    (found,) = absent("page", text)
    assert said in found


def test_every_table_is_of_a_page() -> None:
    assert {path.stem for path in TABLES.glob("*.toml")} <= {Path(page).stem for page in pages()}


def test_commands_are_read_as_a_shell_reads_them() -> None:
    text = """\
        make x  # a comment
        lowres a [--set b=c] 'd # e'; lowres f|g h && \\
            cp "1;2" 3
        """
    (block,) = blocks("page", f"text\n```sh\n{text}```\n")
    assert list(commands(block)) == [
        (3, "make x"),
        (4, "lowres a --set b=c 'd # e'"),
        (4, "lowres f h"),
        (4, "lowres g h"),
        (4, 'cp "1;2" 3'),
    ]


@pytest.mark.parametrize(
    "language, text, table, said",
    [
        ("sh", "rm -r x", {}, "rm is not run"),
        ("sh", "lowres config --no-such-option", {}, "--no-such-option"),
        ("sh", "lowres config", {"checked": {"lowres plan*": "slow"}}, r'\[checked\] "lowres plan\*"'),
        ("sh", "lowres config", {"has": {"RUN": "text"}}, r'\[has\] "RUN"'),
        ("sh", "lowres plan X --speed", {"checked": {"lowres *": "slow"}}, "--speed"),
        ("sh", "lowres plan configs/tiny.toml --set a.b=1", {"checked": {"lowres *": "slow"}}, "a: unknown"),
        ("sh", "make no-such-target", {"checked": {"make *": "slow"}}, "No rule"),
        ("sh", "pip install 'lowres[nothing]'", {"checked": {"pip *": "installs"}}, "no extra nothing"),
        ("sh", "python scripts/roofline.py --fast", {"checked": {"python *": "slow"}}, "--fast"),
        ("sh", "python scripts/no.py", {"checked": {"python *": "slow"}}, "there is no scripts/no.py"),
        ("toml", "[train]\nstep = 3", {}, "did you mean steps"),
        ("python", "print(1)\n1 / 0", {}, "line 4"),
        ("bash", "lowres config", {}, "a block of 'bash'"),
        ("sh", "echo 3 steps\n```\n```output\n7 stops", {}, "not printed: # stops"),
        ("sh", "lowres config\n```\n    lowres plan", {}, "indented"),
    ],
)
def test_what_is_not_so_is_found(
    language: str,
    text: str,
    table: dict[str, dict[str, str]],
    said: str,
    workshop: Workshop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Table(**table)  # type: ignore[arg-type]
    monkeypatch.chdir(workshop.folder)
    with pytest.raises(PageError, match=said):
        Page("page", f"text\n```{language}\n{text}\n```\n", made, workshop).use()
