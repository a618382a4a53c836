// Arithmetic on integers, floats and bits.
#include <algorithm>
#include <bit>
#include <cmath>

#include "types.h"

namespace ptx {
namespace {

template <auto F, class T>
Step unary(Machine&, Thread& t, const Instruction& i) {
  t.set(i.args[0], F(t.get<T>(i.args[1])));
  return Step::next;
}
template <auto F, class T>
Step binary(Machine&, Thread& t, const Instruction& i) {
  t.set(i.args[0], T(F(t.get<T>(i.args[1]), t.get<T>(i.args[2]))));
  return Step::next;
}
template <auto F>
struct Unary {
  template <class T>
  struct With {
    static constexpr Exec run = unary<F, T>;
  };
};
template <auto F>
struct Binary {
  template <class T>
  struct With {
    static constexpr Exec run = binary<F, T>;
  };
};

template <class T>
struct Divide {  // and rem, as `shape` says
  static Step run(Machine&, Thread& t, const Instruction& i) {
    const T a = t.get<T>(i.args[1]), b = t.get<T>(i.args[2]);
    if constexpr (std::is_integral_v<T>) {
      if (b == 0) throw Error("division by zero: " + place(t));
      t.set(i.args[0], T(i.shape == '%' ? a % b : a / b));
    } else {
      t.set(i.args[0], a / b);
    }
    return Step::next;
  }
};

template <class T>
struct Shl {
  static Step run(Machine&, Thread& t, const Instruction& i) {
    const uint32_t by = t.get<uint32_t>(i.args[2]);
    t.set(i.args[0], by >= 8 * sizeof(T) ? T(0) : T(t.get<T>(i.args[1]) << by));
    return Step::next;
  }
};
template <class T>
struct Shr {
  static Step run(Machine&, Thread& t, const Instruction& i) {
    const uint32_t by = std::min<uint32_t>(t.get<uint32_t>(i.args[2]), 8 * sizeof(T));
    const T v = t.get<T>(i.args[1]);
    t.set(i.args[0], by < 8 * sizeof(T) ? T(v >> by) : v < 0 ? T(-1) : T(0));
    return Step::next;
  }
};

template <class T>
struct MulHi {
  static Step run(Machine&, Thread& t, const Instruction& i) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    t.set(i.args[0], T((Wide(t.get<T>(i.args[1])) * Wide(t.get<T>(i.args[2]))) >> (8 * sizeof(T))));
    return Step::next;
  }
};
template <class T>
struct MulWide {  // and mad.wide
  static Step run(Machine&, Thread& t, const Instruction& i) {
    using Wide = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                                    std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
    Wide v = Wide(t.get<T>(i.args[1])) * Wide(t.get<T>(i.args[2]));
    if (i.args.size() > 3) v += t.get<Wide>(i.args[3]);
    t.set(i.args[0], v);
    return Step::next;
  }
};
template <class T>
struct Mad {
  static Step run(Machine&, Thread& t, const Instruction& i) {
    t.set(i.args[0], T(t.get<T>(i.args[1]) * t.get<T>(i.args[2]) + t.get<T>(i.args[3])));
    return Step::next;
  }
};
template <class T>
Step fma(Machine&, Thread& t, const Instruction& i) {
  t.set(i.args[0], std::fma(t.get<T>(i.args[1]), t.get<T>(i.args[2]), t.get<T>(i.args[3])));
  return Step::next;
}

template <class T>
struct Bfe {
  static Step run(Machine&, Thread& t, const Instruction& i) {
    const uint32_t from = t.get<uint32_t>(i.args[2]) & 255, length = t.get<uint32_t>(i.args[3]) & 255;
    const T v = t.get<T>(i.args[1]);
    T out = 0;
    if (length && from < 8 * sizeof(T)) {
      const uint32_t up = 8 * sizeof(T) - std::min<uint32_t>(8 * sizeof(T), from + length);
      out = T(T(v << up) >> (up + from));
    }
    t.set(i.args[0], out);
    return Step::next;
  }
};
template <class T>
struct Bfi {
  static Step run(Machine&, Thread& t, const Instruction& i) {
    const uint32_t from = t.get<uint32_t>(i.args[3]) & 255, length = t.get<uint32_t>(i.args[4]) & 255;
    const T mask = from >= 8 * sizeof(T) ? T(0) : T((length >= 8 * sizeof(T) ? T(~T(0)) : T((T(1) << length) - 1)) << from);
    t.set(i.args[0], T((t.get<T>(i.args[2]) & ~mask) | ((t.get<T>(i.args[1]) << (from & 63)) & mask)));
    return Step::next;
  }
};

Step lop3(Machine&, Thread& t, const Instruction& i) {
  const uint32_t a = t.get<uint32_t>(i.args[1]), b = t.get<uint32_t>(i.args[2]), c = t.get<uint32_t>(i.args[3]), table = t.get<uint32_t>(i.args[4]);
  uint32_t out = 0;
  for (int k = 0; k < 8; ++k)
    if (table >> k & 1) out |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  t.set(i.args[0], out);
  return Step::next;
}

Step prmt(Machine&, Thread& t, const Instruction& i) {
  const uint64_t v = t.get<uint32_t>(i.args[1]) | uint64_t(t.get<uint32_t>(i.args[2])) << 32;
  const uint32_t select = t.get<uint32_t>(i.args[3]);
  uint32_t out = 0;
  for (int k = 0; k < 4; ++k) {
    uint32_t byte = v >> (select >> (4 * k) & 7) * 8 & 255;
    if (select >> (4 * k) & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << (8 * k);
  }
  t.set(i.args[0], out);
  return Step::next;
}

constexpr auto smaller = [](auto a, auto b) { return a != a ? b : b != b ? a : std::min(a, b); };  // a NaN loses
constexpr auto larger = [](auto a, auto b) { return a != a ? b : b != b ? a : std::max(a, b); };
constexpr auto popc = [](auto a) { return uint32_t(std::popcount(a)); };
constexpr auto clz = [](auto a) { return uint32_t(std::countl_zero(a)); };

}  // namespace

Exec arithmetic(const Opcode& op, Instruction& i) {
  const auto base = op.base(), type = op.type();
  i.bytes = bytes_of(type);
  if (type == "pred") return nullptr;
  if (base == "add") return numbers<Binary<[](auto a, auto b) { return a + b; }>::With>(type);
  if (base == "sub") return numbers<Binary<[](auto a, auto b) { return a - b; }>::With>(type);
  if (base == "mul" && op.has("wide")) return integers<MulWide>(type);
  if (base == "mul" && op.has("hi")) return integers<MulHi>(type);
  if (base == "mul") return numbers<Binary<[](auto a, auto b) { return a * b; }>::With>(type);
  if (base == "mad") return op.has("wide") ? integers<MulWide>(type) : op.has("lo") ? integers<Mad>(type) : nullptr;
  if (base == "fma") return type == "f32" ? fma<float> : type == "f64" ? fma<double> : nullptr;
  if (base == "div" || base == "rem") return i.shape = base == "rem" ? '%' : '/', numbers<Divide>(type);
  if (base == "min") return numbers<Binary<smaller>::With>(type);
  if (base == "max") return numbers<Binary<larger>::With>(type);
  if (base == "neg") return numbers<Unary<[](auto a) { return decltype(a)(-a); }>::With>(type);
  if (base == "abs") return numbers<Unary<[](auto a) { return a < 0 ? decltype(a)(-a) : a; }>::With>(type);
  if (base == "and") return integers<Binary<[](auto a, auto b) { return a & b; }>::With>(type);
  if (base == "or") return integers<Binary<[](auto a, auto b) { return a | b; }>::With>(type);
  if (base == "xor") return integers<Binary<[](auto a, auto b) { return a ^ b; }>::With>(type);
  if (base == "not") return integers<Unary<[](auto a) { return decltype(a)(~a); }>::With>(type);
  if (base == "shl") return integers<Shl>(type);
  if (base == "shr") return integers<Shr>(type);
  if (base == "bfe") return integers<Bfe>(type);
  if (base == "bfi") return i.bytes == 8 ? Bfi<uint64_t>::run : Bfi<uint32_t>::run;
  if (base == "popc") return i.bytes == 8 ? unary<popc, uint64_t> : unary<popc, uint32_t>;
  if (base == "clz") return i.bytes == 8 ? unary<clz, uint64_t> : unary<clz, uint32_t>;
  if (base == "lop3") return lop3;
  if (base == "prmt") return prmt;
  return nullptr;
}

}  // namespace ptx
