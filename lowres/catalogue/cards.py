"""Graphics cards, from their data sheets: what a prediction of speed divides by."""

from __future__ import annotations

from dataclasses import dataclass

from lowres.errors import UserError


@dataclass(frozen=True)
class Card:
    """Dense 10^12 operations/s with fp32 (int32) sums, memory bandwidth in 10^9 bytes/s, usable PCIe rate a
    direction in 10^9 bytes/s; the GiB that a run may use of its memory; and that memory in GB."""

    bf16: float
    int8: float
    bandwidth: float
    pcie: float
    budget_gib: float
    memory_gb: int


# Peaks and bandwidth: NVIDIA's data sheets and architecture white papers, without sparsity. Those of the 4060
# and the 4060 Ti follow from cores and boost clock (nvidia.com, "Compare GeForce graphics cards": 3,072 at
# 2.46 GHz and 4,352 at 2.535 GHz) and, as for the 4070 and 4090, 4 operations in BF16 and 16 in INT8 for each
# core and clock. PCIe: 25 of 31.5 for version 4, half of it for the 8 lanes of the 4060 and 4060 Ti, 52 of 63
# for version 5. Budgets: the card less what a desktop and CUDA itself use.
CARDS = {
    "RTX 3060": Card(25.5, 102, 360, 25, 10.5, 12),
    "RTX 3090": Card(71, 284, 936, 25, 20.0, 24),
    "RTX 4060": Card(30.2, 121, 272, 12.5, 6.5, 8),
    "RTX 4060 Ti 16 GB": Card(44.1, 176.5, 288, 12.5, 14.0, 16),
    "RTX 4070": Card(58.3, 233, 504, 25, 10.5, 12),
    "RTX 4090": Card(165, 661, 1008, 25, 20.0, 24),
    "RTX 5090": Card(209.5, 838, 1792, 52, 28.0, 32),
    "H100": Card(989, 1979, 3350, 52, 70.0, 80),
    "H200": Card(989, 1979, 4800, 52, 120.0, 141),
}
# cards that one buys for a desk
CONSUMER = tuple(name for name in CARDS if name.startswith("RTX"))
# what a driver calls some of them
DRIVER_NAMES = {"h10080gbhbm3": "H100"}


def find_card(name: str) -> str:
    """The name in `CARDS` that a user means: "4090", "rtx4090", "GeForce RTX 4090". Raises UserError."""
    found = _known().get(_plain(name))
    if found is None:
        raise UserError(f"--card: {name!r} is not known; use one of {', '.join(CARDS)}")
    return found


def recognise(device_name: str, memory_bytes: int) -> str | None:
    """The name in `CARDS` of the card that a driver names, if it is one of them. Its memory tells versions
    with the same name apart."""
    gb = round(memory_bytes / (1 << 30))
    for plain in (_plain(device_name), _plain(f"{device_name} {gb} GB")):
        name = DRIVER_NAMES.get(plain) or _known().get(plain)
        if name and abs(memory_bytes / 1e9 / CARDS[name].memory_gb - 1) < 0.15:
            return name
    return None


def _known() -> dict[str, str]:
    return {_plain(name): name for name in CARDS}


def _plain(name: str) -> str:
    text = name.lower()
    for word in ("nvidia", "geforce", "rtx"):
        text = text.replace(word, "")
    return "".join(c for c in text if c.isalnum())
