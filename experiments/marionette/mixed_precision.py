"""The precision that networks of the embedded world are trained in."""

import torch


def mixed_precision(device: str | torch.device) -> torch.autocast:
    """Autocasts to bfloat16 where the device multiplies in it, and does nothing elsewhere.

    A GPU does; a CPU does with AVX512-BF16 or AMX. Without them torch emulates it: forty times slower than float32.
    """
    kind = torch.device(device).type
    able = torch.cpu.get_capabilities()
    return torch.autocast(
        kind, torch.bfloat16, enabled=kind != "cpu" or bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    )
