// From the type at the end of an opcode to the function for it.
#pragma once
#include "machine.h"

namespace ptx {

template <template <class> class F>
Exec integers(std::string_view type) {
  if (type == "s16") return F<int16_t>::run;
  if (type == "u16" || type == "b16") return F<uint16_t>::run;
  if (type == "s32") return F<int32_t>::run;
  if (type == "u32" || type == "b32") return F<uint32_t>::run;
  if (type == "s64") return F<int64_t>::run;
  if (type == "u64" || type == "b64") return F<uint64_t>::run;
  return nullptr;
}
template <template <class> class F>
Exec numbers(std::string_view type) {
  if (type == "f32") return F<float>::run;
  if (type == "f64") return F<double>::run;
  return integers<F>(type);
}

}  // namespace ptx
