// dx = dy W + drop'(g A) with g given: W and A are MN-major operands; masked instances put the rank product first.
#include "linear_launch.cuh"

namespace lk::cuda {

LinearRun dx_update(const LinearCall& c) {
  if (c.masked && (c.block_m != 128 || c.block_n != 256)) return nullptr;
  if (c.masked) return c.element == Element::bf16 ? instance<__nv_bfloat16, 128, 256, true, 0, true>() : instance<__half, 128, 256, true, 0, true>();
  return c.element == Element::bf16 ? update_instance<__nv_bfloat16, true>(c) : update_instance<__half, true>(c);
}

}  // namespace lk::cuda
