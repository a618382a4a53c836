// A CUDA driver whose device is the emulator: modules are PTX, addresses are the host's, a launch has run (or waits for the next) when it returns.
#include <cuda.h>

#include "machine.h"
#include "tensor.h"

namespace ptx {

std::string& last_error() {
  static std::string text = "no error";
  return text;
}

// A fault that a test plants: this text of every module is replaced before it is parsed.
struct Plant {
  std::string from, to;
  uint64_t number = 0;
  int replaced = 0;
} planted;

std::string with_fault(std::string text) {
  if (planted.from.empty()) return text;
  for (size_t at = 0; (at = text.find(planted.from, at)) != std::string::npos; at += planted.to.size(), ++planted.replaced)
    text.replace(at, planted.from.size(), planted.to);
  return text;
}

bool launch(Function& f, Launch l, void** arguments) {
  try {
    if (!f.kernel || f.fault != planted.number) {
      f.kernel = parse(with_fault(f.module), f.name);
      f.fault = planted.number;
    }
    l.kernel = f.kernel;
    l.params.resize(f.kernel->param_bytes + 128);
    for (size_t k = 0; k < f.kernel->params.size(); ++k)
      std::memcpy(l.params.data() + f.kernel->params[k].offset, arguments[k], f.kernel->params[k].bytes);
    Machine::instance().launch(std::move(l));
    return true;
  } catch (const std::exception& e) {
    last_error() = e.what();
    return false;
  }
}

}  // namespace ptx

using ptx::Machine;

extern "C" {

// ---- what tests ask of the emulator ----

void emulator_reset(uint64_t seed, uint32_t multiprocessors, uint64_t steps) {
  Machine& m = Machine::instance();
  m.random.seed(seed);
  m.multiprocessors = multiprocessors;
  m.step_limit = steps;
}
void emulator_plant(const char* from, const char* to) {  // "": none any more
  ptx::planted = {from, to, ptx::planted.number + 1, 0};
}
int emulator_replaced() { return ptx::planted.replaced; }
int emulator_synchronize() {
  try {
    Machine::instance().synchronize();
    return 0;
  } catch (const std::exception& e) {
    ptx::last_error() = e.what();
    return 1;
  }
}
const char* emulator_error() { return ptx::last_error().c_str(); }
uint64_t emulator_instructions() { return Machine::instance().clock; }

// ---- the driver's interface, as far as Triton and csrc/cuda use it ----

#undef cuDevicePrimaryCtxRetain
CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice) { return *c = reinterpret_cast<CUcontext>(1), CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* v, CUlimit) { return *v = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) { return *n = 1, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* c) { return *c = reinterpret_cast<CUcontext>(1), CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* d) { return *d = 0, CUDA_SUCCESS; }
// Below 13.2 Triton changes a bit of the encoded map.
CUresult cuDriverGetVersion(int* v) { return *v = 13020, CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* s) { return *s = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* d, int i) { return *d = i, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice) {
  *v = a == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? int(Machine::instance().multiprocessors) : a == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32 : 232448;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* m, const void* image) {
  *m = reinterpret_cast<CUmodule>(new std::string(static_cast<const char*>(image)));
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* f, CUmodule m, const char* name) {
  *f = reinterpret_cast<CUfunction>(new ptx::Function{*reinterpret_cast<const std::string*>(m), name, {}, 0});
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction) {
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** s) { return *s = emulator_error(), CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void* v, CUpointer_attribute, CUdeviceptr p) { return *static_cast<CUdeviceptr*>(v) = p, CUDA_SUCCESS; }

// Refuses what the driver's documentation says it refuses.
CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* dims,
                                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  ptx::TensorMap map{};
  map.magic = ptx::TensorMap::kMagic;
  map.rank = uint8_t(rank);
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      map.element = 1;
      break;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      map.element = 2;
      break;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      map.element = 4;
      break;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
  map.swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE   ? 0
                : swizzle == CU_TENSOR_MAP_SWIZZLE_32B  ? 32
                : swizzle == CU_TENSOR_MAP_SWIZZLE_64B  ? 64
                : swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128
                                                        : -1;
  map.base = reinterpret_cast<uint64_t>(base);
  if (rank < 1 || rank > 5 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || map.swizzle < 0 || map.base % 16 || map.base == 0)
    return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t d = 0; d < rank; ++d) {
    if (dims[d] < 1 || dims[d] > uint64_t(1) << 32 || box[d] < 1 || box[d] > 256 || steps[d] != 1) return CUDA_ERROR_INVALID_VALUE;
    map.size[d] = dims[d], map.box[d] = uint16_t(box[d]);
    if (d + 1 == rank) continue;
    if (strides[d] % 16 || strides[d] >= uint64_t(1) << 40) return CUDA_ERROR_INVALID_VALUE;
    map.stride[d] = strides[d];
  }
  const uint32_t inner = box[0] * map.element;
  if (inner % 16 || (map.swizzle && inner > uint32_t(map.swizzle))) return CUDA_ERROR_INVALID_VALUE;
  std::memset(out, 0, sizeof *out);
  std::memcpy(out, &map, sizeof map);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** arguments, void**) {
  ptx::Launch l;
  l.grid[0] = c->gridDimX, l.grid[1] = c->gridDimY, l.grid[2] = c->gridDimZ;
  l.block[0] = c->blockDimX, l.block[1] = c->blockDimY, l.block[2] = c->blockDimZ;
  l.dynamic_bytes = c->sharedMemBytes;
  for (unsigned k = 0; k < c->numAttrs; ++k) {
    if (c->attrs[k].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) l.cluster = c->attrs[k].value.clusterDim.x;
    if (c->attrs[k].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      l.dependent = c->attrs[k].value.programmaticStreamSerializationAllowed;
  }
  return ptx::launch(*reinterpret_cast<ptx::Function*>(f), std::move(l), arguments) ? CUDA_SUCCESS : CUDA_ERROR_LAUNCH_FAILED;
}

}  // extern "C"
