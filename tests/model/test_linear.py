"""Products with packed weights."""

from __future__ import annotations

import pytest
import torch

from tokabatch.model.linear import DenseLinear, PackedLinear, padded_rows

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")


def test_rows_are_filled_up_to_few_numbers():
    sizes = {rows: padded_rows(rows) for rows in range(1, 8193)}
    assert all(rows <= size <= rows * 17 / 16 for rows, size in sizes.items())
    assert len(set(sizes.values())) < 170
    assert [sizes[rows] for rows in (1, 31, 33, 64, 65, 1000)] == [1, 31, 34, 64, 68, 1024]


@needs_onednn
@pytest.mark.parametrize("rows", [0, 1, 33, 64, 200])
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_products_are_those_of_plain_weights(rows, with_bias):
    generator = torch.Generator().manual_seed(rows)
    x_TI, weight_OI = torch.randn(rows, 24, generator=generator), torch.randn(40, 24, generator=generator)
    bias_O = torch.randn(40, generator=generator) if with_bias else None
    residual_TO = torch.randn(rows, 40, generator=generator)
    packed, dense = PackedLinear(weight_OI, bias_O), DenseLinear(weight_OI, bias_O)
    torch.testing.assert_close(packed(x_TI), dense(x_TI))
    torch.testing.assert_close(packed.add_to(residual_TO.clone(), x_TI), dense.add_to(residual_TO.clone(), x_TI))
    torch.testing.assert_close(packed.into(torch.empty(rows, 40), x_TI), dense(x_TI))
