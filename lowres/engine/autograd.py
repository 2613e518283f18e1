"""The ordinary step: the whole model and PyTorch's autograd, one micro-batch after another.

It is the reference for the layer-major engine, and useful if memory does not matter. It holds the
whole model in compute precision and a gradient for every parameter, so it needs many times more memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lowres.config import ModelConfig
from lowres.engine.cache import Reader, Rereading
from lowres.engine.common import (
    Documents,
    EngineSettings,
    Limits,
    Marking,
    StepReport,
    Updater,
    apart,
    documents_of,
    split,
    square,
    weighed_batch,
)
from lowres.model import Dropout, Llama, Units
from lowres.objective import Pairs
from lowres.rooms import Rooms
from lowres.storage import Unit


class AutogradEngine(Marking):
    """Engine interface: see `lowres.engine.Engine`."""

    def __init__(
        self,
        config: ModelConfig,
        units: Units,
        optimizer: Updater | None,
        rooms: Rooms,
        settings: EngineSettings,
    ) -> None:
        self._units, self.optimizer, self.settings = units, optimizer, settings
        self.rooms, self.device, compute = rooms, rooms.device, settings.compute
        self.dropout = Dropout(settings.dropout, settings.seed)
        with torch.device(self.device):
            self.model = Llama(config, settings.adapters, self.dropout)
        for name, parameter in self.model.named_parameters():
            # norms stay fp32, as in every engine
            if parameter.dim() == 2 or compute == torch.float64:
                parameter.data = parameter.data.to(compute)
            if optimizer is None:
                parameter.requires_grad_(False)
            assert any(name in unit.weights for unit in units.values()), f"{name} has no storage"

    @property
    def micro_batch(self) -> int:
        return self.settings.micro_batch

    @torch.no_grad()
    def _load(self) -> None:
        """Copy the stored weights into the module."""
        for unit in self._units.values():
            for name, storage in unit.weights.items():
                parameter = self.model.get_parameter(name)
                parameter.copy_(storage.dense(parameter.dtype))

    def reserve(self, sequences: int, length: int, training: bool) -> None:
        """Does nothing: autograd allocates during the step."""

    def step(
        self,
        batch: Tensor,
        step: int,
        schedule: float,
        rehearsal: bool = False,
        norm_limit: float | None = None,
        loss_limit: float | None = None,
        pairs: Pairs | None = None,
    ) -> StepReport:
        assert self.optimizer is not None, "this engine was made without an optimizer"
        self._load()
        inputs, targets, count, documents = self._micro_batches(batch)
        self.dropout.step = step  # the probabilities are of the masks that are differentiated
        weighed = weighed_batch(self, batch, pairs, self.settings.objective, self.settings.compute)
        grads = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.dropout.first = 0
        self.rooms.phase = "forward and backward"
        first, divisor = 0, count if weighed is None else 1
        for tokens, wanted, lengths in zip(inputs, targets, documents, strict=True):
            part, first = slice(first, first + len(tokens)), first + len(tokens)
            weights = None if weighed is None else self._here(weighed.weights[part])
            loss = self.model(
                *(self._here(tokens), self._here(wanted), self.settings.loss_chunk, lengths), weights=weights
            )
            (loss / divisor).backward()
            total += loss.detach()
            for name, grad in grads.items():
                parameter = self.model.get_parameter(name)
                assert parameter.grad is not None
                grad.add_(parameter.grad)
                parameter.grad = None
            self.dropout.first += len(tokens)
        self.dropout.step = None
        self.rooms.phase = "update"
        with torch.no_grad():
            allowed = Limits.of(norm_limit, loss_limit)
            mean = total / divisor if weighed is None or weighed.loss is None else weighed.loss
            report = self._update(grads, mean, step, schedule, rehearsal, allowed)
        self.rooms.phase = ""
        return report if weighed is None else replace(report, readings=weighed.readings)

    def _micro_batches(self, batch: Tensor) -> tuple[list[Tensor], list[Tensor], int, list[Documents]]:
        parts = split(batch, self.settings.micro_batch, self.rooms)
        return apart(batch, parts, self.rooms, self.settings.starts)

    def _here(self, tokens: Tensor) -> Tensor:
        """A micro-batch on the device. It is page-locked, so the host does not wait for the copy."""
        return tokens.to(self.device, non_blocking=True)

    def _update(
        self,
        grads: dict[str, Tensor],
        loss: Tensor,
        step: int,
        schedule: float,
        rehearsal: bool,
        limits: Limits,
    ) -> StepReport:
        assert self.optimizer is not None
        squares = {name: square(grad) for name, grad in grads.items()}
        whole = torch.stack([*squares.values()]).sum()
        by_unit = {
            name: torch.stack([squares[spec.name] for spec in unit.spec.trained]).sum()
            for name, unit in self._units.items()
        }
        accepted = limits.allow_loss(loss) & limits.allow_norm(whole) & (not rehearsal)
        if self.settings.grad_clip:
            shrink = (self.settings.grad_clip / (whole.sqrt() + 1e-6)).clamp(max=1.0)
            for grad in grads.values():
                grad.mul_(shrink)
        for unit in reversed(self._units.values()):
            gradients = {spec.name: grads[spec.name] for spec in unit.spec.trained}
            self.optimizer.update(unit, gradients, step, schedule, accepted)
        norms = [own.sqrt() for own in by_unit.values()]
        numbers = torch.stack([loss, whole.sqrt(), accepted.double(), *norms]).tolist()
        skipped = 0 if numbers[2] else len(self._units)
        return StepReport(numbers[0], numbers[1], skipped, dict(zip(by_unit, numbers[3:], strict=True)))

    @torch.no_grad()
    def evaluate(self, batch: Tensor) -> tuple[float, int]:
        self._load()
        inputs, targets, count, documents = self._micro_batches(batch)
        losses = [
            self.model(self._here(i), self._here(t), self.settings.loss_chunk, lengths)
            for i, t, lengths in zip(inputs, targets, documents, strict=True)
        ]
        return float(torch.stack(losses).sum()), count

    @torch.no_grad()
    def log_probabilities(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        self._load()
        inputs, targets, _, documents = self._micro_batches(batch)
        found = []
        self.dropout.first = 0
        for tokens, wanted, lengths in zip(inputs, targets, documents, strict=True):
            here = self._here(tokens), self._here(wanted)
            found.append(self.model(*here, self.settings.loss_chunk, lengths, each=True))
            self.dropout.first += len(tokens)
        each, likeliest = torch.cat(found, 1).cpu()
        return each, likeliest.bool()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        self._load()
        documents = documents_of(tokens, self.settings.starts)
        return self.model(tokens.to(self.device), documents=documents)[:, -1].float()

    def reader(self, sequences: int, length: int) -> Reader:
        """It remembers nothing."""
        return Rereading(self.logits)

    def units(self, write: bool = False) -> Iterator[Unit]:
        yield from self._units.values()
