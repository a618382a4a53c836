// y = x W^T + b + h B^T in one launch: the tiles of column 0 also make h = s x A^T, from the x tile in shared memory.
#include "linear_launch.cuh"

namespace lk::cuda {

LinearRun forward_column0(const LinearCall& c) {
  return c.element == Element::bf16 ? column0_instance<__nv_bfloat16, false>(c) : column0_instance<__half, false>(c);
}

}  // namespace lk::cuda
