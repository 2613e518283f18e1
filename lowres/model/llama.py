"""LLaMA as an ordinary `nn.Module`: the reference for the engine, and the model for wrappers that need a
module.

It calls the functions of `lowres.model.block` with its submodules as weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowres.config import ModelConfig, ReloraConfig
from lowres.model import lora
from lowres.model.block import block, block_table, rms_norm, rope_tables
from lowres.model.documents import Lengths, Positions
from lowres.model.lora import Dropout
from lowres.model.tensors import EMBEDDING_NAME, HEAD_NAME, unit_specs
from lowres.storage import BIAS, TensorSpec


class Norm(nn.Module):
    """RMSNorm with its weight [D]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Module):
    """A matrix [out, in]. `bias` [out] is None until the model sets one."""

    bias: nn.Parameter | None

    def __init__(self, shape: tuple[int, ...], trained: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=trained)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        # a bias is kept in fp32, like norms
        return F.linear(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))


class AdaptedLinear(Linear):
    """A frozen matrix and its adapter, `lora_A` and `lora_B`; see `lowres.model.lora`."""

    lora_A: Linear  # noqa: N815 - the names of PEFT
    lora_B: Linear  # noqa: N815

    def __init__(self, spec: TensorSpec, scaling: float, dropout: Dropout | None) -> None:
        super().__init__(spec.shape, trained=False)
        self.name, self.scaling, self.dropout = spec.name, scaling, dropout

    def forward(self, x: Tensor) -> Tensor:
        mask = self.dropout.mask(self.name, x) if self.dropout is not None else None
        w = lora.Adapter(self.lora_A.weight, self.lora_B.weight, self.scaling)
        y = lora.plain_product(x, mask, self.weight, w)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Embedding(Linear):
    """Rows of a matrix [V, D] for tokens; for a float input the product with it, as a tied head needs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.is_floating_point() else F.embedding(x, self.weight)


class Llama(nn.Module):
    """The whole model as an ordinary module, for reference, tests and wrappers. Every weight belongs to a
    module that uses it in its `forward`, so wrappers such as ZeRO-3 can fetch weights just before use.

    Its `state_dict` has the names and shapes of `transformers.LlamaForCausalLM`; adapters have the names of
    PEFT's LoRA.
    """

    def __init__(
        self, config: ModelConfig, adapters: ReloraConfig | None = None, dropout: Dropout | None = None
    ) -> None:
        super().__init__()
        self.config, self.scaling, self.dropout = config, adapters.scaling if adapters else 1.0, dropout
        for unit in unit_specs(config, adapters):
            for spec in unit.tensors:
                *path, last, _ = spec.name.split(".")
                parent: nn.Module = self
                for part in path:
                    if part not in dict(parent.named_children()):
                        parent.add_module(part, nn.Module())
                    parent = parent.get_submodule(part)
                if spec.kind == BIAS:
                    parent.get_submodule(last).bias = nn.Parameter(torch.empty(spec.shape))
                else:
                    parent.add_module(last, self._module(spec))
        # a layer's modules, by the role of their weight; modules add their own biases
        table = [row for row in block_table(config) if row.kind != BIAS]
        self._modules_by_role = {row.role: row.path.removesuffix(".weight") for row in table}
        head = EMBEDDING_NAME if config.tie_embeddings else HEAD_NAME
        self._head = head.removesuffix(".weight")

    def _module(self, spec: TensorSpec) -> nn.Module:
        if len(spec.shape) == 1:
            return Norm(spec.shape[0], self.config.norm_eps)
        if spec.role == "embedding":
            return Embedding(spec.shape)
        return AdaptedLinear(spec, self.scaling, self.dropout) if spec.frozen else Linear(spec.shape)

    def hidden(self, tokens: Tensor, documents: Sequence[Lengths] | None = None) -> Tensor:
        """Normalised output of the last block [B, T, D] for tokens [B, T]; uses gradient checkpointing for
        every block."""
        tables = rope_tables(self.config, tokens.shape[1], tokens.device)
        positions = Positions(*tables).within(documents)
        x = self.get_submodule("model.embed_tokens")(tokens)
        for i in range(self.config.n_layers):
            layer = self.get_submodule(f"model.layers.{i}")
            w = {role: layer.get_submodule(path) for role, path in self._modules_by_role.items()}
            x = checkpoint(block, x, w, positions, self.config, use_reentrant=False)
        return self.get_submodule("model.norm")(x)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        chunk: int = 1024,
        documents: Sequence[Lengths] | None = None,
        each: bool = False,
    ) -> Tensor:
        """Logits [B, T, V] for tokens [B, T]; with targets [B, T], the sum of the cross-entropy (nats) over
        those other than -100, computed in chunks of tokens. documents: of each sequence, if it is not one.
        each: instead of the sum, fp32 [2, B, T]: the log-probability of each target, and 1 where no token is
        likelier; 0 and 0 where it is -100. It has no gradient."""
        x, head = self.hidden(tokens, documents), self.get_submodule(self._head)
        if targets is None:
            return head(x)
        pieces = zip(x.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True)
        if each:
            return torch.cat([_each_target(h, head, t) for h, t in pieces], 1).view(2, *targets.shape)
        losses = [checkpoint(_chunk_loss, h, head, t, use_reentrant=False) for h, t in pieces]
        return torch.stack(losses).sum()


def _chunk_loss(x: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    logits = head(x)
    wide = logits.float() if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(wide, targets, reduction="sum")


@torch.no_grad()
def _each_target(x: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    logits = head(x)
    wide = logits.float() if logits.dtype == torch.bfloat16 else logits
    found = -F.cross_entropy(wide, targets, reduction="none")
    return torch.stack((found.float(), (logits.argmax(1) == targets).float()))
