// The CUDA runtime that csrc/cuda is linked against here: finds the PTX in the objects that nvcc made, hands launches to the emulator.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "machine.h"

namespace {

std::map<const void*, ptx::Function>& functions() {
  static std::map<const void*, ptx::Function> all;
  return all;
}

struct Wrapper {  // what the compiler registers: fatbinary.h
  int magic, version;
  const unsigned char* data;
  void* file;
};

// The text of the PTX entry: a container of a 16-byte header, then entries that say their kind (1: PTX) and sizes.
std::string ptx_of(const Wrapper& wrapper) {
  uint16_t header;
  uint64_t size;
  std::memcpy(&header, wrapper.data + 6, 2);
  std::memcpy(&size, wrapper.data + 8, 8);
  for (const unsigned char *at = wrapper.data + header, *end = at + size; at < end;) {
    uint16_t kind;
    uint32_t skip;
    uint64_t bytes;
    std::memcpy(&kind, at, 2);
    std::memcpy(&skip, at + 4, 4);
    std::memcpy(&bytes, at + 8, 8);
    if (kind == 1) return std::string(reinterpret_cast<const char*>(at + skip));
    at += skip + bytes;
  }
  return {};
}

thread_local bool bound = false;  // whether this thread has a context: with its first launch at the latest

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* dims, const cuuint64_t* strides,
                      const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if (!bound) return CUDA_ERROR_INVALID_CONTEXT;
  return cuTensorMapEncodeTiled(map, type, rank, base, dims, strides, box, steps, interleave, swizzle, promotion, fill);
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) { return reinterpret_cast<void**>(new std::string(ptx_of(*static_cast<Wrapper*>(wrapper)))); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  functions()[host] = {*reinterpret_cast<std::string*>(module), name, {}, 0};
}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }  // <<< >>> is not used
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* entry, void** arguments) {
  bound = true;
  ptx::Launch l;
  l.grid[0] = c->gridDim.x, l.grid[1] = c->gridDim.y, l.grid[2] = c->gridDim.z;
  l.block[0] = c->blockDim.x, l.block[1] = c->blockDim.y, l.block[2] = c->blockDim.z;
  l.dynamic_bytes = uint32_t(c->dynamicSmemBytes);
  for (unsigned k = 0; k < c->numAttrs; ++k) {
    if (c->attrs[k].id == cudaLaunchAttributeClusterDimension) l.cluster = c->attrs[k].val.clusterDim.x;
    if (c->attrs[k].id == cudaLaunchAttributeProgrammaticStreamSerialization) l.dependent = c->attrs[k].val.programmaticStreamSerializationAllowed;
  }
  return ptx::launch(functions().at(entry), std::move(l), arguments) ? cudaSuccess : cudaErrorLaunchFailure;
}

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return bound = true, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  *v = a == cudaDevAttrComputeCapabilityMajor ? 9 : a == cudaDevAttrMultiProcessorCount ? int(ptx::Machine::instance().multiprocessors) : 0;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaErrorNotSupported; }
cudaError_t cudaOccupancyMaxActiveClusters(int* n, const void*, const cudaLaunchConfig_t* c) {
  const unsigned cluster = c->numAttrs ? c->attrs[0].val.clusterDim.x : 1;
  return *n = std::max(1u, ptx::Machine::instance().multiprocessors / cluster), cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  *entry = reinterpret_cast<void*>(&encode_tiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorLaunchFailure"; }
const char* cudaGetErrorString(cudaError_t) { return ptx::last_error().c_str(); }
cudaError_t cudaGetLastError() { return cudaSuccess; }

}  // extern "C"
