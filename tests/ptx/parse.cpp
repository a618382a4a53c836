// PTX text -> Kernel. Source: PTX ISA 8.7, sections Syntax, State Spaces, Instruction Statements.
#include <algorithm>
#include <array>
#include <cctype>
#include <map>
#include <unordered_map>

#include "program.h"

namespace ptx {

Opcode::Opcode(std::string t) : text(std::move(t)) {
  const std::string_view all(text);
  for (size_t from = 0; from <= all.size();) {
    const size_t dot = std::min(all.find('.', from), all.size());
    parts.push_back(all.substr(from, dot - from));
    from = dot + 1;
  }
}

bool Opcode::has(std::string_view part) const { return std::find(parts.begin(), parts.end(), part) != parts.end(); }

int bytes_of(std::string_view type) {
  static const std::map<std::string_view, int> known = {{"pred", 1},   {"b8", 1},   {"u8", 1},  {"s8", 1},  {"b16", 2}, {"u16", 2},  {"s16", 2},
                                                        {"f16", 2},    {"bf16", 2}, {"b32", 4}, {"u32", 4}, {"s32", 4}, {"f32", 4},  {"f16x2", 4},
                                                        {"bf16x2", 4}, {"b64", 8},  {"u64", 8}, {"s64", 8}, {"f64", 8}, {"b128", 16}};
  const auto found = known.find(type);
  return found == known.end() ? 0 : found->second;
}

namespace {

constexpr std::array<std::string_view, specials> kSpecials = {
    "%tid.x",    "%tid.y",    "%tid.z",    "%ntid.x", "%ntid.y", "%ntid.z",          "%ctaid.x",          "%ctaid.y",     "%ctaid.z",
    "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%cluster_ctarank", "%cluster_nctarank", "%globaltimer", "%clock"};

bool word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.'; }

// Text without comments, read token by token.
class Reader {
 public:
  explicit Reader(std::string text) : text_(std::move(text)) {}

  bool end() {
    skip();
    return at_ >= text_.size();
  }
  char peek() {
    skip();
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool take(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }
  void need(char c) {
    if (!take(c)) fail(std::string("expected '") + c + "'");
  }
  std::string token() {  // a name, number or opcode; "::" is part of it, ":" is not
    skip();
    const size_t from = at_;
    while (at_ < text_.size()) {
      if (word(text_[at_])) {
        ++at_;
      } else if (text_.compare(at_, 2, "::") == 0) {
        at_ += 2;
      } else {
        break;
      }
    }
    if (from == at_) fail("expected a name");
    return text_.substr(from, at_ - from);
  }
  std::string until(char stop) {
    const size_t from = at_;
    while (at_ < text_.size() && text_[at_] != stop) ++at_;
    return text_.substr(from, at_++ - from);
  }
  void block() {  // skips { ... }
    need('{');
    for (int depth = 1; depth > 0 && at_ < text_.size(); ++at_) depth += text_[at_] == '{' ? 1 : text_[at_] == '}' ? -1 : 0;
  }
  [[noreturn]] void fail(const std::string& what) { throw Error("PTX: " + what + " at \"" + text_.substr(at_, 60) + "\""); }
  size_t mark() const { return at_; }
  std::string since(size_t from) const { return text_.substr(from, at_ - from); }

 private:
  void skip() {
    for (;;) {
      while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
      if (text_.compare(at_, 2, "//") == 0)
        at_ = std::min(text_.find('\n', at_), text_.size());
      else if (text_.compare(at_, 2, "/*") == 0)
        at_ = std::min(text_.find("*/", at_), text_.size() - 2) + 2;
      else
        return;
    }
  }
  std::string text_;
  size_t at_ = 0;
};

struct Scope {
  std::unordered_map<std::string, uint32_t> registers;  // slot, kNone until first used
  std::unordered_map<std::string, uint32_t> labels;
  int parent;
};

class Parser {
 public:
  Parser(const std::string& module, const std::string& entry) : in_(module), entry_(entry) {}

  std::unique_ptr<Kernel> run() {
    while (!in_.end()) {
      const std::string t = in_.token();
      if (t == ".version" || t == ".target" || t == ".address_size") {
        in_.until('\n');
      } else if (t == ".file") {
        file();
      } else if (t == ".section") {
        in_.token();
        in_.block();
      } else if (t == ".visible" || t == ".extern" || t == ".weak" || t == ".common") {
        continue;
      } else if (t == ".entry") {
        if (in_.token() == entry_)
          entry();
        else
          skip_entry();
      } else if (t == ".shared") {
        shared();
      } else if (t == ".global" || t == ".const") {
        in_.until(';');  // nvcc declares some that no kernel here reads: a use fails as an unknown name
      } else {
        in_.fail("unknown directive " + t);
      }
    }
    if (!kernel_) throw Error("PTX: no entry " + entry_);
    return std::move(kernel_);
  }

