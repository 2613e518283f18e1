"""The kernels for CUDA, in Triton: see the file of the same name one level up for what each computes.

They never wait for the device and allocate nothing. Multiplications and additions are fused only where that
is written (`tl.fma`), so that kernels that have to equal PyTorch's on a CPU bit for bit do, with every
version of Triton. Its plain division is approximate: where bits count, it is `tl.div_rn`.
"""
