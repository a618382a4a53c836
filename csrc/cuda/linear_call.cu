// Picks the instance for a LinearCall, after checking what the kernels assume.
#include "linear_launch.cuh"

namespace lk::cuda {

int linear_sync_ints(int M) { return 1 + 2 * (ceil_div(M, kTileM) + 1); }  // one row more: a cluster of 2 rounds the rows up

void linear(const LinearCall& c, void* stream) {
  const std::string call = std::string("linear<") + name_of(c.element) + ", " + (c.backward ? "dx" : "forward") + (c.column0 ? ", column-0" : "") +
                           (c.masked ? ", masked" : "") + ", tile=" + std::to_string(c.block_m) + "x" + std::to_string(c.block_n) +
                           ", cluster=" + std::to_string(c.cluster) + "> M=" + std::to_string(c.M) + " N=" + std::to_string(c.N) +
                           " K=" + std::to_string(c.K) + " R=" + std::to_string(c.R);
  if (c.M < 1 || c.N < 8 || c.K < 8 || c.R < 0 || c.R > 256 || c.N % 8 || c.K % 8 || c.R % 8)
    fail(call, "allowed: M >= 1; N, K, R multiples of 8; R to 256");
  if (c.cluster != 1 && c.cluster != 2) fail(call, "allowed: clusters of 1 and 2");
  if (c.group_m < 1) fail(call, "allowed: group_m >= 1");
  if (c.column0 && (c.R < 8 || c.masked || c.dependent || c.sync == nullptr || c.h == nullptr))
    fail(call, "column-0 form needs R >= 8, h and sync, takes no mask and waits for no earlier launch");
  if (c.masked && (!c.backward || c.mask == nullptr || c.R < 8)) fail(call, "a mask is for dx, with R >= 8");
  if (reinterpret_cast<uintptr_t>(c.bias) % 4) fail(call, "bias is not 4-byte aligned");
  const LinearRun run = c.column0 ? (c.backward ? dx_column0(c) : forward_column0(c)) : (c.backward ? dx_update(c) : forward_update(c));
  if (run == nullptr)
    fail(call, "no such kernel; allowed: tiles 128x256, 128x192, 128x128, 256x128; column-0 form and mask with 128x256; column-0 form to R = 64");
  run(c, stream);
}

}  // namespace lk::cuda
