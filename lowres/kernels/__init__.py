"""Kernels: operations whose speed decides, one file each.

Each has a plain form in PyTorch's operations, which defines it, a compiled form for CPUs (C++ in `cpu/`) and
one for CUDA (Triton in `gpu/`), behind one function. `forms` says which one runs. A compiled kernel allocates
its outputs and nothing else, so a plan that traces the function knows its memory.

forms      which form runs
native     builds and calls the C++
update     W <- (1 - decay) W - factor * direction, in INT8 and bf16
rounding   numbers in a lower precision, and back
quantise   activations and gradients as INT8 codes
product    INT8 products
norm       RMSNorm
swiglu     SwiGLU
rotary     rotary position embedding
loss       cross-entropy
groups     the INT8 stash
"""
