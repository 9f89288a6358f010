"""The operators: pure functions of tensors, each beside its definition and its one-token form."""

from glactl.kernels.backend import pick_backend
from glactl.kernels.gla import gla, gla_reference, gla_step
from glactl.kernels.gsa import gsa, gsa_reference, gsa_step
from glactl.kernels.scan import scan, scan_reference, scan_step

__all__ = [
    "gla",
    "gla_reference",
    "gla_step",
    "gsa",
    "gsa_reference",
    "gsa_step",
    "pick_backend",
    "scan",
    "scan_reference",
    "scan_step",
]
