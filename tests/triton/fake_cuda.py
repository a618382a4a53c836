"""A CUDA driver that launches nothing and remembers its last launches: Triton's real launch path, host code only, on a machine without a GPU.

`install()` builds a libcuda.so.1 of a few lines, makes it this process's driver and gives CPU tensors to the kernels. Use it in a process
of its own. Nothing is computed; what it shows is what would be launched, and what the launch costs on the host.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

SOURCE = r"""
#include "cuda.h"
#include <string.h>
#define OK(name, ...) CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
#undef cuDevicePrimaryCtxRetain
OK(cuFuncSetAttribute, CUfunction f, CUfunction_attribute a, int v)
OK(cuFuncSetCacheConfig, CUfunction f, CUfunc_cache c)
OK(cuCtxGetLimit, size_t *v, CUlimit l)
OK(cuCtxSetLimit, CUlimit l, size_t v)
OK(cuOccupancyMaxActiveClusters, int *n, CUfunction f, const CUlaunchConfig *c)
OK(cuModuleUnload, CUmodule m)
static __thread CUcontext current; // a thread begins without
CUresult cuCtxGetCurrent(CUcontext *c) { *c = current; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { current = c; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *d, int i) { *d = i; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) { *v = 232448; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = (CUmodule)1; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) { static long n; *f = (CUfunction)(++n); return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0; return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *v) { *v = 13020; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult e, const char **s) { *s = "fake"; return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)v = p; return CUDA_SUCCESS; }
static long encoded;
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *base,
    const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps, CUtensorMapInterleave i,
    CUtensorMapSwizzle s, CUtensorMapL2promotion l, CUtensorMapFloatOOBfill o) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  memset(map, 0, sizeof *map); memcpy(map, &base, sizeof base); encoded++; return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *out) { *out = CU_STREAM_CAPTURE_STATUS_NONE; return CUDA_SUCCESS; }
static long launches; static unsigned grid[3]; static CUfunction last; static CUstream on; static unsigned words[64]; static int wanted;
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **params, void **extra) {
  launches++; grid[0] = c->gridDimX; grid[1] = c->gridDimY; grid[2] = c->gridDimZ; last = f; on = c->hStream;
  for (int i = 0; i < wanted; i++) memcpy(&words[i], params[i], 4);
  return CUDA_SUCCESS;
}
long fake_launches(void) { return launches; }
long fake_encoded(void) { return encoded; }
void fake_keep(int n) { wanted = n; }
void fake_last(unsigned long *out) {
  out[0] = grid[0]; out[1] = grid[1]; out[2] = grid[2]; out[3] = (unsigned long)last; out[4] = (unsigned long)on;
  for (int i = 0; i < wanted; i++) out[5 + i] = words[i];
}
"""


class FakeDriver(CudaDriver):
    def __init__(self) -> None:
        self.utils = CudaUtils()
        self.launcher_cls = CudaLauncher
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device: (9, 0)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class FakeCuda:
    """What reached the driver."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    @property
    def launches(self) -> int:
        return self.library.fake_launches()

    @property
    def encoded(self) -> int:
        return self.library.fake_encoded()

    def keep(self, parameters: int) -> None:
        """Remember the low 4 bytes of the first so many parameters of a launch; no more than the kernel has."""
        self.library.fake_keep(parameters)

    def last(self, parameters: int) -> list[int]:
        """Grid, function, stream and the remembered parameters of the last launch."""
        out = (ctypes.c_ulong * (5 + parameters))()
        self.library.fake_last(out)
        return list(out)


def install(folder: Path) -> FakeCuda:
    """Build the library in `folder` and make it the driver of this process."""
    source, library = folder / "fake.c", folder / "libcuda.so.1"
    source.write_text(SOURCE)
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = ["gcc", "-O1", "-w", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    knobs.nvidia.libcuda_path = str(folder)
    triton.runtime.driver.set_active(FakeDriver())
    return FakeCuda(loaded)
