"""The FLOP/s of chips, from their makers' data sheets: of dense products, without sparsity.

Sources: NVIDIA's data sheets of A100 (SXM and PCIe alike), H100 (SXM, PCIe, NVL), H200, B200 and
L40S, and of Ada's and Ampere's GeForce, whose products in bf16 with fp32 sums run at half the rate
of those with fp16 sums.
"""

import torch

# name's part -> 1e12 FLOP/s in bf16; the first that is in the device's name counts
BF16 = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200 NVL": 835.0,
    "H200": 989.4,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def peak_flops(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """FLOP/s of products in `dtype` with sums in fp32; None where they are not known here."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * rate for part, rate in BF16.items() if part in name), None)
