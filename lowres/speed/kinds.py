"""What the operations, kernels and marks of a profile are for."""

from __future__ import annotations

import re

from lowres import marks
from lowres.speed.phases import PHASE

GEMM, ATTENTION, QUANTISATION = "GEMM", "attention", "quantisation"
POINTWISE, UPDATE = "norms and other pointwise", "update"
TRANSFER, OVERHEAD, WAITING = "transfers", "Python and launch overhead", "waiting"
KINDS = (GEMM, ATTENTION, QUANTISATION, POINTWISE, UPDATE, TRANSFER, OVERHEAD, WAITING)

# by kind of a mark; any other mark is pointwise
MARKED = {
    marks.GEMM: GEMM,
    marks.QUANTISE: QUANTISATION,
    marks.DEQUANTISE: QUANTISATION,
    marks.UPDATE: UPDATE,
    marks.TRANSFER: TRANSFER,
}
_TRANSFERS = re.compile(r"memcpy (htod|dtoh)|hosttodevice|devicetohost")
_ATTENTION = re.compile(r"flash|fmha|attention|sdpa|mha_")
_GEMM = re.compile(
    r"gemm|nvjet|cutlass|xmma|cublas|splitk|^aten::(mm|addmm_?|bmm|baddbmm|matmul|linear|_int_mm|_scaled_mm)$"
)
# operations that compute nothing: they make a view or get memory
_NO_WORK = re.compile(
    r"^aten::(as_strided|view|_unsafe_view|reshape|_reshape_alias|empty\w*|new_empty\w*|resize_|t|transpose|"
    r"permute|expand|unsqueeze|squeeze|select|slice|split\w*|chunk|unbind|narrow|detach_?|alias|lift_fresh|"
    r"result_type|resolve_conj|resolve_neg|is_nonzero|item|_local_scalar_dense|set_|flatten|unflatten|to)$"
)
_WAITS = re.compile(r"synchronize|^cu(da)?memcpy(dtoh|htod)?(_v2)?$")


def kind_on_host(path: tuple[str, ...]) -> str:
    """What a host does by itself at a moment. path: the names of the events that contain it."""
    leaf = path[-1] if path else ""
    if _WAITS.search(leaf.lower()):
        return WAITING
    if marks.kind_in(leaf) is None and (not leaf.startswith("aten::") or _NO_WORK.match(leaf)):
        return OVERHEAD
    return _by_purpose(path) or by_name(leaf)


def kind_on_device(name: str, path: tuple[str, ...]) -> str:
    """What a kernel is for. path: the events that contain its launch."""
    if _TRANSFERS.search(name.lower()):
        return TRANSFER
    found = _by_purpose(path)
    # what splits a product or adds its parts belongs to it, whatever its kernel is called
    return found or (GEMM if path and by_name(path[-1]) == GEMM else by_name(name))


def by_name(name: str) -> str:
    """The kind of an operation or kernel, by its name alone."""
    lower = name.lower()
    marked = marks.kind_in(name)
    if marked is not None:
        return MARKED.get(marked, POINTWISE)
    for pattern, kind in ((_TRANSFERS, TRANSFER), (_ATTENTION, ATTENTION), (_GEMM, GEMM)):
        if pattern.search(lower):
            return kind
    return POINTWISE


def _by_purpose(path: tuple[str, ...]) -> str | None:
    """By what surrounds an operation: transfers, updates, other marks, attention; in this order."""
    marked = [MARKED.get(kind, POINTWISE) for kind in map(marks.kind_in, path) if kind is not None]
    if TRANSFER in marked:
        return TRANSFER
    if UPDATE in marked or PHASE + "update" in path:
        return UPDATE
    if marked:
        return marked[-1]
    return ATTENTION if any(_ATTENTION.search(name.lower()) for name in path) else None


def phase_in(path: tuple[str, ...]) -> str:
    """The phase of the step; empty if there is none."""
    return next((name.removeprefix(PHASE) for name in path if name.startswith(PHASE)), "")
