"""Every op in plain PyTorch: the definition, the oracle in float64, and the last fallback on any device.

The rank-R tensors carry the scaling: `h = s * drop(x) A^T` and `g = s * dy B`, so that y, dx, dA and dB need no further factor:

    y  = x W^T + b + h B^T            h = s * drop(x) A^T       [M, R]
    dx = dy W + drop'(g A)            g = s * dy B              [M, R]
    dA = g^T drop(x)                  dB = dy^T h

Operands of a product are in x's dtype (rank-sized adapters are cast, x never), sums in at least float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------- dropout

_PHILOX = (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 7
NO_DROPOUT = 2.0**-17  # the largest p that drops nothing
_LOW = 0xFFFFFFFF


def drop_threshold(p: float) -> int:
    """p in 1/65536ths: an element is dropped when its 16 random bits are below this number."""
    return round(p * 65536)


def keep_scale(p: float) -> float:
    """1 / (1 - p) for the p that `drop_threshold` really applies; 0 when everything is dropped."""
    kept = 65536 - drop_threshold(p)
    return 65536 / kept if kept else 0.0


def dropout_mask(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """The packed keep mask: int32 `[M, ceil(K / 32)]`, bit `k % 32` of word `k // 32` set where element (m, k) is kept.

    A pure function of (seed, m, k, p), the same in every backend: Philox4x32-7 with key `seed` and counter (k // 8, m, 0, 0)
    gives eight 16-bit numbers; element k takes number k % 8 (low half of word 0 first) and is kept when it is >= round(65536 p).
    Bits at and past K are zero. `seed` is a 1-element int64 tensor on the device of the result.
    """
    words = -(-K // 32)
    c0 = torch.arange(words * 4, dtype=torch.int64, device=seed.device).expand(M, -1)
    c1 = torch.arange(M, dtype=torch.int64, device=seed.device).unsqueeze(1).expand(-1, words * 4)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    m0, m1, w0, w1 = _PHILOX
    for _ in range(PHILOX_ROUNDS):
        low, high = c0 * m0, c2 * m1  # int64 products wrap, which leaves the wanted 64 bits as they are
        c0, c1, c2, c3 = ((high >> 32) & _LOW) ^ c1 ^ k0, high & _LOW, ((low >> 32) & _LOW) ^ c3 ^ k1, low & _LOW
        k0, k1 = (k0 + w0) & _LOW, (k1 + w1) & _LOW
    lanes = torch.stack([part for c in (c0, c1, c2, c3) for part in (c & 0xFFFF, c >> 16)], dim=-1)
    keep = (lanes >= drop_threshold(p)).reshape(M, words * 32)
    keep[:, K:] = False
    return pack_bits(keep)


def pack_bits(keep: Tensor) -> Tensor:
    """bool `[M, 32 W]` -> int32 `[M, W]`, column 0 in bit 0."""
    bits = torch.arange(32, dtype=torch.int64, device=keep.device)
    packed = (keep.unflatten(1, (keep.shape[1] // 32, 32)).to(torch.int64) << bits).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def unpack_bits(mask: Tensor, K: int) -> Tensor:
    """int32 `[M, ceil(K / 32)]` -> bool `[M, K]`."""
    bits = torch.arange(32, dtype=torch.int32, device=mask.device)
    return ((mask.unsqueeze(-1) >> bits) & 1).flatten(1)[:, :K].bool()


def _drop(t: Tensor, mask: Tensor, p: float) -> Tensor:
    """`t [M, K]` with dropped elements zeroed and kept ones scaled, in t's dtype."""
    return torch.where(unpack_bits(mask, t.shape[1]), t * keep_scale(p), t.new_zeros(()))


# ------------------------------------------------------------------------------------------------------------ lora_linear


def _scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale * a @ b`, rounded once."""
    return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=scale)


def shrink(x: Tensor, lora_a: Tensor, mask: Tensor, scaling: float, dropout_p: float) -> Tensor:
    """h = s * drop(x) A^T."""
    return _scaled_mm(_drop(x, mask, dropout_p) if dropout_p > 0 else x, lora_a.to(x.dtype).t(), scaling)


def lora_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y = x W^T + b + h B^T with h = s * drop(x) A^T.

    x `[M, K]`, weight `[N, K]`, bias `[N]` or None, lora_a `[R, K]`, lora_b `[N, R]`, seed int64 `[1]` or None.
    Returns y `[M, N]`, h `[M, R]` in x's dtype, and the keep mask int32 `[M, ceil(K / 32)]`, empty when dropout_p is 0.
    """
    lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    mask = dropout_mask(seed, *x.shape, dropout_p) if dropout_p > 0 else x.new_empty(0, dtype=torch.int32)
    h = shrink(x, lora_a, mask, scaling, dropout_p)
    y = F.linear(x, weight, bias)
    y.addmm_(h, lora_b.t())
    return y, h, mask


def lora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    h: Tensor,
    mask: Tensor,
    scaling: float,
    dropout_p: float,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = dy W + drop'(g A), dA = g^T drop(x), dB = dy^T h with g = s * dy B.

    Shapes as in `lora_linear_fwd`; dy `[M, N]`. x is read for dA only: where that is not needed, M rows of its dtype may
    stand in its place, such as dy. Returns dx `[M, K]` in dy's dtype, dA `[R, K]` and dB `[N, R]` in the adapters' dtypes; what is not
    needed comes back as an empty tensor.
    """
    a, b = lora_a.to(dy.dtype), lora_b.to(dy.dtype)
    dx, da, db = dy.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    g = _scaled_mm(dy, b, scaling) if need_dx or need_da else None
    if need_dx:
        dx = dy @ weight
        if dropout_p > 0:
            dx += _drop(g @ a, mask, dropout_p)
        else:
            dx.addmm_(g, a)
    if need_da:
        da = (g.t() @ (_drop(x, mask, dropout_p) if dropout_p > 0 else x)).to(lora_a.dtype)
    if need_db:
        db = (dy.t() @ h).to(lora_b.dtype)
    return dx, da, db


# ------------------------------------------------------------------------------------------------------------- as a backend


def unusable() -> str | None:
    """Plain PyTorch runs wherever PyTorch runs."""
    return None


def _takes_all(*_args: object) -> str | None:
    return None


from .reference_batched import OPS as _BATCHED  # noqa: E402  it builds on the functions above

OPS = {
    "lora_linear_fwd": (lora_linear_fwd, _takes_all),
    "lora_linear_bwd": (lora_linear_bwd, _takes_all),
} | _BATCHED
