"""Device functions that every value of their arguments can be tried on."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from lora_kernels.kernels._jit import kept_halves


@triton.jit
def halves_kernel(words_ptr, out_ptr, threshold, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out_ptr + i, kept_halves(tl.load(words_ptr + i).to(tl.uint32, bitcast=True), threshold).to(tl.int32, bitcast=True))


@pytest.mark.parametrize("threshold", [0, 1, 3277, 0x7FFF, 0x8000, 0x8001, 50000, 0xFFFF, 0x10000])
def test_kept_halves_of_every_value(threshold):
    half = torch.arange(1 << 16)
    other = half * 40503 % (1 << 16)  # beside each other in every order
    words = (half | other << 16).to(torch.int32)
    out = torch.empty_like(words)
    halves_kernel[(1,)](words, out, threshold, n=1 << 16)
    assert torch.equal(out >> 15 & 1 != 0, half >= threshold)
    assert torch.equal(out >> 31 & 1 != 0, other >= threshold)
    assert not (out & ~torch.tensor(0x80008000 - (1 << 32), dtype=torch.int32)).any()
