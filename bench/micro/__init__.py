"""Micro-benchmarks: kernels and steps next to their peers."""

import os

# Keep PyTorch's profiler, which counts memory, from logging each of its stages. Read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
