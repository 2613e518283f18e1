"""loss.png: the loss curve of a run, drawn from its metrics."""

from __future__ import annotations

from pathlib import Path

from lowres import metrics


def draw_loss(run: Path) -> Path | None:
    """Draw training and validation loss over tokens into the run's folder; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    records = metrics.read(run / "metrics.jsonl")
    steps = [r for r in records if r.get("loss") is not None]
    evaluations = [r for r in records if r.get("val_loss") is not None]
    tokens_at = {r["step"]: r["tokens"] for r in steps} | {0: 0}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["tokens"] for r in steps], [r["loss"] for r in steps], lw=0.8, alpha=0.6, label="training")
    axes.plot(
        [tokens_at[r["step"]] for r in evaluations],
        [r["val_loss"] for r in evaluations],
        marker="o",
        ms=3,
        label="validation",
    )
    axes.set(xlabel="tokens", ylabel="loss (nats a token)", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    target = run / "loss.png"
    figure.savefig(target, dpi=130)
    return target
