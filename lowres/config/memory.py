"""The sections [memory] and [deepspeed]: what is kept where, in which number format, by which engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lowres.config.base import OneOf, Positive, Rate, Section, resumable
from lowres.storage import FORMATS


class MemoryConfig(Section):
    """What is kept where, and in which number format."""

    engine: Literal["layerwise", "autograd", "deepspeed"] = "layerwise"
    """layerwise: all micro-batches pass one layer before the next. autograd: the reference, whole model.
    deepspeed: AdamW with ZeRO and offload, on one or many GPUs; see [deepspeed]."""
    weights: Annotated[str, OneOf(FORMATS)] = Field(
        default="int8",
        description="Number format of the matrices in the blocks; norms and biases are fp32. "
        + " ".join(f"{found.name}: {found.about}." for found in FORMATS.values())
        + " Default with deepspeed fp32: master weights, with which compute may be bf16; bf16 there (with "
        "moments = bf16) has none and rounds to nearest.",
    )
    embeddings: Annotated[str, OneOf(["auto", *(f.name for f in FORMATS.values() if f.any_shape)])] = "auto"
    """Number format of embedding and head; auto: fp32 with fp32 weights, else bf16."""
    compute: Literal["auto", "int8", "bf16", "fp32"] = "auto"
    """Number format of activations and products; auto: bf16 on CUDA, fp32 on CPU."""
    moments: Literal["fp32", "bf16", "int8"] = "fp32"
    """Optimizer moments with a number for every element of a matrix (AdamW's two, Adam-mini's first; also
    of embedding and head beside apollo). int8: in blocks of 256, with bitsandbytes."""
    master: Literal["none", "host"] = "none"
    """host: a more precise copy of the block matrices there takes the updates, so that the weights on the
    GPU are rounded to nearest from it and no update is lost."""
    master_dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of the master copy; bf16 is rounded stochastically."""
    weights_on: Literal["gpu", "host", "auto"] = resumable("auto")
    """Where weights live between visits; auto: as many units on the host as memory.budget_gib asks."""
    state_on: Literal["gpu", "host", "auto"] = resumable("auto")
    """Where optimizer state lives between visits; with a master copy, host."""
    stash_on: Literal["gpu", "host", "auto"] = resumable("auto")
    """Where the inputs of the layers wait for the backward pass."""
    carry_on: Literal["gpu", "host", "auto"] = resumable("auto")
    """Where the boundary that moves lives: the last layer's output, then the gradient on its way down."""
    stash_dtype: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Number format of the stash; auto: that of compute, without loss. int8: groups of 32 with a scale."""
    exact_forward: bool = False
    """With a lossy stash, go on from the exact values in the forward pass instead of the stored ones: the
    carry makes a round trip more for every band, and the recomputation sees other values than the forward."""
    band: Positive | Literal["auto"] = resumable("auto")
    """Layers that are recomputed together: the stash is divided by it, gradient buffer and activations are
    multiplied. auto: 1 if that fits, else 2, 4 or 8."""
    loss_chunk: Positive = resumable(1024)
    """Tokens whose logits exist at one time."""
    budget_gib: Rate | None = resumable(None)
    """GPU memory that the run may take; default: what the device has."""
    host_budget_gib: Rate | None = resumable(None)
    """Host memory that the run may take; default: what the machine has."""
    rehearse: bool | Literal["auto"] = resumable("auto")
    """Rehearse the largest training, evaluation and saving step before the first; auto: on CUDA."""

    @model_validator(mode="after")
    def _built(self) -> MemoryConfig:
        if self.compute == "int8":
            raise ValueError("compute: 'int8' is not built yet; use auto, bf16 or fp32")
        if self.engine == "deepspeed":
            self._check_formats_of_deepspeed()
        if self.engine != "layerwise":
            instead = "use gpu or engine=layerwise"
            if self.engine == "deepspeed":
                instead = "use auto and deepspeed.offload_optimizer or offload_param, or engine=layerwise"
            for key in ("weights_on", "state_on", "stash_on", "carry_on"):
                if getattr(self, key) == "host":
                    raise ValueError(f"{key}: the {self.engine} engine does not move units; {instead}")
            if self.master != "none" or self.stash_dtype != "auto":
                key = "master" if self.master != "none" else "stash_dtype"
                raise ValueError(f"{key}: only the layerwise engine has one; leave it out or change engine")
        if self.master != "none" and self.state_on == "gpu":
            raise ValueError("state_on: a master copy lives in host memory; use host or auto, or master=none")
        if self.master != "none" and FORMATS[self.weights].exact:
            inexact = " or ".join(found.name for found in FORMATS.values() if not found.exact)
            raise ValueError(f"master: {self.weights} weights need no master copy; use weights={inexact}")
        return self

    def _check_formats_of_deepspeed(self) -> None:
        """DeepSpeed has one format for all weights, and either fp32 or bf16 for what its optimizer keeps."""
        if not FORMATS[self.weights].any_shape:
            unknown = self.weights.upper()
            raise ValueError(
                f"weights: DeepSpeed has no {unknown} weights; use fp32 or bf16, or engine=layerwise"
            )
        if self.embeddings_kept_in != self.weights:
            raise ValueError(
                f"embeddings: DeepSpeed keeps all weights in one format; use auto or {self.weights}"
            )
        if self.moments != self.weights:
            raise ValueError(
                f"moments: DeepSpeed keeps moments in the format of the weights; use {self.weights}, "
                "or engine=layerwise"
            )
        if self.weights == "bf16" and self.compute == "fp32":
            raise ValueError("compute: bf16 weights without a master copy compute in bf16; use auto or bf16")

    @property
    def embeddings_kept_in(self) -> str:
        if self.embeddings == "auto":
            return "fp32" if FORMATS[self.weights].exact else "bf16"
        return self.embeddings


class DeepspeedConfig(Section):
    """memory.engine = "deepspeed": AdamW with ZeRO (arXiv 1910.02054). Optimizer state (stage 1), gradients
    (2) and weights (3) are divided over the GPUs of the run, and may live in host memory or on a disk.
    `lowres launch CONFIG --gpus N` uses several GPUs."""

    stage: Literal[1, 2, 3] = resumable(2)
    """What is divided: 1 optimizer state, 2 gradients too, 3 weights too."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = resumable("cpu")
    """Where master weights and moments live, and are updated by the CPU; none: on the GPU."""
    offload_param: Literal["none", "cpu", "nvme"] = resumable("none")
    """Where weights live between uses, with stage 3 and an offloaded optimizer; none: on the GPU."""
    nvme_path: str | None = resumable(None)
    """Folder on a fast local disk for what is offloaded to nvme, once that is built."""
    pin_memory: bool | Literal["auto"] = resumable("auto")
    """Page-lock what is offloaded to the CPU, for copies beside the computation; auto: on CUDA."""
    overlap: bool = resumable(True)
    """Communicate gradients while the backward pass goes on."""
    config_file: str | None = resumable(None)
    """DeepSpeed configuration (JSON) of one's own, for keys that nothing here decides; it goes before our
    choices of sizes. Batch sizes, optimizer, scheduler, number formats, clipping, stage and offload are
    refused there."""

    @model_validator(mode="after")
    def _check_offload(self) -> DeepspeedConfig:
        if self.offload_param != "none" and self.stage != 3:
            raise ValueError(f"offload_param: stage {self.stage} keeps whole weights on the GPU; use stage=3")
        if self.offload_param != "none" and self.offload_optimizer == "none":
            raise ValueError("offload_param: needs an offloaded optimizer too; set offload_optimizer=cpu")
        for key in ("offload_optimizer", "offload_param"):
            if getattr(self, key) == "nvme":
                raise ValueError(f"{key}: 'nvme' is not built yet; use cpu or none")
        return self
