"""Kernels beside their peers, on one GPU in one run: ``python -m benchmarks.gemm``, ``python -m benchmarks.flat_quantize``.

Operands are random, never zeros. Every time is a median of calls between which the L2 cache is overwritten, measured with CUDA events.
"""
