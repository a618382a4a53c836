// AVX2, FMA, F16C (x86-64-v3).
#include "simd_avx2.h"
// after the vector type and its steps
#include "dot.h"
#include "elements.h"
#include "panel.h"
#include "wide.h"

namespace lk {
extern const Kernels kAvx2 = {"avx2", dot, panel_floats, panel_block, shrinks, shrink_rows, panel, wide, mask, cast, accumulate, transpose_rows};
}
