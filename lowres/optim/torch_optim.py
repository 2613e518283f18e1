"""The update rules as ordinary `torch.optim.Optimizer` classes, for any model and training loop.

    optimizer = Apollo(model.named_parameters(), lr=1e-2, rank=256)

Parameter names decide which tensors the rule updates. With Apollo, ApolloMini, GaLore, Fira, Muon, SinkGD and
RACS: all matrices except embeddings and heads. With Scale: these too, each in its own way. With AdamMini: all
tensors whose role in a LLaMA model is known. AdamW updates the rest, including 1-D tensors, with the same eps
and betas; with Muon and RACS, whose betas mean something else, with `adamw_betas`. The group key `role`
overrides this: {"params": ..., "role": "adamw"} or "matrix", for Scale also "embedding" or "head", and for
AdamMini one of its roles. In a group without names, the rule updates all matrices.

Differences from the optimizers of torch:
- bf16 parameters are written with stochastic rounding, from fp32 arithmetic and fp32 state. Loading does not
  cast this state to the parameter's dtype.
- A step whose gradients are not all finite changes nothing. This check is the only point in a step that
  waits for the device.
- 1-D tensors have no weight decay; for all others it is decoupled.
- All random numbers are named by `seed`, the parameter and the step, so a resumed run gives the same result.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import inf
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from lowres import rng
from lowres.catalogue import GROWTH, RULES, Betas, Definition
from lowres.rules import Clock, Rule, Settings, make
from lowres.rules.adam_mini import HEAD_ROLES, ROW_ROLES, describe_partition
from lowres.rules.moments import KINDS
from lowres.rules.scale import EMBEDDING, HEAD
from lowres.storage import EMBEDDING as EMBEDDING_KIND
from lowres.storage import MATRIX as MATRIX_KIND
from lowres.storage import NORM as NORM_KIND
from lowres.storage import Dense, TensorSpec

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]

ADAMW, MATRIX, NORM = "adamw", "matrix", "norm"
ADAMW_BETAS = "adamw_betas"  # a keyword of the classes whose `betas` are no pair of AdamW's
EMBEDDINGS = ("wte", "wpe", "shared")  # and what has "embed" or the word "emb" in its name
HEADS = ("lm_head", "head", "output", "embed_out", "unembed", "score", "classifier")
# several matrices in one parameter: query, key and value; gate and up
FUSED = ("qkv", "query_key_value", "c_attn", "gate_up", "in_proj")
LLAMA_ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "embed_tokens": "embedding",
    "lm_head": "head",
}


@dataclass
class Part:
    """Derived from a param group: the spec and the rule of each of its parameters."""

    specs: list[TensorSpec]
    rules: list[Rule]


class RuleOptimizer(torch.optim.Optimizer):
    """A registered rule for the parameters of any model. The state of a parameter is its step count and the
    rule's tensors. A param group may set its own value for every keyword."""

    definition: ClassVar[Definition]
    own: ClassVar[dict[str, Any]]  # keywords of this class that other classes may lack, and their defaults

    def __init__(
        self,
        params: Params,
        lr: float | None = None,
        betas: Betas | None = None,
        eps: float | None = None,
        weight_decay: float = 0.0,
        *,
        moments: str = "fp32",
        seed: int = 0,
        **keys: Any,
    ) -> None:
        """moments: fp32, bf16 or int8, the number format of element-wise moments. keys: the keywords of the
        rule; see the signature of each class."""
        found, own = self.definition, self.own
        unknown = sorted(keys.keys() - own.keys())
        if unknown:
            known = ", ".join(own)
            raise TypeError(f"{type(self).__name__}: unknown keyword {unknown[0]!r}; known are {known}")
        self._parts: list[Part] = []
        values = {
            "lr": found.lr if lr is None else lr,
            "betas": found.betas if betas is None else betas,
            "eps": found.eps if eps is None else eps,
            "weight_decay": weight_decay,
            "moments": moments,
            "seed": seed,
            "role": None,
        }
        super().__init__(params, values | own | keys)

    # which rule updates which parameter

    def _rule(self, group: dict[str, Any]) -> Rule:
        """The rule of a group, from its hyper-parameters."""
        found = self.definition
        for key in (*found.keys, *found.class_keys):
            value = group[key.name]
            try:
                TypeAdapter(key.type | None).validate_python(value, strict=True)
            except ValidationError:
                _require(False, key.name, value, key.wanted)
        return make(found.name, self._settings(group))

    def _settings(self, group: dict[str, Any]) -> Settings:
        growth = _growth(group["limiter"]) if self.definition.limits_itself else 0.0
        found = self.definition
        keys = {key.name: group[key.name] for key in (*found.keys, *found.class_keys)}
        head_dim = group.get("head_dim")
        return Settings(
            group["betas"], group["eps"], group["moments"], group["seed"], growth, None, head_dim, keys
        )

    def _roles(self, group: dict[str, Any], names: list[str]) -> list[str]:
        """ADAMW, or a role that the rule knows, for each parameter of a group."""
        beyond = (EMBEDDING, HEAD) if EMBEDDING_KIND in self.definition.kinds else ()
        known = (ADAMW, MATRIX, *beyond)
        if group["role"] not in (None, *known):
            raise ValueError(
                f"role: {group['role']!r} is not known; use {', '.join(known[:-1])} or {known[-1]}"
            )
        if group["role"] not in (None, ADAMW):
            for name, p in zip(names, group["params"], strict=True):
                if p.dim() != 2:
                    raise ValueError(
                        f"{name}: has the shape {list(p.shape)}, but role={group['role']!r} is for 2-D"
                    )
        if group["role"] is not None:
            return [group["role"]] * len(names)
        matrices = [p.dim() == 2 for p in group["params"]]
        if "param_names" not in group:
            if any(matrices):
                warnings.warn(
                    f"{type(self).__name__}: parameters without names, so its rule updates all matrices, "
                    "also embedding and head; pass model.named_parameters(), or a role in each group",
                    stacklevel=6,
                )
            return [MATRIX if matrix else ADAMW for matrix in matrices]
        roles = [_role(name) if matrix else ADAMW for name, matrix in zip(names, matrices, strict=True)]
        return [role if role in known else ADAMW for role in roles]

    def _check_split(self, group: dict[str, Any], specs: list[TensorSpec]) -> None:
        """For a rule to which it matters that a parameter is several matrices."""
        for spec in specs:
            rows, split = spec.shape[0], group["split"]
            if spec.role != MATRIX:
                continue
            if split and sum(split) != rows:
                turned = "; a weight [in, out], as of Conv1D, needs split=() or role='adamw'"
                raise ValueError(
                    f"{spec.name}: has {rows} rows, but split {split} is for {sum(split)}"
                    f"{turned if sum(split) == spec.shape[1] else ''}"
                )
            if split is None and any(part in spec.name for part in FUSED):
                raise ValueError(
                    f"{spec.name}: seems to be several matrices in one; put it into a group with split, "
                    "the rows of each, or with split=() to orthogonalise it as one"
                )

    def _part(self, index: int) -> Part:
        group = self.param_groups[index]
        missing = sorted(self.defaults.keys() - group.keys() - {"differentiable"})  # torch adds this one
        if missing:
            raise ValueError(
                f"param group {index}: has no {', '.join(missing)}, so it is not from {type(self).__name__}"
            )
        _check(group)
        params: list[Tensor] = group["params"]
        names = group.get("param_names") or [f"{index}.{i}" for i in range(len(params))]
        for name, p in zip(names, params, strict=True):
            if p.dtype not in (torch.float32, torch.bfloat16, torch.float64):
                raise ValueError(f"{name}: is {p.dtype}; only fp32, bf16 and fp64 parameters are updated")
        settings = replace(self._settings(group), betas=_adamw_betas(group))
        own, adamw = self._rule(group), make("adamw", settings)
        roles = self._roles(group, names)
        # a scalar is treated as a 1-D tensor with one element
        specs = [
            TensorSpec(name, tuple(p.shape) or (1,), role, NORM_KIND if role == NORM else MATRIX_KIND)
            for name, p, role in zip(names, params, roles, strict=True)
        ]
        if "split" in group:
            self._check_split(group, specs)
        return Part(specs, [adamw if role == ADAMW else own for role in roles])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._parts.append(self._part(len(self.param_groups) - 1))
        except ValueError:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # after unpickling, copying and loading
        self._parts = [self._part(i) for i in range(len(self.param_groups))]

    # the update

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients, which do not change. Returns the result of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = []
        for group, part in zip(self.param_groups, self._parts, strict=True):
            if [tuple(p.shape) or (1,) for p in group["params"]] != [spec.shape for spec in part.specs]:
                raise ValueError(
                    f"{type(self).__name__}: parameters have other shapes than at the start; wrappers that "
                    "flatten or shard parameters, such as ZeRO, do not work with it"
                )
            for p, spec in zip(group["params"], part.specs, strict=True):
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise ValueError(f"{spec.name}: its gradient is sparse; use nn.Embedding(sparse=False)")
                grads += [] if p.grad is None else [p.grad]
        if not bool(torch.nn.utils.get_total_norm(grads).isfinite()):
            warnings.warn("gradients are not finite: this step updates nothing", stacklevel=4)
            return loss
        for group, part in zip(self.param_groups, self._parts, strict=True):
            self._update_group(group, part)
        return loss

    def _update_group(self, group: dict[str, Any], part: Part) -> None:
        # parameters may have been added later, and may be on several devices
        together: dict[tuple[bool, torch.device, int], list[int]] = {}
        for i, (p, spec, rule) in enumerate(zip(group["params"], part.specs, part.rules, strict=True)):
            # some schedulers change them
            rule.betas = _adamw_betas(group) if spec.role == ADAMW else group["betas"]
            rule.eps = group["eps"]
            if p.grad is None or not p.numel():
                continue
            if not self.state[p]:
                fields = rule.state_fields(spec)
                self.state[p]["step"] = 0
                for key, (dtype, shape) in fields.items():
                    self.state[p][key] = torch.zeros(shape, dtype=dtype, device=p.device)
            together.setdefault((spec.role == ADAMW, p.device, self.state[p]["step"]), []).append(i)
        for members in together.values():
            # a rule that overwrites gradients gets copies, one at a time
            one_by_one = part.rules[members[0]].overwrites
            for run in [[i] for i in members] if one_by_one else [members]:
                self._update(group, part, run)

    def _update(self, group: dict[str, Any], part: Part, members: list[int]) -> None:
        """Update parameters with the same rule, device and step count."""
        params = [group["params"][i] for i in members]
        specs, rule = [part.specs[i] for i in members], part.rules[members[0]]
        states = [self.state[p] for p in params]
        directions = [
            p.grad.to(torch.float32, copy=rule.overwrites).contiguous().view(spec.shape)
            for p, spec in zip(params, specs, strict=True)
        ]
        lr, step, device, seed = float(group["lr"]), states[0]["step"], params[0].device, group["seed"]
        updates = torch.full((), step + 1, dtype=torch.int64, device=device)
        clock = Clock(step, updates, torch.ones((), dtype=torch.bool, device=device), seed)
        factors = rule.directions(specs, directions, states, lr, clock)
        decay = torch.full((), lr * group["weight_decay"], device=device) if group["weight_decay"] else None
        for p, spec, direction, factor in zip(params, specs, directions, factors, strict=True):
            key = rng.make_key(seed, "rounding", spec.name, step)
            weight = Dense(p.view(1) if p.dim() == 0 else p)
            weight.apply(direction, factor, decay if p.dim() > 1 else None, key)
            self.state[p]["step"] += 1

    # the state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but every tensor keeps its dtype and is copied, and its shape is checked. If both
        sides have names, each parameter gets what was saved under its name, in any order and grouping; torch
        goes by position alone. Raises ValueError, and changes nothing, if the state is from another
        optimizer."""
        before = self.__dict__.copy()
        try:
            self._load(state_dict)
        except ValueError:
            self.__dict__.update(before)
            raise

    def _load(self, state_dict: dict[str, Any]) -> None:
        found: dict[str, Any] = {}

        def take(_: torch.optim.Optimizer, adapted: dict[str, Any]) -> dict[str, Any]:
            found.update(self._in_own_order(adapted))
            return {**found, "state": {}}  # with the state, torch would cast its tensors

        last = self.register_load_state_dict_pre_hook(take)  # after all hooks of the user
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        state_dict = found
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        specs = [spec for part in self._parts for spec in part.specs]
        rules = [rule for part in self._parts for rule in part.rules]
        for index, p, spec, rule in zip(saved, params, specs, rules, strict=True):
            state = state_dict["state"].get(index)
            if not state:
                continue
            fields = rule.state_fields(spec)
            if {"step", *fields} != state.keys() or any(
                state[key].shape != shape for key, (_, shape) in fields.items()
            ):
                raise ValueError(f"{spec.name}: the saved state is from another rule, rank or shape")
            self.state[p] = {
                key: state[key].to(p.device, dtype, copy=True) for key, (dtype, _) in fields.items()
            }
            self.state[p]["step"] = int(state["step"])

    def _in_own_order(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A saved state with its parameters grouped and sorted as they are here, by their names; unchanged if
        a side has no names, or has one twice."""
        groups, saved_groups = self.param_groups, state_dict["param_groups"]
        if not all("param_names" in group for group in (*groups, *saved_groups)):
            return state_dict
        names = [name for group in groups for name in group["param_names"]]
        saved = [
            (name, index, group)
            for group in saved_groups
            for name, index in zip(group["param_names"], group["params"], strict=True)
        ]
        indices = {name: index for name, index, _ in saved}
        if len(set(names)) < len(names) or len(indices) < len(saved):
            return state_dict
        for name in names:
            if name not in indices:
                raise ValueError(f"{name}: is not in the saved state")
        known = set(names)
        for name in indices:
            if name not in known:
                raise ValueError(f"{name}: is in the saved state, but this optimizer has no such parameter")
        options = {name: _options(group) for name, _, group in saved}
        ordered = []
        for group in groups:
            own = group["param_names"]
            _require_alike(own, options)
            kept = options[own[0]] if own else _options(group)
            ordered.append({**kept, "params": [indices[name] for name in own], "param_names": own})
        return {**state_dict, "param_groups": ordered}


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """What a param group says about all of its parameters."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _require_alike(names: list[str], options: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError if parameters that are in one group here were saved with different options."""
    for name in names[1:]:
        first, other = options[names[0]], options[name]
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise ValueError(
                    f"{name}: was saved with {key} {other.get(key)!r}, but {names[0]}, which is in the same "
                    f"group here, with {first.get(key)!r}; group the parameters as they were"
                )


