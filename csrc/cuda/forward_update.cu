// y = x W^T + b + h B^T with h given: the K loop goes on over (h, B).
#include "linear_launch.cuh"

namespace lk::cuda {

LinearRun forward_update(const LinearCall& c) {
  return c.element == Element::bf16 ? update_instance<__nv_bfloat16, false>(c) : update_instance<__half, false>(c);
}

}  // namespace lk::cuda
