"""The compiled kernels: how they are built, loaded and launched. Importing this package does not import torch."""