class AdamMini(RuleOptimizer):
    """Adam-mini (Zhang et al., arXiv 2406.16793): one second moment per head, row or norm.

    dim, n_heads, n_kv_heads, head_dim: of the LLaMA model; defaults: n_kv_heads = n_heads, head_dim = dim /
    n_heads. AdamW updates biases. Raises ValueError for tensors of unknown role, such as a fused QKV,
    adapters or 3-D experts; for these, set `role` in their group: q, k, v, o, gate, up, down, embedding,
    head, matrix (one second moment per row), norm or adamw.

    Without dim and n_heads, for any model: every matrix has one second moment per row, also query and key,
    and AdamW updates what is neither a matrix nor a norm. A warning says so.
    """

    definition = RULES["adam-mini"]
    own: ClassVar = dict.fromkeys(("dim", "n_heads", "n_kv_heads", "head_dim"))

    def __init__(
        self,
        named_parameters: Params,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        dim: int | None = None,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        moments: str = "fp32",
        seed: int = 0,
    ) -> None:
        shape: dict[str, int | None] = dict.fromkeys(self.own) | {"head_dim": 1}
        if dim is None or n_heads is None:
            for key, value in (("dim", dim), ("n_heads", n_heads), ("n_kv_heads", n_kv_heads)):
                _require(value is None, key, value, "given with both dim and n_heads, or left out")
            _require(head_dim is None, "head_dim", head_dim, "given with dim and n_heads, or left out")
            warnings.warn(
                "AdamMini: without dim and n_heads, so every matrix has one second moment per row; for a "
                "LLaMA model, give both, and query and key have one per head",
                stacklevel=2,
            )
        else:
            _require(n_heads >= 1, "n_heads", n_heads, "at least 1")
            if head_dim is None:
                _require(dim % n_heads == 0, "n_heads", n_heads, f"a divisor of dim {dim}, or give head_dim")
            kv, width = n_kv_heads or n_heads, head_dim or dim // n_heads
            shape = {"dim": dim, "n_heads": n_heads, "n_kv_heads": kv, "head_dim": width}
        super().__init__(named_parameters, lr, betas, eps, weight_decay, moments=moments, seed=seed, **shape)

    def describe_partition(self) -> str:
        """The blocks of the parameters, one line per role."""
        specs = [spec for part in self._parts for spec in part.specs if spec.role != ADAMW]
        return describe_partition(specs, self.defaults["head_dim"])

    def _roles(self, group: dict[str, Any], names: list[str]) -> list[str]:
        known = (*HEAD_ROLES, *ROW_ROLES, NORM, ADAMW)
        if group["role"] not in (None, *known):
            raise ValueError(f"role: {group['role']!r} is not known; use one of {', '.join(known)}")
        named = "param_names" in group
        if group["dim"] is None:
            return self._roles_by_rows(group, names if named else [""] * len(names))
        roles, odd = [], []
        for name, p in zip(names, group["params"], strict=True):
            role = group["role"] or (_llama_role(name, p) if named else None)
            if role is None or not self._fits(role, tuple(p.shape), group, exact=group["role"] is None):
                odd.append(f"{name} {list(p.shape)}")
            roles.append(role or "")
        if odd:
            raise ValueError(
                f"AdamMini cannot place {', '.join(odd)} in a LLaMA model with dim {group['dim']}, "
                f"{group['n_heads']} heads and {group['n_kv_heads']} KV heads of {group['head_dim']}; pass "
                "names from model.named_parameters(), or put such tensors in a separate group with "
                f"role='{ADAMW}' or one of {', '.join(known)}"
            )
        return roles

    @staticmethod
    def _roles_by_rows(group: dict[str, Any], names: list[str]) -> list[str]:
        """Roles in any model. names: "" where there are none."""
        asked = group["role"]
        _require(asked not in HEAD_ROLES, "role", asked, "for a model whose dim and n_heads are given")
        roles: list[str] = []
        for name, p in zip(names, group["params"], strict=True):
            if asked not in (None, ADAMW):
                fits = p.dim() == (1 if asked == NORM else 2)
                _require(fits, "role", asked, f"for tensors of other shapes than {name} {list(p.shape)}")
            of_name = NORM if p.dim() == 1 and "norm" in _module(name) else ADAMW
            roles.append(asked or (MATRIX if p.dim() == 2 else of_name))
        return roles

    @staticmethod
    def _fits(role: str, shape: tuple[int, ...], group: dict[str, Any], exact: bool) -> bool:
        """Whether a tensor of a role can have this shape; exact: in this model, otherwise in any model."""
        if role == ADAMW:
            return True
        if role == NORM:
            return len(shape) == 1
        if len(shape) != 2 or (role in HEAD_ROLES and shape[0] % group["head_dim"]):
            return False
        dim, heads, kv = group["dim"], group["n_heads"], group["n_kv_heads"]
        rows = {"q": heads * group["head_dim"], "k": kv * group["head_dim"], "o": dim, "down": dim}
        columns = {"o": heads * group["head_dim"], "down": shape[1]}
        rows["v"] = rows["k"]
        return not exact or (rows.get(role, shape[0]), columns.get(role, dim)) == shape


