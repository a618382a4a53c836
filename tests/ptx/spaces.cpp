// What one block sees of shared memory, global memory and mbarriers, and the rules that an access can break.
#include <algorithm>

#include "machine.h"

namespace ptx {

// ---- shared memory ----

Cta& Machine::owner(Thread& t, uint32_t& address) const {
  const uint32_t rank = address >> 24;
  address &= 0xFFFFFF;
  if (rank == 0) return *t.cta;
  const auto& ctas = t.cta->cluster->ctas;
  if (rank > ctas.size()) throw Error("shared memory of a block outside the cluster: " + place(t));
  Cta& cta = *ctas[rank - 1];
  if (cta.alive == 0) throw Error("shared memory of a block that has exited: " + place(t));
  return cta;
}

namespace {
void check_shared(const Thread& t, const Cta& cta, uint32_t address, uint32_t bytes) {
  if (address < kSharedBase || address + bytes > cta.shared.size())
    throw Error("shared memory at " + std::to_string(address) + " of " + std::to_string(cta.shared.size()) + ": " + place(t));
}
}  // namespace

uint8_t* Machine::shared(Thread& t, uint32_t address, uint32_t bytes, bool write) {
  Cta& cta = owner(t, address);
  check_shared(t, cta, address, bytes);
  if (address % bytes) throw Error("misaligned access to shared memory at " + std::to_string(address) + ": " + place(t));
  for (uint32_t g = address / 16; g <= (address + bytes - 1) / 16; ++g) {
    Granule& granule = cta.granules[g];
    if (granule.arriving) throw Error("shared memory that an asynchronous copy is still writing: " + place(t));
    if (!write) continue;
    if (granule.leaving) throw Error("shared memory that is still read asynchronously: " + place(t));
    granule.written = clock, granule.writer = &t;
  }
  return cta.shared.data() + address;
}

void Machine::expect_write(Thread& t, Cta& cta, uint32_t address, uint32_t bytes, bool bulk) {
  check_shared(t, cta, address, bytes);
  for (uint32_t g = address / 16; g < (address + bytes + 15) / 16; ++g) {
    Granule& granule = cta.granules[g];
    if (granule.leaving) throw Error("a copy into shared memory that is still read asynchronously: " + place(t));
    if (!bulk) {
      granule.arriving += bytes >= 16;  // a smaller one shares its 16 bytes with others
      continue;
    }
    if (granule.arriving) throw Error("two asynchronous copies into one place: " + place(t));
    if (granule.written > std::max(granule.writer ? granule.writer->fenced : 0, t.fenced))
      throw Error("a copy over an ordinary store without fence.proxy.async between: " + place(t));
    granule.written = 0;
    ++granule.arriving;
  }
}

void Machine::expect_read(Thread& t, Cta& cta, uint32_t g, uint64_t fenced) {
  check_shared(t, cta, g * 16, 16);
  Granule& granule = cta.granules[g];
  if (granule.arriving) throw Error("an asynchronous read of what a copy is still writing: " + place(t));
  if (granule.written > std::max(granule.writer ? granule.writer->fenced : 0, fenced))
    throw Error("an asynchronous read of an ordinary store without fence.proxy.async between: " + place(t));
  ++granule.leaving;
}

// ---- global memory: a block's stores reach the others late and in any order unless it releases; its loads may be stale unless they go past L1 ----

void Machine::load(Thread& t, uint64_t address, void* to, uint32_t bytes, bool coherent) {
  Cta& cta = *t.cta;
  auto* out = static_cast<uint8_t*>(to);
  for (uint32_t i = 0; i < bytes; ++i) {
    const uint64_t at = address + i;
    if (!cta.stores.empty())
      if (const auto own = cta.stores.find(at / 16); own != cta.stores.end() && own->second.bytes[at % 16] >= 0) {
        out[i] = uint8_t(own->second.bytes[at % 16]);
        continue;
      }
    if (!coherent) {
      auto [line, fresh] = cta.l1.try_emplace(at / 32);
      if (fresh) std::memcpy(line->second.data(), reinterpret_cast<const void*>(at / 32 * 32), 32);
      out[i] = line->second[at % 32];
    } else {
      out[i] = *reinterpret_cast<const uint8_t*>(at);
    }
  }
}

void Machine::store(Thread& t, uint64_t address, const void* from, uint32_t bytes) {
  Cta& cta = *t.cta;
  cta.grid->written[address / 32] = {clock, &t};
  for (uint32_t i = 0; i < bytes; ++i) {
    const uint64_t at = address + i;
    auto [piece, fresh] = cta.stores.try_emplace(at / 16);
    if (fresh) piece->second.bytes.fill(-1);
    piece->second.time = clock, piece->second.writer = &t;
    piece->second.bytes[at % 16] = static_cast<const uint8_t*>(from)[i];
    if (const auto line = cta.l1.find(at / 32); line != cta.l1.end()) line->second[at % 32] = static_cast<const uint8_t*>(from)[i];
  }
  if (dice(4) == 0) drain(cta, address / 16);
}

void Machine::drain(Cta& cta, uint64_t granule) {
  const auto piece = cta.stores.find(granule);
  if (piece == cta.stores.end()) return;
  for (int i = 0; i < 16; ++i)
    if (piece->second.bytes[i] >= 0) reinterpret_cast<uint8_t*>(granule * 16)[i] = uint8_t(piece->second.bytes[i]);
  cta.stores.erase(piece);
}

void Machine::release(Thread& t) {
  std::vector<uint64_t> covered;
  for (const auto& [granule, piece] : t.cta->stores)
    if (piece.writer == &t || piece.time < t.synced) covered.push_back(granule);
  for (const uint64_t granule : covered) drain(*t.cta, granule);
}

void Machine::drain(Cta& cta) {
  while (!cta.stores.empty()) drain(cta, cta.stores.begin()->first);
}

// ---- mbarriers ----

Barrier& Machine::barrier(Cta& cta, uint32_t address) {
  const auto found = cta.barriers.find(address);
  if (found == cta.barriers.end()) throw Error("no mbarrier was initialised at " + std::to_string(address));
  return found->second;
}

void Machine::arrive(Barrier& b, int arrivals, int64_t bytes) {
  if (arrivals > b.pending) throw Error("more arrivals on an mbarrier than it expects");
  b.pending -= arrivals;
  b.bytes += bytes;
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = b.expected;
  for (Thread* t : b.waiting) wake(t);
  b.waiting.clear();
}

}  // namespace ptx
