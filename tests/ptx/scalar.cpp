// Moves, conversions, comparisons, branches: the rest of what one thread does with its own registers.
#include <algorithm>
#include <cmath>

#include "float16.h"
#include "types.h"

namespace ptx {
namespace {

Step predicate_logic(Machine&, Thread& t, const Instruction& i) {
  const bool a = t.predicate(i.args[1]), b = i.args.size() > 2 && t.predicate(i.args[2]);
  t.set<uint64_t>(i.args[0], i.shape == '&' ? a && b : i.shape == '|' ? a || b : i.shape == '^' ? a != b : i.shape == '!' ? !a : a);
  return Step::next;
}

// setp.cmp[.bool].type p[|q], a, b [, c]
template <class T>
struct Setp {
  static Step run(Machine&, Thread& t, const Instruction& i) {
    const T a = t.get<T>(i.at(1)), b = t.get<T>(i.at(2));
    bool v = false;
    const bool unordered = a != a || b != b;
    switch (i.shape) {
      case 0:
        v = a == b;
        break;
      case 1:
        v = !unordered && a != b;
        break;
      case 2:
        v = a < b;
        break;
      case 3:
        v = a <= b;
        break;
      case 4:
        v = a > b;
        break;
      case 5:
        v = a >= b;
        break;
      case 6:
        v = unordered || a != b;
        break;  // neu
      case 7:
        v = unordered;
        break;  // nan
      case 8:
        v = unordered || a == b;
        break;
      case 9:
        v = unordered || a < b;
        break;
      case 10:
        v = unordered || a <= b;
        break;
      case 11:
        v = unordered || a > b;
        break;
      case 12:
        v = unordered || a >= b;
        break;
    }
    bool w = !v;
    if (i.first.size() > 3) {
      const bool c = t.predicate(i.at(3));
      const auto join = [&](bool x) { return i.flags == '&' ? x && c : i.flags == '|' ? x || c : x != c; };
      v = join(v), w = join(w);
    }
    t.set<uint64_t>(i.at(0), v);
    if (i.size(0) > 1) t.set<uint64_t>(i.at(0, 1), w);
    return Step::next;
  }
};

Exec setp(const Opcode& op, Instruction& i) {
  static const std::vector<std::string_view> names = {"eq", "ne", "lt", "le", "gt", "ge", "neu", "nan", "equ", "ltu", "leu", "gtu", "geu"};
  auto name = op.parts[1];
  const bool whole = op.type()[0] != 'f';
  if (whole && (name == "lo" || name == "ls" || name == "hi" || name == "hs"))
    name = name == "lo" ? "lt" : name == "ls" ? "le" : name == "hi" ? "gt" : "ge";
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) return nullptr;
  i.shape = int(found - names.begin());
  i.flags = op.has("and") ? '&' : op.has("or") ? '|' : '^';
  return numbers<Setp>(op.type());
}

template <class T>
struct Selp {
  static Step run(Machine&, Thread& t, const Instruction& i) {
    t.set(i.args[0], t.predicate(i.args[3]) ? t.get<T>(i.args[1]) : t.get<T>(i.args[2]));
    return Step::next;
  }
};

// A move takes along what a wgmma still writes: the compiler renames accumulators, the hardware never copies them.
Step move(Machine&, Thread& t, const Instruction& i) {
  if (i.first.size() == 2 && i.size(0) == 1 && i.size(1) == 1) {
    const Operand &to = i.args[0], &from = i.args[1];
    if (from.kind == Kind::reg) {
      t.registers[to.reg] = t.registers[from.reg];
      t.busy[to.reg] = t.busy[from.reg];
    } else {
      t.set(to, t.get<uint64_t>(from));
    }
  } else if (i.size(0) == 1) {  // {a, b, ..} -> one
    const int bits = 8 * i.bytes / int(i.size(1));
    uint64_t v = 0;
    for (size_t k = 0; k < i.size(1); ++k) v |= (t.get<uint64_t>(i.at(1, k)) & (bits == 32 ? 0xFFFFFFFF : (uint64_t(1) << bits) - 1)) << (bits * k);
    t.set(i.at(0), v);
  } else {
    const int bits = 8 * i.bytes / int(i.size(0));
    const uint64_t v = t.get<uint64_t>(i.at(1));
    for (size_t k = 0; k < i.size(0); ++k) t.set(i.at(0, k), v >> (bits * k) & (bits == 32 ? 0xFFFFFFFF : (uint64_t(1) << bits) - 1));
  }
  return Step::next;
}

template <class From, class To>
Step convert(Machine&, Thread& t, const Instruction& i) {
  const From v = t.get<From>(i.args[1]);
  if constexpr (std::is_floating_point_v<From> && std::is_integral_v<To>) {  // rounds as asked, saturates, NaN is 0
    const double r = i.shape == 'z'   ? std::trunc(double(v))
                     : i.shape == 'm' ? std::floor(double(v))
                     : i.shape == 'p' ? std::ceil(double(v))
                                      : std::nearbyint(double(v));
    t.set(i.args[0], r != r                                        ? To(0)
                     : r >= double(std::numeric_limits<To>::max()) ? std::numeric_limits<To>::max()
                     : r <= double(std::numeric_limits<To>::min()) ? std::numeric_limits<To>::min()
                                                                   : To(r));
  } else {
    t.set(i.args[0], To(v));
  }
  return Step::next;
}
template <class From>
struct ConvertFrom {
  template <class To>
  struct With {
    static constexpr Exec run = convert<From, To>;
  };
};
template <float (*Widen)(uint16_t)>
Step widen(Machine&, Thread& t, const Instruction& i) {
  t.set(i.args[0], Widen(t.get<uint16_t>(i.args[1])));
  return Step::next;
}
template <uint16_t (*Round)(float)>
Step narrow(Machine&, Thread& t, const Instruction& i) {
  t.set(i.args[0], Round(t.get<float>(i.args[1])));
  return Step::next;
}
template <uint16_t (*Round)(float)>
Step narrow2(Machine&, Thread& t, const Instruction& i) {  // the first source is the upper half
  t.set(i.args[0], uint32_t(Round(t.get<float>(i.args[1]))) << 16 | Round(t.get<float>(i.args[2])));
  return Step::next;
}

Exec cvt(const Opcode& op, Instruction& i) {
  const auto from = op.type(), to = op.parts[op.parts.size() - 2];
  if (from == "bf16" && to == "f32") return widen<from_bf16>;
  if (from == "f16" && to == "f32") return widen<from_f16>;
  if (from == "f32" && to == "bf16") return narrow<to_bf16>;
  if (from == "f32" && to == "f16") return narrow<to_f16>;
  if (from == "f32" && to == "bf16x2") return narrow2<to_bf16>;
  if (from == "f32" && to == "f16x2") return narrow2<to_f16>;
  i.shape = op.has("rzi") ? 'z' : op.has("rmi") ? 'm' : op.has("rpi") ? 'p' : 'n';
  if (from == "f32") return numbers<ConvertFrom<float>::With>(to);
  if (from == "s32") return numbers<ConvertFrom<int32_t>::With>(to);
  if (from == "u32") return numbers<ConvertFrom<uint32_t>::With>(to);
  if (from == "s64") return numbers<ConvertFrom<int64_t>::With>(to);
  if (from == "u64") return numbers<ConvertFrom<uint64_t>::With>(to);
  if (from == "s16") return numbers<ConvertFrom<int16_t>::With>(to);
  if (from == "u16") return numbers<ConvertFrom<uint16_t>::With>(to);
  if (from == "s8") return numbers<ConvertFrom<int8_t>::With>(to);
  if (from == "u8") return numbers<ConvertFrom<uint8_t>::With>(to);
  return nullptr;
}

Step branch(Machine&, Thread& t, const Instruction& i) {
  t.pc = i.target;
  return Step::jump;
}
Step leave(Machine&, Thread&, const Instruction&) { return Step::exit; }
Step trap(Machine&, Thread& t, const Instruction&) { throw Error("trap: " + place(t)); }
Step nothing(Machine&, Thread&, const Instruction&) { return Step::next; }
Step nanosleep(Machine&, Thread&, const Instruction&) { return Step::yield; }

}  // namespace

Exec scalar(const Opcode& op, Instruction& i) {
  const auto base = op.base(), type = op.type();
  i.bytes = bytes_of(type);
  if (base == "bra") return branch;
  if (base == "ret" || base == "exit") return leave;
  if (base == "trap") return trap;
  if (base == "nanosleep") return nanosleep;
  if (base == "setmaxnreg" || base == "createpolicy") return nothing;
  if (type == "pred") {
    i.shape = base == "and" ? '&' : base == "or" ? '|' : base == "xor" ? '^' : base == "not" ? '!' : 0;
    return i.shape || base == "mov" ? predicate_logic : nullptr;
  }
  if (base == "mov") return move;
  if (base == "cvta") return op.has("shared") ? nullptr : move;
  if (base == "cvt") return cvt(op, i);
  if (base == "setp") return setp(op, i);
  if (base == "selp") return numbers<Selp>(type);
  return nullptr;
}

}  // namespace ptx
