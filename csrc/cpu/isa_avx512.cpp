// AVX-512 F, BW, VL, DQ (x86-64-v4).
#define LK_INTEL  // how W is fetched; AMD has bf16 pairs wherever it has AVX-512
#include "simd_avx512.h"
// after the vector type and its steps
#include "dot.h"
#include "elements.h"
#include "panel.h"
#include "wide.h"

namespace lk {
extern const Kernels kAvx512 = {"avx512", dot, panel_floats, panel_block, shrinks, shrink_rows, panel, wide, mask, cast, accumulate, transpose_rows};
}
