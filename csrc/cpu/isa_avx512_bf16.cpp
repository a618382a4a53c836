// AVX-512 with vdpbf16ps (Cooper Lake, Sapphire Rapids, Zen 4 and later).
#define LK_BF16_PAIRS
#include "simd_avx512.h"
// after the vector type and its steps
#include "dot.h"
#include "elements.h"
#include "panel.h"
#include "wide.h"

namespace lk {
extern const Kernels kAvx512Bf16 = {"avx512_bf16", dot,  panel_floats, panel_block, shrinks,    shrink_rows,
                                    panel,         wide, mask,         cast,        accumulate, transpose_rows};
}