def _module(name: str) -> str:
    """The last module in the name of a parameter: "q_proj" in "layers.0.self_attn.q_proj.weight"."""
    *path, last = name.split(".")
    return path[-1] if path and last in ("weight", "bias") else last


def _role(name: str) -> str:
    """The role of a 2-D parameter in any model."""
    module = _module(name)
    if module in HEADS:
        return HEAD
    if module in EMBEDDINGS or "embed" in module or "emb" in module.split("_"):
        return EMBEDDING
    return ADAMW if "norm" in module else MATRIX


def _llama_role(name: str, p: Tensor) -> str | None:
    """The role of a parameter of a Hugging Face LLaMA model; None if it has none."""
    if p.dim() == 1:
        return ADAMW if name.endswith("bias") else NORM if "norm" in _module(name) else None
    return LLAMA_ROLES.get(_module(name)) if name.endswith(".weight") else None


def _require(holds: bool, key: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{key}: {value!r} must be {wanted}")


def _growth(limiter: bool | float) -> float:
    """The factor for a value of `limiter`; 0 is no limiter."""
    growth = GROWTH if limiter is True else float(limiter)
    _require(growth == 0 or 1 <= growth < inf, "limiter", limiter, "True, False or at least 1")
    return growth


def _adamw_betas(group: dict[str, Any]) -> Betas:
    """betas of the AdamW in a group: those of the rule, if these do not mean something else."""
    betas: Betas = group.get(ADAMW_BETAS, group["betas"])
    return betas


def _check(group: dict[str, Any]) -> None:
    """Check the keys that several optimizers have; a group may have its own values."""
    lr, moments = group["lr"], group["moments"]
    _require(0 <= lr < inf, "lr", lr, "at least 0 and finite")
    for key in ("betas", ADAMW_BETAS):
        betas = group.get(key, (0, 0))
        pair = isinstance(betas, tuple | list) and len(betas) == 2
        _require(pair and all(0 <= beta < 1 for beta in betas), key, betas, "two numbers in [0, 1)")
    _require(0 < group["eps"] < inf, "eps", group["eps"], "above 0 and finite")
    _require(0 <= group["weight_decay"] < inf, "weight_decay", group["weight_decay"], "at least 0 and finite")
    _require(moments in KINDS, "moments", moments, "fp32, bf16 or int8")


def _torch_class(found: Definition) -> type[RuleOptimizer]:
    """The class for a registered optimizer, with its signature and documentation."""
    assert found.class_name is not None
    # a rank of None means a quarter of the smaller dimension of each matrix
    own = {key.name: value for keys in (found.keys, found.class_keys) for key, value in keys.items()}
    own |= {"limiter": True} if found.limits_itself else {}
    # what the rule does not read is for AdamW
    own |= {ADAMW_BETAS: found.adamw_betas} if found.adamw_betas and "betas" in found.reads else {}
    values = {"lr": found.lr, "betas": found.betas, "eps": found.eps, "weight_decay": 0.0}
    first = [inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    first += [inspect.Parameter(n, first[0].kind, default=value) for n, value in values.items()]
    words = own | {"moments": "fp32", "seed": 0}
    last = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=v) for n, v in words.items()]
    texts = [f"{key.name}: {key.about}" for key in (*found.keys, *found.class_keys)]
    if found.limits_itself:
        texts.append(
            f"limiter: the largest growth of an update's norm per step, as a factor; True is {GROWTH}, False "
            "is no limiter."
        )
    if ADAMW_BETAS in own:
        texts.append(f"{ADAMW_BETAS}: betas of the AdamW that updates the other tensors.")
    members = {
        "definition": found,
        "own": own,
        "__doc__": "\n".join([f"{found.name}: {found.about}.", "", *texts]),
        "__module__": __name__,
        "__signature__": inspect.Signature([*first, *last]),
    }
    return type(found.class_name, (RuleOptimizer,), members)


# by name; also added to the module, so that they can be pickled
CLASSES = {found.class_name: _torch_class(found) for found in RULES.values() if found.class_name}
globals().update(CLASSES)
