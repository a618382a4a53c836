// Temporary memory of one op, kept for the next: a fresh large malloc costs a page fault per 4 KiB.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace lk {

class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    auto& free = blocks().list;
    for (size_t i = 0; i < free.size(); i++) {
      if (free[i].bytes >= bytes && (block_.p == nullptr || free[i].bytes < block_.bytes)) block_ = free[i], at_ = i;
    }
    if (block_.p) {
      free.erase(free.begin() + static_cast<std::ptrdiff_t>(at_));
    } else {
      block_.bytes = (bytes + kAlign) / kAlign * kAlign;
      block_.p = std::aligned_alloc(kAlign, block_.bytes);
      if (!block_.p) throw std::bad_alloc();
    }
  }
  ~Scratch() {
    auto& free = blocks().list;
    if (free.size() < kKept && block_.bytes <= kLargest)
      free.push_back(block_);
    else
      std::free(block_.p);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(block_.p);
  }

 private:
  static constexpr size_t kAlign = 4096, kKept = 12, kLargest = size_t{64} << 20;
  struct Block {
    void* p = nullptr;
    size_t bytes = 0;
  };
  struct Blocks {
    std::vector<Block> list;
    Blocks() { list.reserve(kKept); }
    ~Blocks() {
      for (const Block& b : list) std::free(b.p);
    }
  };
  static Blocks& blocks() {
    thread_local Blocks b;
    return b;
  }
  Block block_;
  size_t at_ = 0;
};

}  // namespace lk
