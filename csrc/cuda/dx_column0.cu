// dx = dy W + g A in one launch: the tiles of column 0 also make g = s dy B, from the dy tile in shared memory.
#include "linear_launch.cuh"

namespace lk::cuda {

LinearRun dx_column0(const LinearCall& c) {
  return c.element == Element::bf16 ? column0_instance<__nv_bfloat16, true>(c) : column0_instance<__half, true>(c);
}

}  // namespace lk::cuda
