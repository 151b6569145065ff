import pytest
import torch
import torch.nn.functional as F

from lilpipe.model.gradients import rms_norm
from lilpipe.model.rope import apply_rope, rope_table


def angles(num_tokens, size, dtype):
    cos, sin = (table.to(dtype) for table in rope_table(num_tokens, size, 10_000.0))
    return cos[None, :, None], sin[None, :, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 8), (5, 8)])
def test_the_norm_is_torchs_bit_for_bit_and_its_gradient_to_rounding(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=dtype, generator=generator, requires_grad=True)
    weight = torch.randn(8, dtype=dtype, generator=generator, requires_grad=True)
    expected = F.rms_norm(x, (8,), weight, 1e-5)
    found = rms_norm(x, weight, 1e-5)
    assert torch.equal(found, expected)
    grad = torch.randn(shape, dtype=dtype, generator=generator)
    wanted = torch.autograd.grad(expected, [x, weight], grad)
    torch.testing.assert_close(torch.autograd.grad(found, [x, weight], grad), wanted)


def test_gradients_are_those_of_finite_differences_also_where_memory_is_not_contiguous():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 2, dtype=torch.float64, generator=generator).transpose(1, 2).requires_grad_()
    weight = torch.randn(6, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-5).transpose(0, 1), (x, weight))
    heads = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=generator).transpose(1, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, *angles(5, 4, torch.float64)), heads)


def test_rotation_is_the_same_bits_with_and_without_a_gradient():
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    plain = apply_rope(x, *angles(5, 4, x.dtype))
    assert torch.equal(apply_rope(x.requires_grad_(), *angles(5, 4, x.dtype)), plain)
