"""docs/comparison.md: every cell of its table has a source, and every source can be looked at."""

import re
from pathlib import Path

PAGE = Path("docs/comparison.md")
TEXT = PAGE.read_text(encoding="utf-8")
TRAINERS = ["lowres", "LLMQ", "LitGPT", "torchtitan", "LLaMA-Factory", "Unsloth"]


def part(title: str) -> str:
    return re.split(r"^## ", TEXT.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def rows(title: str) -> list[list[str]]:
    lines = [line for line in part(title).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][1:] == TRAINERS and all(len(row) == len(cells[0]) and all(row[1:]) for row in cells[2:])
    return cells[2:]


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_cell_has_a_source() -> None:
    sections = dict(
        re.findall(r"^### (.+)\n\n((?:.*\n)+?)(?=###|\Z)", part("Sources") + "\n", flags=re.MULTILINE)
    )
    table = [re.fullmatch(r"\[(.+)\]\(#(.+)\)", row[0]) for row in rows("The table")]
    assert [match and match[1] for match in table] == list(sections)
    assert [match and match[2] for match in table] == [slug(title) for title in sections]
    for title, body in sections.items():
        entries = re.split(r"^- ", body, flags=re.MULTILINE)[1:]
        assert [entry.split("**")[1] for entry in entries] == TRAINERS, title
        assert all("](" in entry for entry in entries), title
    short = rows("In short")
    assert len(short) <= 9 and {row[0].split("#")[1].rstrip(")") for row in short} <= set(map(slug, sections))


def test_the_readme_has_the_short_table() -> None:
    table = part("In short").strip().replace("](#", "](docs/comparison.md#")
    assert table in Path("README.md").read_text(encoding="utf-8")


def test_links_are_pinned_and_files_exist() -> None:
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    there = [link for link in links if link.startswith("http")]
    pinned = r"https://github\.com/[\w.-]+/[\w.-]+/(blob|tree)/[0-9a-f]{40}(/[\w./+-]+(\?plain=1)?(#L\d+)?)?"
    assert len(there) > 100 and [link for link in there if not re.fullmatch(pinned, link)] == []
    for link in set(links) - set(there):
        path, _, anchor = link.partition("#")
        page = PAGE.parent / path if path else PAGE
        assert page.exists(), link
        headings = re.findall(r"^#+ (.+)", page.read_text("utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in map(slug, headings), link


def test_predictions_are_those_of_the_other_page() -> None:
    other = Path("docs/expectations.md").read_text(encoding="utf-8")
    predicted = re.findall(
        r"^\| (RTX .+?)(?: \d+ GB)? \| lowres, \*predicted\* \| (.+?) \|", TEXT, re.MULTILINE
    )
    assert len(predicted) == 5
    for card, rates in predicted:
        tables = re.split(r"^\*\*", other, flags=re.MULTILINE)
        (table,) = [text for text in tables if text.startswith((f"{card}**", f"{card} 16 GB**"))]
        assert re.search(rf"^\| 7b \|.*\| {rates} \|", table, re.MULTILINE), card
