#include "host.h"

#include <map>
#include <mutex>
#include <utility>

namespace lk::cuda {

void fail(const std::string& call, const std::string& what, cudaError_t error) {
  std::string text = call + ": " + what;
  if (error != cudaSuccess) {
    text += std::string("; CUDA error ") + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")";
    cudaGetLastError();  // a launch error that is not sticky must not surface in someone else's call
  }
  throw CudaError(text);
}

const char* name_of(Element element) { return element == Element::bf16 ? "bf16" : "fp16"; }

namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                            const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's own function, found through the runtime, so that the module loads where there is no driver.
Encode encoder(const std::string& call) {
  static std::atomic<Encode> found{nullptr};
  if (Encode f = found.load()) return f;
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess) fail(call, "no CUDA driver to ask for cuTensorMapEncodeTiled", error);
  if (result != cudaDriverEntryPointSuccess || entry == nullptr)
    fail(call, "the CUDA driver has no cuTensorMapEncodeTiled; fix: a driver for CUDA 12.0 or newer");
  found = reinterpret_cast<Encode>(entry);
  return found;
}

}  // namespace

CUtensorMap tensor_map(const std::string& call, const char* name, Element element, const Matrix& m, int64_t rows, int64_t cols, int box_rows,
                       int box_cols, MapSwizzle swizzle) {
  if (reinterpret_cast<uintptr_t>(m.data) % 16 != 0 || m.data == nullptr) fail(call, std::string(name) + " is not 16-byte aligned");
  if (m.pitch % 8 != 0 || m.pitch < cols)
    fail(call, std::string(name) + " has a row pitch of " + std::to_string(m.pitch) + " elements; allowed: multiples of 8, at least its columns");
  const cuuint64_t dims[2] = {cuuint64_t(cols), cuuint64_t(rows)}, strides[1] = {cuuint64_t(m.pitch) * 2};
  const cuuint32_t box[2] = {cuuint32_t(box_cols), cuuint32_t(box_rows)}, steps[2] = {1, 1};
  const CUtensorMapSwizzle modes[] = {CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  CUtensorMap map;
  const CUresult result = encoder(call)(&map, element == Element::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                                        const_cast<void*>(m.data), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, modes[int(swizzle)],
                                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    fail(call, "cuTensorMapEncodeTiled refused " + std::string(name) + " [" + std::to_string(rows) + ", " + std::to_string(cols) + "] pitch " +
                   std::to_string(m.pitch) + " box " + std::to_string(box_rows) + "x" + std::to_string(box_cols) + ", CUresult " +
                   std::to_string(int(result)));
  }
  return map;
}

int sm90_multiprocessors(const std::string& call) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0, major = 0, minor = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) fail(call, "no current CUDA device", error);
  // Binds the context to this thread, for cuTensorMapEncodeTiled: a thread of autograd's has none before its first launch.
  if ((error = cudaSetDevice(device)) != cudaSuccess) fail(call, "the device's context cannot be had", error);
  if (device < kDevices && known[device] > 0) return known[device];
  if ((error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) != cudaSuccess ||
      (error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) != cudaSuccess ||
      (error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) != cudaSuccess)
    fail(call, "the device's attributes cannot be read", error);
  if (major != 9 || minor != 0)
    fail(call, "compiled for sm_90a (H100, H200); the device has compute capability " + std::to_string(major) + "." + std::to_string(minor));
  if (device < kDevices) known[device] = count;
  return count;
}

void allow_shared_memory(const std::string& call, const void* entry, int bytes, std::atomic<uint64_t>& done) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || (device < 64 && done.load() >> device & 1)) return;
  const cudaError_t error = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) fail(call, "cannot have " + std::to_string(bytes) + " bytes of shared memory", error);
  if (device < 64) done |= uint64_t(1) << device;
}

int resident_clusters(const void* entry, const Launch& l, int most) {
  if (l.cluster == 1) return most;
  static std::mutex guard;
  static std::map<std::pair<const void*, int>, int> known;  // by kernel and device
  int device = 0;
  cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(guard);
  int& count = known[{entry, device}];
  if (count == 0) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(most * l.cluster);
    config.blockDim = dim3(l.threads);
    config.dynamicSmemBytes = l.shared_bytes;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(l.cluster), 1, 1};
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&count, entry, &config) != cudaSuccess || count < 1) {
      cudaGetLastError();
      count = most;
    }
  }
  return std::min(count, most);
}

namespace {
std::vector<KernelInfo>& table() {
  static std::vector<KernelInfo> t;
  return t;
}
}  // namespace

Registered::Registered(std::string name, int shared_bytes, const void* entry) { table().push_back({std::move(name), shared_bytes, entry}); }

const std::vector<KernelInfo>& kernels() { return table(); }

}  // namespace lk::cuda
