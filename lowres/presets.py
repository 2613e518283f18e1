"""Tables of presets: which card each of them fits, how fast it is, and how long a good training takes."""

from __future__ import annotations

from collections.abc import Iterable

from lowres import pace
from lowres.catalogue import CARDS, Everything, Planned
from lowres.terminal import aligned

HEAD = ["model", "parameters", "GPU, GiB", "host, GiB", "tokens/s", "a billion tokens", "20 a parameter"]
# the config that every row was planned with, and shipped configs for a card of some GB
FROM = "configs/llama_1b_8gb.toml"
SHIPPED = {
    ("1b", 8): "configs/llama_1b_8gb.toml",
    ("7b", 8): "configs/llama_7b_8gb.toml",
    ("7b", 12): "configs/llama_7b_12gb.toml",
    ("7b", 24): "configs/llama_7b_24gb.toml",
    ("13b", 24): "configs/llama_13b_24gb.toml",
}


def cells(row: Planned) -> list[str]:
    """A row as text. Where INT8 and BF16 products differ, both: the faster first."""
    sizes = [row.preset, pace.count(row.parameters)]
    rates = [rate for rate in (row.int8, row.bf16) if rate]
    if not rates:
        return [*sizes, "does not fit", "", "", "", ""]
    optimal = pace.TOKENS_A_PARAMETER * row.parameters
    memory = ["" if gib is None else f"{gib:.1f}" for gib in (row.gpu_gib, row.host_gib)]
    return [
        *(*sizes, *memory),
        _to(f"{rate:,.0f}" for rate in rates),
        _to(pace.per_billion(rate) for rate in rates),
        _to(pace.in_words(optimal / rate) for rate in rates),
    ]


def _to(texts: Iterable[str]) -> str:
    """Two durations or rates as one: "0.44 to 0.64 days"."""
    first, *rest = dict.fromkeys(texts)
    if not rest:
        return first
    words = first.split(), rest[0].split()
    same = len(words[0]) == len(words[1]) == 2 and words[0][1].rstrip("s") == words[1][1].rstrip("s")
    return f"{words[0][0] if same else first} to {rest[0]}"


def lines(found: Everything, card: str | None = None) -> list[str]:
    """For the terminal: a table of each card, or of one."""
    said = []
    for name in [card] if card else list(dict.fromkeys(row.card for row in found.planned)):
        assert name is not None
        own = CARDS[name]
        rows = [row for row in found.planned if row.card == name]
        said += [
            f"{name}, {own.memory_gb} GB: planned for {own.budget_gib:g} GiB of it; predicted from its data "
            "sheet with INT8 to BF16 products, not measured",
            *aligned([HEAD, *map(cells, rows)]),
        ]
        shipped = [file for (_, gb), file in SHIPPED.items() if gb == own.memory_gb]
        said += [
            *([f"made for such a card: {', '.join(shipped)}"] if shipped else []),
            f"any of them: lowres train {FROM} --set model.preset=NAME --set "
            f"memory.budget_gib={own.budget_gib:g} --set memory.host_budget_gib={found.host_budget_gib:g}",
            "",
        ]
    if card is None:
        said += [
            f"measured on a CPU ({found.cpu}; {found.source})",
            *aligned([HEAD, *map(cells, found.measured)]),
        ]
    return said if said[-1] else said[:-1]
