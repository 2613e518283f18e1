"""The sections [memory] and [deepspeed]: what is kept where, in which number format, by which engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lowres.catalogue import WEIGHT_FORMATS
from lowres.config.base import Gib, OneOf, Section, Size, resumable

FOR_EMBEDDINGS = [found.name for found in WEIGHT_FORMATS.values() if found.any_shape]


class MemoryConfig(Section):
    """What is kept where, and in which number format."""

    engine: Literal["layerwise", "autograd", "deepspeed"] = "layerwise"
    """layerwise: all micro-batches pass one layer before the next layer starts. autograd: the reference,
    which differentiates the whole model. deepspeed: AdamW with ZeRO and offload, on one or many GPUs; see
    [deepspeed]."""
    weights: Annotated[str, OneOf(WEIGHT_FORMATS)] = Field(
        default="int8",
        description="Number format of the matrices in the blocks; norms and biases are fp32. "
        + " ".join(f"{found.name}: {found.about}." for found in WEIGHT_FORMATS.values())
        + " The default with deepspeed is fp32: these are master weights, and compute may be bf16. bf16 with "
        "deepspeed (needs moments = bf16) has no master weights and rounds to nearest.",
    )
    embeddings: Annotated[str, OneOf(["auto", *FOR_EMBEDDINGS])] = "auto"
    """Number format of embedding and head; auto: fp32 with fp32 weights, otherwise bf16."""
    compute: Literal["auto", "int8", "bf16", "fp32"] = "auto"
    """Number format of matrix products and activations. int8: the products of the blocks multiply the INT8
    codes of the weights by activations and gradients that are quantised to INT8; see `activations`. auto:
    what is fastest on this machine, measured when a run starts; a resumed run keeps it. On a CPU small runs
    take fp32."""
    activations: Literal["auto", "bf16", "fp32"] = "auto"
    """compute = int8: number format of activations, and of what is not a product of a block: attention and
    the head. auto: bf16 on CUDA, fp32 on a CPU."""
    compute_wgrad: Literal["int8", "dense"] = "int8"
    """compute = int8: number format of the products for the gradients of weights. dense: the format of
    activations."""
    kernels: Literal["auto", "fused", "plain"] = "auto"
    """fused: norms, SwiGLU, rotary embedding and the loss run as one kernel each. plain: as single operations
    of PyTorch, and updates too. The results differ by rounding; updates are the same bit for bit. auto: fused
    on CUDA and with INT8 products; on a CPU also where compute = auto measured that it is faster."""
    moments: Literal["fp32", "bf16", "int8"] = "fp32"
    """Number format of optimizer moments that have one number per element of a matrix: both of AdamW (also
    where it updates only embedding and head), the first of Adam-mini, the momentum of sgd, muon and scale.
    int8: in blocks of 256, with bitsandbytes; those of muon and scale without."""
    master: Literal["none", "host"] = "none"
    """host: keep a more precise copy of the block matrices in host memory. Updates change this copy, and the
    weights on the GPU are rounded from it to nearest, so no update is lost."""
    master_dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of the master copy; bf16 is rounded stochastically."""
    weights_on: Literal["gpu", "host", "auto"] = resumable("auto")
    """Where weights are kept between uses; auto: as many units on the host as memory.budget_gib requires."""
    state_on: Literal["gpu", "host", "auto"] = resumable("auto")
    """Where optimizer state is kept between uses; with a master copy, on the host."""
    stash_on: Literal["gpu", "host", "auto"] = resumable("auto")
    """Where the stash is kept: the inputs of the layers, until the backward pass."""
    carry_on: Literal["gpu", "host", "auto"] = resumable("auto")
    """Where the carry is kept: the last layer's output, then the gradient that moves down the layers."""
    stash_dtype: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Number format of the stash; auto: the format of compute, lossless. int8: one scale per 32 numbers."""
    exact_forward: bool = False
    """With a lossy stash, continue the forward pass from the exact values instead of the stored ones. This
    costs one more round trip of the carry per band, and the recomputation sees other values than the forward
    pass."""
    band: Size | Literal["auto"] = resumable("auto")
    """Layers that are recomputed together. The stash is divided by this number; gradient buffer and
    activations are multiplied by it. auto: 1 if that fits, otherwise 2, 4 or 8."""
    loss_chunk: Size = resumable(1024)
    """Tokens whose logits exist at one time."""
    budget_gib: Gib | None = resumable(None)
    """GPU memory that the run may take; default: what is free there, less 1 GiB."""
    host_budget_gib: Gib | None = resumable(None)
    """Host memory that the run may use; default: all that the machine has."""
    rehearse: bool | Literal["auto"] = resumable("auto")
    """Rehearse the largest training, evaluation and saving step before the first step; auto: on CUDA."""

    @model_validator(mode="after")
    def _built(self) -> MemoryConfig:
        if self.compute == "int8":
            self._check_int8()
        if self.kernels == "fused" and self.engine != "layerwise":
            raise ValueError(f"kernels: the {self.engine} engine has no fused kernels; use auto or plain")
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
                raise ValueError(f"{key}: only for the layerwise engine; leave it out or change engine")
        if self.master != "none" and self.state_on == "gpu":
            raise ValueError("state_on: a master copy is in host memory; use host or auto, or master=none")
        if self.master != "none" and WEIGHT_FORMATS[self.weights].exact:
            inexact = " or ".join(found.name for found in WEIGHT_FORMATS.values() if not found.exact)
            raise ValueError(f"master: {self.weights} weights need no master copy; use weights={inexact}")
        return self

    def _check_int8(self) -> None:
        if self.engine != "layerwise":
            raise ValueError(
                f"compute: the {self.engine} engine does not multiply INT8; use auto, bf16 or fp32, or "
                "engine=layerwise"
            )
        if self.weights != "int8":
            raise ValueError(
                f"compute: int8 multiplies the codes of INT8 weights, and weights are {self.weights}; use "
                "weights=int8 (with master=host for a more precise copy), or another compute"
            )
        if self.kernels == "plain":
            raise ValueError("kernels: INT8 products need fused kernels; use auto, or another compute")

    @property
    def activations_in(self) -> str:
        """Number format of activations: auto, bf16 or fp32."""
        return self.activations if self.compute == "int8" else self.compute

    def _check_formats_of_deepspeed(self) -> None:
        """DeepSpeed has one format for all weights and for the state of its optimizer: fp32 or bf16."""
        if not WEIGHT_FORMATS[self.weights].any_shape:
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
            return "fp32" if WEIGHT_FORMATS[self.weights].exact else "bf16"
        return self.embeddings


class DeepspeedConfig(Section):
    """For memory.engine = "deepspeed": AdamW with ZeRO (arXiv 1910.02054). Optimizer state (from stage 1),
    gradients (from stage 2) and weights (stage 3) are divided among the GPUs of the run. State and weights
    can be offloaded to host memory. `lowres launch CONFIG --gpus N` uses several GPUs."""

    stage: Literal[1, 2, 3] = resumable(2)
    """What is divided among GPUs: 1 optimizer state; 2 also gradients; 3 also weights."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = resumable("cpu")
    """cpu: master weights and moments are in host memory, and the CPU updates them. none: on the GPU."""
    offload_param: Literal["none", "cpu", "nvme"] = resumable("none")
    """cpu: weights are in host memory between uses; needs stage 3 and offload_optimizer. none: on the GPU."""
    nvme_path: str | None = resumable(None)
    """Folder on a fast local disk for offload to nvme, which is not built yet."""
    pin_memory: bool | Literal["auto"] = resumable("auto")
    """Use page-locked (pinned) host memory for offload, so copies run during computation; auto: on CUDA."""
    overlap: bool = resumable(True)
    """Communicate gradients during the backward pass."""
    config_file: str | None = resumable(None)
    """Your own DeepSpeed configuration (JSON), for keys that lowres does not set. Its sizes (buffers,
    buckets) replace those that lowres chooses. Refused in it: batch sizes, optimizer, scheduler, number
    formats, clipping, stage and offload."""

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