 private:
  void skip_entry() {
    in_.need('(');
    in_.until(')');
    while (in_.peek() != '{') in_.until('\n');
    in_.block();
  }

  void file() {
    const int number = std::stoi(in_.token());
    std::string path = in_.until('\n');
    path = path.substr(path.find('"') + 1);
    path = path.substr(0, path.find('"'));
    files_[number] = path.substr(path.rfind('/') + 1);
  }

  // .shared .align 16 .b8 name[bytes]; an empty size is the dynamic part, which follows the static one
  void shared() {
    uint32_t align = 4, bytes = 0;
    std::string t;
    while ((t = in_.token())[0] == '.') {
      if (t == ".align")
        align = std::stoi(in_.token());
      else
        bytes = bytes_of(t.substr(1));
    }
    bool dynamic = false;
    if (in_.take('[')) {
      dynamic = in_.peek() == ']';
      if (!dynamic) bytes *= std::stoi(in_.token());
      in_.need(']');
    }
    in_.need(';');
    if (dynamic) {
      dynamic_.push_back(t);
    } else {
      shared_end_ = (shared_end_ + align - 1) / align * align;
      symbols_[t] = kSharedBase + shared_end_;
      shared_end_ += bytes;
    }
  }

  void entry() {
    kernel_ = std::make_unique<Kernel>();
    kernel_->name = entry_;
    in_.need('(');
    while (!in_.take(')')) {
      std::string t, type;
      uint32_t align = 0;
      while ((t = in_.token())[0] == '.') {
        if (t == ".align")
          align = std::stoi(in_.token());
        else if (bytes_of(t.substr(1)))
          type = t.substr(1);
        else if (t == ".ptr")
          align = 0, ptr_ = true;
      }
      uint32_t bytes = bytes_of(type);
      if (ptr_) align = 0, ptr_ = false;
      align = std::max<uint32_t>(align, bytes);
      if (in_.take('[')) {
        bytes *= std::stoi(in_.token());
        in_.need(']');
      }
      kernel_->param_bytes = (kernel_->param_bytes + align - 1) / align * align;
      params_[t] = kernel_->param_bytes;
      kernel_->params.push_back({kernel_->param_bytes, bytes});
      kernel_->param_bytes += bytes;
      in_.take(',');
    }
    while (in_.peek() == '.') in_.until('\n');  // .maxntid, .reqntid and the like
    in_.need('{');
    scopes_.push_back({{}, {}, -1});
    scope_ = 0;
    for (int depth = 1; depth > 0;) {
      if (in_.take('{')) {
        scopes_.push_back({{}, {}, scope_});
        scope_ = int(scopes_.size()) - 1;
        ++depth;
      } else if (in_.take('}')) {
        scope_ = scopes_[scope_].parent;
        --depth;
      } else if (!in_.take(';')) {
        statement();
      }
    }
    for (const auto& [at, scope, name] : branches_) kernel_->code[at].target = label(scope, name);
    kernel_->registers = slots_;
    kernel_->shared_bytes = (shared_end_ + 15) / 16 * 16;
    for (const auto& [at, arg] : dynamic_uses_) kernel_->code[at].args[arg].value += kSharedBase + kernel_->shared_bytes;
  }

  void statement() {
    const size_t from = in_.mark();
    if (in_.take('@')) {
      Instruction i;
      i.unless = in_.take('!');
      i.guard = slot(in_.token());
      return instruction(in_.token(), std::move(i), from);
    }
    const std::string t = in_.token();
    if (in_.peek() == ':') {
      in_.need(':');
      scopes_[scope_].labels[t] = uint32_t(kernel_->code.size());
    } else if (t == ".reg") {
      declare();
    } else if (t == ".shared") {
      shared();
    } else if (t == ".loc") {
      const int file = std::stoi(in_.token());
      where_ = files_[file] + ":" + in_.token();
      in_.until('\n');
    } else if (t == ".pragma") {
      in_.until(';');
    } else if (t[0] == '.') {
      in_.fail("unknown directive " + t);
    } else {
      instruction(t, {}, from);
    }
  }

  void declare() {
    in_.token();  // the type; every register is a slot of 64 bits
    do {
      const std::string name = in_.token();
      if (in_.take('<')) {
        families_.push_back(name);
        in_.token();
        in_.need('>');
      } else {
        scopes_[scope_].registers[name] = kNone;
      }
    } while (in_.take(','));
    in_.need(';');
  }

  uint32_t slot(const std::string& name) {
    for (int s = scope_; s >= 0; s = scopes_[s].parent) {
      const auto found = scopes_[s].registers.find(name);
      if (found == scopes_[s].registers.end()) continue;
      if (found->second == kNone) found->second = slots_++;
      return found->second;
    }
    for (const std::string& family : families_)
      if (name.size() > family.size() && name.compare(0, family.size(), family) == 0 &&
          std::all_of(name.begin() + family.size(), name.end(), [](unsigned char c) { return std::isdigit(c); }))
        return scopes_[0].registers[name] = slots_++;
    in_.fail("unknown register " + name);
  }

