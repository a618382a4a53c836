// The ring of shared-memory slots between one producer thread (TMA) and two consumer warpgroups (wgmma), and how tile numbers reach the consumers.
//
// Barrier      who arrives                          who waits        why nobody waits for ever
// full[s]      the producer thread, once, with the  consumers        each pushed slot is armed with exactly the bytes its TMA boxes bring; boxes
//              slot's bytes; TMA completes them                      count in full also where they lie outside the tensor (zero fill)
// empty[s]     one lane of every consumer warp of   producers of     consumers release every slot they have waited for, except the last (kNoMore),
//              every CTA of the cluster             the cluster      after which nothing is pushed
// mail_full[i] the CTA's own producer with 4 bytes; producer of      the leader (rank 0) mails every claim, kNoMore included, and each other
//              the leader's st.async completes them rank > 0         producer takes each one
//
// Fences: TMA and st.async completions are ordered before the end of their barrier's wait. A consumer warp arrives on empty[s] after wgmma.wait_group
// said its reads of s are done (async proxy on both sides: no proxy fence). header[s] is written before the arrive on full[s] and read after
// the wait; it is written again only after empty[s], on which its readers have arrived.
// mail[i] is written again kMail claims later. Every tile pushes at least one slot and the ring has at most kMail - 1 slots, so by then the leader
// has waited for the release of a slot that this CTA's producer filled after reading mail[i]. All barriers live in shared memory and are made anew by
// every launch: an aborted launch leaves nothing of them behind.
#pragma once
#include "layout.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"

namespace lk::cuda {

constexpr int kThreads = 384;  // one producer warpgroup, two consumer warpgroups
constexpr int kConsumerWarps = 8;
constexpr int kMail = 8;
// 128 x (168 - 40) registers go from the producer to 2 x 128 x (232 - 168): 40 + 2 x 232 = 3 x 168.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

template <int SLOTS, int SLOT_BYTES>
struct Pipeline {
  static_assert(SLOTS < kMail && SLOT_BYTES % 1024 == 0, "see the head of this file; the swizzle wants 1024-byte alignment");
  static constexpr int kDataBytes = SLOTS * SLOT_BYTES;
  static constexpr int kControlBytes = 16 * SLOTS + 8 * kMail + 4 * SLOTS + 4 * kMail;

  uint32_t data, full, empty, mail_full;
  volatile int *header, *mail;
  uint32_t cluster, rank;
  Ring<SLOTS> ring;
  Ring<kMail> post;

  // data: 1024-byte aligned; control: 8-byte aligned
  __device__ __forceinline__ Pipeline(uint32_t data_, uint8_t* control, int cluster_)
      : data(data_), full(ptx::smem(control)), empty(full + 8 * SLOTS), mail_full(empty + 8 * SLOTS), cluster(cluster_), rank(ptx::cluster_rank()) {
    header = reinterpret_cast<int*>(control + 16 * SLOTS + 8 * kMail);
    mail = header + SLOTS;
  }

  __device__ __forceinline__ void init() {  // by all threads
    if (threadIdx.x == 0) {
      for (int i = 0; i < SLOTS; ++i) {
        ptx::barrier_init(full + 8 * i, 1);
        ptx::barrier_init(empty + 8 * i, kConsumerWarps * cluster);
      }
      for (int i = 0; i < kMail; ++i) ptx::barrier_init(mail_full + 8 * i, 1);
      ptx::barrier_init_fence();
    }
    ptx::cluster_sync();  // nobody arrives on a barrier, in whichever CTA, before it is made
  }

  // By all threads: a CTA stays until the others have made their last arrivals on its barriers and their last multicasts into it.
  __device__ __forceinline__ void leave() {
    __syncwarp();
    ptx::cluster_sync();
  }

  __device__ __forceinline__ uint32_t slot() const { return data + ring.slot * SLOT_BYTES; }

  // ---- producer thread ----

  // The slot is free in all CTAs that write into it; arms `full` with the bytes to come. The caller issues the loads, then advances the ring.
  __device__ __forceinline__ uint32_t arm(int unit, uint32_t bytes) {
    ptx::barrier_wait(empty + 8 * ring.slot, ring.phase ^ 1);
    header[ring.slot] = unit;
    const uint32_t bar = full + 8 * ring.slot;
    ptx::barrier_expect(bar, bytes);
    return bar;
  }

  __device__ __forceinline__ void finish() {  // tells the consumers that nothing follows
    ptx::barrier_wait(empty + 8 * ring.slot, ring.phase ^ 1);
    header[ring.slot] = kNoMore;
    ptx::barrier_arrive(full + 8 * ring.slot);
  }

  // The next unit by ticket: drawn by the leader, mailed to the others.
  __device__ __forceinline__ int claim(int* ticket, int units, int clusters) {
    int unit;
    if (rank == 0) {
      const int drawn = atomicAdd(ticket, 1);
      if (last_ticket(drawn, units, clusters)) *ticket = 0;
      unit = ticket_unit(drawn, units);
      for (uint32_t r = 1; r < cluster; ++r) ptx::store_at(ptx::smem(const_cast<int*>(mail + post.slot)), mail_full + 8 * post.slot, r, unit);
    } else {
      ptx::barrier_expect(mail_full + 8 * post.slot, 4);
      ptx::barrier_wait(mail_full + 8 * post.slot, post.phase);
      unit = mail[post.slot];
    }
    post.advance();
    return unit;
  }

  // ---- consumer warpgroups ----

  __device__ __forceinline__ void wait() { ptx::barrier_wait(full + 8 * ring.slot, ring.phase); }
  __device__ __forceinline__ int unit() const { return header[ring.slot]; }  // after wait()

  // This warp no longer reads slot `s`: lane r tells CTA r of the cluster.
  __device__ __forceinline__ void release(int s) {
    const uint32_t lane = threadIdx.x % 32;
    if (cluster == 1) {  // the CTA feeds itself, whatever cluster it stands in
      if (lane == 0) ptx::barrier_arrive(empty + 8 * s);
    } else if (lane < cluster) {
      ptx::barrier_arrive_at(empty + 8 * s, lane);
    }
  }
};

}  // namespace lk::cuda
