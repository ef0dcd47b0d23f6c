"""Micro-benchmarks: kernels and steps beside their peers."""

import os

# PyTorch's profiler, which counts memory here, tells of each of its stages otherwise. Read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
