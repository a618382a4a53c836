"""Single instructions against what the PTX ISA says of them, on kernels written here."""

from __future__ import annotations

import ctypes
import struct

import emulator
import pytest
import torch

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 in, .param .u64 out)
{
  .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<32>; .reg .b64 %a<9>; .reg .f32 %f<9>;
  ld.param.u64 %a0, [in];
  ld.param.u64 %a1, [out];
  mov.u32 %r0, %tid.x;
  mul.wide.u32 %a2, %r0, 4;
  add.s64 %a0, %a0, %a2;
  add.s64 %a1, %a1, %a2;
  ld.global.b32 %r1, [%a0];
"""
TAIL = """
  st.global.b32 [%a1], %r2;
  ret;
}
"""


def run(body: str, values: list[int]) -> list[int]:
    """%r2 of every thread after `body`, %r1 its value and %r0 its number."""
    driver = emulator.library()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    driver.cuModuleLoadData(ctypes.byref(module), (HEAD + body + TAIL).encode())
    driver.cuModuleGetFunction(ctypes.byref(function), module, b"kernel")
    given = torch.tensor([v - (v >> 31 << 32) for v in values], dtype=torch.int32)
    out = torch.zeros_like(given)
    pointers = (ctypes.c_uint64 * 2)(given.data_ptr(), out.data_ptr())
    arguments = (ctypes.c_void_p * 2)(ctypes.addressof(pointers), ctypes.addressof(pointers) + 8)
    config = struct.pack("7I4xQQI4x", 1, 1, 1, len(values), 1, 1, 0, 0, 0, 0)  # CUlaunchConfig: grid, block, shared memory, stream, attributes
    assert driver.cuLaunchKernelEx(config, function, arguments, None) == 0, driver.emulator_error().decode()
    emulator.synchronize()
    return [v & 0xFFFFFFFF for v in out.tolist()]


WORDS = [0, 1, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xDEADBEEF, 0x7FFFFFFF, 0xFF00]
SIGNED = lambda v: v - (v >> 31 << 32)
ONE = {
    "bfe.u32 %r2, %r1, 4, 8;": lambda v: v >> 4 & 255,
    "bfe.s32 %r2, %r1, 4, 8;": lambda v: (v >> 4 & 255) - (v >> 11 & 1) * 256 & 0xFFFFFFFF,
    "bfi.b32 %r2, %r1, 0, 8, 16;": lambda v: (v & 0xFFFF) << 8,
    "prmt.b32 %r2, %r1, 0x44332211, 0x7410;": lambda v: 0x44110000 | v & 0xFFFF,
    "popc.b32 %r2, %r1;": lambda v: v.bit_count(),
    "clz.b32 %r2, %r1;": lambda v: 32 - v.bit_length(),
    "mul.hi.u32 %r2, %r1, 0xD2511F53;": lambda v: v * 0xD2511F53 >> 32,
    "shr.s32 %r2, %r1, 40;": lambda v: (v >> 31) * 0xFFFFFFFF,
    "shl.b32 %r2, %r1, 32;": lambda v: 0,
    "lop3.b32 %r2, %r1, 0xFF00FF00, 0x0F0F0F0F, 0x96;": lambda v: v ^ 0xFF00FF00 ^ 0x0F0F0F0F,
    "min.s32 %r2, %r1, 5;": lambda v: min(SIGNED(v), 5) & 0xFFFFFFFF,
    "setp.lt.u32 %p1, %r1, 256; selp.b32 %r2, 7, 9, %p1;": lambda v: 7 if v < 256 else 9,
    "mad.wide.s32 %a3, %r1, 4, %a1; sub.s64 %a3, %a3, %a1; cvt.u32.u64 %r2, %a3;": lambda v: v * 4 & 0xFFFFFFFF,
    "@%p0 bra SKIP; mov.b32 {%h1, %h2}, %r1; mov.b32 %r2, {%h2, %h1}; SKIP:": lambda v: v >> 16 | (v & 0xFFFF) << 16,
}


@pytest.mark.parametrize("body", ONE)
def test_of_one_thread(body):
    values = WORDS * 4
    assert run(body, values) == [ONE[body](v) for v in values]


WARP = {
    "shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;": lambda v, lane: v[lane ^ 1],
    "shfl.sync.idx.b32 %r2, %r1, 3, 31, -1;": lambda v, lane: v[3],
    "shfl.sync.up.b32 %r2, %r1, 2, 0, -1;": lambda v, lane: v[lane - 2 if lane >= 2 else lane],
    "setp.gt.u32 %p1, %r1, 5; vote.sync.ballot.b32 %r2, %p1, -1;": lambda v, lane: sum((x > 5) << i for i, x in enumerate(v)),
    "redux.sync.add.s32 %r2, %r1, -1;": lambda v, lane: sum(v) & 0xFFFFFFFF,
    "elect.sync _|%p1, -1; selp.b32 %r2, 1, 0, %p1;": lambda v, lane: int(lane == 0),
}


@pytest.mark.parametrize("body", WARP)
def test_of_a_warp(body):
    values = [(lane * 2654435761) % 11 for lane in range(32)]
    assert run(body, values) == [WARP[body](values, lane) for lane in range(32)]


@pytest.mark.parametrize("dtype, name", [(torch.float16, "f16"), (torch.bfloat16, "bf16")], ids=["fp16", "bf16"])
def test_rounding_is_pytorchs(dtype, name):
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1024,), generator=g, dtype=torch.int32)
    floats = torch.cat(
        [bits.view(torch.float32), torch.randn(900, generator=g), torch.tensor([0.0, -0.0, 65519.9, 65520.0, 2.0**-25, 2.0**-24 * 1.5, 1e-45])]
    )
    floats = floats[~floats.isnan()][:1024]
    got = run(
        f"mov.b32 %f1, %r1; cvt.rn.{name}.f32 %h1, %f1; cvt.f32.{name} %f2, %h1; mov.b32 %r2, %f2;",
        [v & 0xFFFFFFFF for v in floats.view(torch.int32).tolist()],
    )
    assert got == [v & 0xFFFFFFFF for v in floats.to(dtype).float().view(torch.int32).tolist()]


@pytest.mark.parametrize(("operands", "kept"), [("4", 4), ("4, 2", 2), ("4, %a4", 4), ("4, 2, %a4", 2), ("4, 0, %a4", 0)])
def test_partial_copies_fill_with_zeros(operands: str, kept: int) -> None:
    """cp.async of fewer bytes than its size, with and without a cache policy, which stands behind them."""
    hint = ".L2::cache_hint" if "%a4" in operands else ""
    body = f"""
      .shared .align 16 .b8 place[64];
      createpolicy.fractional.L2::evict_first.b64 %a4, 1.0;
      mov.u32 %r3, place;
      mad.lo.u32 %r3, %r0, 4, %r3;
      cp.async.ca.shared.global{hint} [%r3], [%a0], {operands};
      cp.async.commit_group;
      cp.async.wait_group 0;
      ld.shared.b32 %r2, [%r3];
    """
    assert run(body, WORDS) == [v & (1 << 8 * kept) - 1 for v in WORDS]
