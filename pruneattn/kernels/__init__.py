"""Triton kernels, one file per op. They run on every GPU that Triton supports, and in its interpreter on the CPU."""