  uint32_t label(int scope, const std::string& name) const {
    for (int s = scope; s >= 0; s = scopes_[s].parent)
      if (const auto found = scopes_[s].labels.find(name); found != scopes_[s].labels.end()) return found->second;
    throw Error("PTX: unknown label " + name);
  }

  static bool number(const std::string& t) { return std::isdigit(static_cast<unsigned char>(t[0])); }

  static uint64_t integer(const std::string& t) {
    if (t.size() > 2 && t[0] == '0' && (t[1] == 'f' || t[1] == 'F' || t[1] == 'd' || t[1] == 'D')) return std::stoull(t.substr(2), nullptr, 16);
    return std::stoull(t, nullptr, 0);
  }

  // One element of an operand; `i` is the instruction that it belongs to.
  Operand element(Instruction& i) {
    Operand o;
    if (in_.take('-')) {
      o.kind = Kind::imm, o.value = -integer(in_.token());
      return o;
    }
    o.negated = in_.take('!');
    const std::string t = in_.token();
    if (t == "_") return o;
    const auto special = std::find(kSpecials.begin(), kSpecials.end(), t);
    if (special != kSpecials.end()) {
      o.kind = Kind::special, o.value = special - kSpecials.begin();
    } else if (number(t)) {
      o.kind = Kind::imm, o.value = integer(t);
    } else if (const auto p = params_.find(t); p != params_.end()) {
      o.kind = Kind::param, o.value = p->second;
    } else if (const auto s = symbols_.find(t); s != symbols_.end()) {
      o.kind = Kind::imm, o.value = s->second;
    } else if (std::find(dynamic_.begin(), dynamic_.end(), t) != dynamic_.end()) {
      o.kind = Kind::imm;
      dynamic_uses_.emplace_back(kernel_->code.size(), i.args.size());
    } else {
      o.kind = Kind::reg, o.reg = slot(t);
    }
    return o;
  }

  void operand(Instruction& i) {
    i.first.push_back(uint8_t(i.args.size()));
    if (in_.take('[')) {
      Operand o = element(i);
      if (o.kind == Kind::imm) o.reg = kNone;  // a symbol: an address without base
      if (in_.take('+')) {
        const bool minus = in_.take('-');
        const uint64_t offset = integer(in_.token());
        o.value += minus ? -offset : offset;
      }
      i.args.push_back(o);
      while (in_.take(',')) {  // coordinates of a tensor
        if (in_.take('{')) {
          do i.args.push_back(element(i));
          while (in_.take(','));
          in_.need('}');
        }
      }
      in_.need(']');
    } else if (in_.take('{')) {
      do i.args.push_back(element(i));
      while (in_.take(','));
      in_.need('}');
    } else {
      i.args.push_back(element(i));
      if (in_.take('|')) i.args.push_back(element(i));
    }
  }

  void instruction(const std::string& name, Instruction i, size_t from) {
    const Opcode op(name);
    i.where = where_;
    if (op.base() == "bra") {
      branches_.emplace_back(kernel_->code.size(), scope_, in_.token());
    } else {
      if (in_.peek() != ';') {
        do operand(i);
        while (in_.take(','));
      }
    }
    in_.need(';');
    i.text = in_.since(from);
    for (const auto family : {arithmetic, scalar, memory, collective, tensor, matrix})
      if ((i.exec = family(op, i))) break;
    if (!i.exec) throw Error("PTX: the emulator does not know " + i.text);
    if (op.starts("griddepcontrol.launch")) kernel_->starts_next = true;
    kernel_->code.push_back(std::move(i));
  }

  Reader in_;
  std::string entry_, where_;
  std::unique_ptr<Kernel> kernel_;
  std::map<int, std::string> files_;
  std::unordered_map<std::string, uint32_t> symbols_, params_;
  std::vector<std::string> dynamic_, families_;
  std::vector<Scope> scopes_;
  std::vector<std::tuple<size_t, int, std::string>> branches_;
  std::vector<std::pair<size_t, size_t>> dynamic_uses_;
  uint32_t shared_end_ = 0, slots_ = 0;
  int scope_ = 0;
  bool ptr_ = false;
};

}  // namespace

std::vector<std::string> entries(const std::string& module) {
  std::vector<std::string> found;
  const std::string mark = ".entry ";
  for (size_t at = module.find(mark); at != std::string::npos; at = module.find(mark, at)) {
    const size_t from = at += mark.size();
    while (word(module[at])) ++at;
    found.push_back(module.substr(from, at - from));
  }
  return found;
}

std::unique_ptr<Kernel> parse(const std::string& module, const std::string& entry) { return Parser(module, entry).run(); }

}  // namespace ptx
