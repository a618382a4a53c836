// A PTX kernel as the emulator executes it: registers numbered, labels and symbols resolved, every instruction bound to the function that executes
// it.
#pragma once
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace ptx {

struct Machine;
struct Thread;
struct Instruction;

// What a thread does after an instruction: goes on; goes on at Thread::pc; waits, and meets this instruction again when woken; lets others run; is
// done.
enum class Step { next, jump, stay, yield, exit };
using Exec = Step (*)(Machine&, Thread&, const Instruction&);

constexpr uint32_t kNone = ~0u;
constexpr uint32_t kSharedBase = 1024;  // what the hardware keeps for itself below a block's shared memory

enum class Kind : uint8_t { reg, imm, special, param, sink };

struct Operand {
  Kind kind = Kind::sink;
  bool negated = false;  // !p
  uint32_t reg = kNone;  // the register; base of an address, kNone where it has none
  uint64_t value = 0;    // bits of an immediate; offset of an address or parameter; number of a special register
};

struct Instruction {
  Exec exec = nullptr;
  uint32_t guard = kNone;               // predicate
  bool unless = false;                  // ... negated
  uint32_t target = 0;                  // of a branch
  int bytes = 0, count = 0, shape = 0;  // of a memory element; of a vector; whatever the instruction's family needs
  unsigned flags = 0;
  std::vector<Operand> args;   // all operands, vectors and addresses flattened
  std::vector<uint8_t> first;  // index of each operand's first element
  std::string text, where;     // for messages

  const Operand& at(size_t operand, size_t element = 0) const { return args[first.at(operand) + element]; }
  size_t size(size_t operand) const { return (operand + 1 < first.size() ? first[operand + 1] : args.size()) - first[operand]; }
};

struct Param {
  uint32_t offset, bytes;
};

struct Kernel {
  std::string name;
  std::vector<Param> params;
  uint32_t param_bytes = 0, registers = 0;
  uint32_t shared_bytes = 0;  // static, from kSharedBase
  bool starts_next = false;   // griddepcontrol.launch_dependents
  std::vector<Instruction> code;
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The parts of an opcode, "mul.wide.s32" -> mul, wide, s32.
struct Opcode {
  std::string text;
  std::vector<std::string_view> parts;

  explicit Opcode(std::string t);
  std::string_view base() const { return parts.front(); }
  std::string_view type() const { return parts.back(); }
  bool has(std::string_view part) const;
  bool starts(std::string_view prefix) const { return text.rfind(prefix, 0) == 0; }
};

// Names of the entries in a PTX module, and one of them parsed.
std::vector<std::string> entries(const std::string& module);
std::unique_ptr<Kernel> parse(const std::string& module, const std::string& entry);

// Each family gives the function of an opcode and fills bytes, count, shape, flags; null: not one of its own.
Exec arithmetic(const Opcode&, Instruction&);
Exec scalar(const Opcode&, Instruction&);
Exec memory(const Opcode&, Instruction&);
Exec collective(const Opcode&, Instruction&);
Exec tensor(const Opcode&, Instruction&);
Exec matrix(const Opcode&, Instruction&);

enum Special : uint64_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  cluster_ctarank,
  cluster_nctarank,
  globaltimer,
  clock_low,
  specials
};

int bytes_of(std::string_view type);  // 0: no type

}  // namespace ptx
