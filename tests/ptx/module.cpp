// The CUDA engine's part of lora_kernels._C alone, its kernels run by the emulator.
#include <pybind11/pybind11.h>

void bind_cuda(pybind11::module_&);

PYBIND11_MODULE(_emulated, m) { bind_cuda(m); }
