"""Triton kernels run in its interpreter where there is no CUDA device."""

import os

import torch

if not torch.cuda.is_available():  # read when a kernel is defined, so before any import of one
    os.environ.setdefault("TRITON_INTERPRET", "1")
