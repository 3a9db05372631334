"""Triton kernels, one file per op: for whatever GPU Triton compiles for, and in its interpreter (TRITON_INTERPRET=1)."""
