import pytest
import torch

from experiments.marionette.trainer import mixed_precision, multiplies_bfloat16


@pytest.mark.parametrize(
    ("capabilities", "able"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_processors_that_multiply_in_bfloat16(capabilities: dict[str, object], able: bool) -> None:
    assert multiplies_bfloat16(capabilities) is able


def test_bfloat16_only_where_the_processor_multiplies_in_it() -> None:
    able = multiplies_bfloat16(torch.cpu.get_capabilities())
    with mixed_precision("cpu"):
        product = torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3))
    assert product.dtype == (torch.bfloat16 if able else torch.float32)
