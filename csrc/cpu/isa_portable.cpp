// Any CPU.
#include "simd_portable.h"
// after the vector type and its steps
#include "dot.h"
#include "elements.h"
#include "panel.h"
#include "wide.h"

namespace lk {
extern const Kernels kPortable = {"portable", dot,  panel_floats, panel_block, shrinks,    shrink_rows,
                                  panel,      wide, mask,         cast,        accumulate, transpose_rows};
}
