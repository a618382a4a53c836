// AVX-512 with vdpbf16ps and AMX's bf16 tiles (Sapphire Rapids and later).
#define LK_BF16_PAIRS
#define LK_INTEL  // how W is fetched
#include "simd_avx512.h"
// after the vector type and its steps
#include "dot.h"
#include "elements.h"
#include "tile_panel.h"
#include "wide.h"

namespace lk {
extern const Kernels kAmxBf16 = {"amx_bf16", dot,  panel_floats_tiles, panel_block_tiles, shrinks_tiles, shrink_rows_tiles, panel_tiles, wide,
                                 mask,       cast, accumulate,         transpose_rows};
}
