"""Watches the numbers of a run: spikes, refused steps, and runs that no longer learn.

A spike is a gradient norm above `spike_factor` times the largest of the window, or a loss above the median by
more than 6 robust standard deviations (1.4826 times the median absolute deviation), at least by half a nat.
Only accepted, finite values that are no spike enter the window, so a spike does not hide the next one. The
window is in every checkpoint, so a resumed run judges as the straight one.

A step is bad if it was skipped, if it has no gradient (less than a millionth of the median), or if after the
warm-up its loss is ruined, compared with ln V, that of guessing evenly among V pieces: not below it in a run
that has learnt something before; more than a nat above it, or just at it, in any run. After a bad step
nothing is saved as good. The loss of pairs has no such level.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from lowres.checkpoint import Windows
from lowres.config import HealthConfig
from lowres.engine import StepReport

FEWEST = 16  # values in a window from which on it can tell
NO_GRADIENT = 1e-6
LOSS_DEVIATIONS, LOSS_MARGIN = 6 * 1.4826, 0.5
GUESSING, LEARNT, RUINED = 1e-3, 0.1, 1.0  # nats from ln V


@dataclass(frozen=True)
class Limits:
    """What the engine refuses: a norm of the gradient, and a loss, above these. See `Engine.step`."""

    norm: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Verdict:
    """About a step. spike, bad: what is wrong, in words; empty if nothing is. dead: whether the run should
    end."""

    spike: str = ""
    bad: str = ""
    dead: bool = False


class Watch:
    """Judges the steps of a run, one after the other. seen: what it remembers, for checkpoints."""

    def __init__(
        self, config: HealthConfig, vocab: int | None, warmup: int, seen: Windows | None = None
    ) -> None:
        """vocab: pieces among which the model chooses; None for a loss that is not that of a choice. warmup:
        steps of it. seen: from a checkpoint."""
        self._guess = math.log(vocab) if vocab else math.inf
        self._config, self._warmup = config, warmup
        self.doubtful = False  # whether a checkpoint of now would not be a good one
        self.go_back(seen or Windows())

    @property
    def worth_saying(self) -> bool:
        """Whether the user should hear of the last step: it is the first bad one in a row."""
        return self.seen.bad == 1

    def ends_badly(self, steps: int) -> bool:
        """Whether a run of so many steps that ends now has no good end: a tenth of it."""
        return self.doubtful and self.seen.bad >= min(self._config.patience, max(2, steps // 10))

    def go_back(self, seen: Windows) -> None:
        """Continue from what a checkpoint has."""
        self.seen = seen
        self.doubtful = seen.bad > 0

    def limits(self) -> Limits:
        """What the next step may not exceed, if the policy is to refuse it."""
        if self._config.spikes != "skip":
            return Limits()
        return Limits(self._norm_limit(), self._loss_limit())

    def see(self, step: int, report: StepReport) -> Verdict:
        """Judge a step; step counts it."""
        spike = self._spike(report) if self._config.spikes != "off" else ""
        bad = self._badness(step, report)
        seen = self.seen
        more: dict[str, Any] = {"bad": seen.bad + 1 if bad else 0, "spikes": seen.spikes + 1 if spike else 0}
        if not (spike or bad):
            more |= self._accepted(report)
        elif more["spikes"] >= self._config.patience and self._config.spikes == "warn":
            spike += "; after so many, this is the new level"
            more |= {"losses": [], "norms": [], "spikes": 0}
        self.doubtful = bool(bad)
        self.seen = seen.model_copy(update=more)
        return Verdict(spike, bad, self.seen.bad >= self._config.patience)

    def _norm_limit(self) -> float | None:
        norms = self.seen.norms
        return self._config.spike_factor * max(norms) if len(norms) >= FEWEST else None

    def _loss_limit(self) -> float | None:
        losses = self.seen.losses
        if len(losses) < FEWEST:
            return None
        middle = statistics.median(losses)
        spread = statistics.median(abs(loss - middle) for loss in losses)
        return middle + max(LOSS_DEVIATIONS * spread, LOSS_MARGIN)

    def _spike(self, report: StepReport) -> str:
        if not (math.isfinite(report.loss) and math.isfinite(report.grad_norm)):
            return ""
        norm, loss = self._norm_limit(), self._loss_limit()
        if norm is not None and report.grad_norm > norm:
            times = report.grad_norm / max(self.seen.norms)
            return f"gradient norm {report.grad_norm:.3g}, {times:.3g} times the largest before"
        if loss is not None and report.loss > loss:
            return f"loss {report.loss:.3f}, median {statistics.median(self.seen.losses):.3f}"
        return ""

    def _vanished(self, report: StepReport) -> bool:
        norms = self.seen.norms
        return report.grad_norm <= NO_GRADIENT * (statistics.median(norms) if norms else 0.0)

    def _badness(self, step: int, report: StepReport) -> str:
        if report.skipped:
            finite = math.isfinite(report.loss) and math.isfinite(report.grad_norm)
            return "skipped: a spike" if finite else "skipped: a loss or gradient that is not finite"
        if self._vanished(report):
            return f"no gradient (norm {report.grad_norm:.3g})"
        above = report.loss - self._guess
        at = abs(above) < GUESSING
        if step > self._warmup and (at or above > (-GUESSING if self.seen.learnt else RUINED)):
            return f"loss {report.loss:.3f}, no better than guessing evenly (ln V = {self._guess:.3f})"
        return ""

    def _accepted(self, report: StepReport) -> dict[str, Any]:
        """The windows with the values of a step."""
        seen, size = self.seen, self._config.window
        return {
            "losses": [*seen.losses, report.loss][-size:],
            "norms": [*seen.norms, report.grad_norm][-size:],
            "learnt": seen.learnt or report.loss < self._guess - LEARNT,
        }
