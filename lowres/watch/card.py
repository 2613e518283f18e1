"""What the graphics cards of this machine say of themselves, through NVML (the package nvidia-ml-py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

MOST = 8


class Card(NamedTuple):
    """A graphics card. None for what it does not tell: degrees Celsius, watts, percent, bytes."""

    name: str
    temperature: float | None = None
    power: float | None = None
    power_limit: float | None = None
    busy: float | None = None
    used: float | None = None
    total: float | None = None


def cards() -> list[Card]:
    """The cards of this machine; none without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # the package, the driver or the card is missing
        return []
    try:
        return [_card(pynvml, index) for index in range(min(MOST, pynvml.nvmlDeviceGetCount()))]
    except Exception:  # the driver has gone
        return []
    finally:
        _asked(pynvml.nvmlShutdown)


def _card(nvml: Any, index: int) -> Card:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = _asked(nvml.nvmlDeviceGetName, handle) or f"card {index}"
    memory, busy = (
        _asked(nvml.nvmlDeviceGetMemoryInfo, handle),
        _asked(nvml.nvmlDeviceGetUtilizationRates, handle),
    )
    power, limit = (
        _asked(ask, handle) for ask in (nvml.nvmlDeviceGetPowerUsage, nvml.nvmlDeviceGetEnforcedPowerLimit)
    )
    return Card(
        name.decode() if isinstance(name, bytes) else str(name),
        _asked(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        None if power is None else power / 1000,
        None if limit is None else limit / 1000,
        None if busy is None else busy.gpu,
        None if memory is None else memory.used,
        None if memory is None else memory.total,
    )


def _asked(ask: Callable[..., Any], *of: Any) -> Any:
    """An answer, or None: not every card knows everything."""
    try:
        return ask(*of)
    except Exception:
        return None
