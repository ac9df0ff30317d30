"""GPUs by name: memory, arithmetic and bandwidth as their vendor publishes them.

Memory is nominal, in 10⁹ bytes: the few per cent that the driver shows above it are left to fragmentation. Arithmetic
is dense, not sparse; float32 is without tensor cores, PyTorch's default.
"""

from __future__ import annotations

from dataclasses import dataclass

from palimpsest.rundir import UserError


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int  # bytes
    bf16: float  # FLOP/s, dense, float32 accumulation
    float32: float  # FLOP/s
    bandwidth: float  # bytes/s


def _gpu(name: str, gigabytes: int, bf16: float, float32: float, bandwidth: float) -> Gpu:
    """TFLOP/s and TB/s to FLOP/s and bytes/s."""
    return Gpu(name, gigabytes * 10**9, bf16 * 1e12, float32 * 1e12, bandwidth * 1e12)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("H200", 141, 989, 67, 4.8),
        _gpu("H100", 80, 989, 67, 3.35),
        _gpu("H100-PCIe", 80, 756, 51, 2.0),
        _gpu("A100-80GB", 80, 312, 19.5, 2.039),
        _gpu("A100-40GB", 40, 312, 19.5, 1.555),
        _gpu("L40S", 48, 362, 91.6, 0.864),
        _gpu("L4", 24, 121, 30.3, 0.3),
        _gpu("A10", 24, 125, 31.2, 0.6),
        _gpu("RTX-4090", 24, 165, 82.6, 1.008),
        _gpu("RTX-3090", 24, 71, 35.6, 0.936),
    )
}


def find_gpu(name: str) -> Gpu:
    """By name, in any case. Raises UserError for a name that is not in the table."""
    found = next((gpu for key, gpu in GPUS.items() if key.lower() == name.lower()), None)
    if found is None:
        raise UserError(
            f"There is no GPU {name!r} in the table; it has {', '.join(GPUS)}. --memory GB takes any other."
        )
    return found
