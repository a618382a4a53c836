// Host side shared by the launchers: tensor maps, checks, errors, launch.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <type_traits>

#include "api.h"

namespace lk::cuda {

enum class MapSwizzle { b32, b64, b128 };

// A call's name for error messages, e.g. "linear<bf16, 128x256, forward, column-0 R<=16> M=8192 N=4096 K=4096 R=16".
[[noreturn]] void fail(const std::string& call, const std::string& what, cudaError_t error = cudaSuccess);

// Rows of `rows` x `cols` 16-bit elements, in boxes of box_rows x box_cols; what a box takes outside reads as zero and is not written.
CUtensorMap tensor_map(const std::string& call, const char* name, Element element, const Matrix& m, int64_t rows, int64_t cols, int box_rows,
                       int box_cols, MapSwizzle swizzle = MapSwizzle::b128);

// Throws unless the current device has compute capability 9.0; returns its number of SMs. Binds its context to the thread, which tensor_map needs.
int sm90_multiprocessors(const std::string& call);

// One entry of the table of kernels: made at load time, so that it is listed without a driver.
struct Registered {
  Registered(std::string name, int shared_bytes, const void* entry);
};

// Raises the kernel's dynamic shared memory limit once per device.
void allow_shared_memory(const std::string& call, const void* entry, int bytes, std::atomic<uint64_t>& done);

struct Launch {
  int grid, threads, shared_bytes, cluster;
  bool dependent;
  void* stream;
};

// Clusters of this launch that the device holds at a time, at most `most`: fewer than SMs / cluster where a GPC has an odd number of SMs.
int resident_clusters(const void* entry, const Launch& l, int most);

template <class... Params>
void launch(const std::string& call, void (*kernel)(Params...), const Launch& l, const Params&... params) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(l.grid);
  config.blockDim = dim3(l.threads);
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = static_cast<cudaStream_t>(l.stream);
  cudaLaunchAttribute attributes[2];
  if (l.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {unsigned(l.cluster), 1, 1};
    ++config.numAttrs;
  }
  if (l.dependent) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  config.attrs = attributes;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params...);
  if (error != cudaSuccess) fail(call, "launch failed", error);
}

const char* name_of(Element element);

}  // namespace lk::cuda
