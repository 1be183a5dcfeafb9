// SPDX-License-Identifier: Apache-2.0
// The machine: a cluster of CTAs under execution by one host thread. Every room (tma.c, wgmma.c, ...) works on these
// types.
#ifndef FGE_MACHINE_H
#define FGE_MACHINE_H
#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>
#include "abi.h"
#include "ops.h"

#define NONE 0xffffffffu
#define FULL 0xffffffffu
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

// Windows of generic addresses: no host address has these top bytes.
#define WINDOW_SHARED 0x70ull
#define WINDOW_LOCAL 0x71ull
#define WINDOW_PARAM 0x72ull
#define SMEM_BASE 1024u            // first byte a kernel owns, as on sm_90 (the system reserves 1 KiB)
#define SMEM_LIMIT (227u * 1024u)  // most a CTA may ask for
#define SMEM_ADDRESSES (SMEM_BASE + SMEM_LIMIT)
#define RANK_SHIFT 24  // shared::cluster addresses: CTA rank above, offset below
#define OFFSET_MASK 0xffffffu
#define POOL_REGISTERS 65536u  // 32-bit registers of one SM

enum Space { SPACE_GENERIC, SPACE_GLOBAL, SPACE_SHARED, SPACE_PARAM, SPACE_LOCAL };
#define X_SPACE 7u  // x: address space of a memory instruction
#define X_WIDE 8u   // x: the address register has 64 bits

typedef struct Machine Machine;
typedef struct Warp Warp;
typedef struct Cta Cta;
typedef struct Race Race;

// What a handler tells the interpreter loop.
typedef enum {
  FLOW_NEXT,  // go on with the next instruction
  FLOW_JUMP,  // the fragment's pc has been set
  FLOW_LEAVE  // leave the fragment: it blocks, yields, was split or is gone; its state is complete
} Flow;
typedef Flow Handler(Machine* m, Warp* w, const Ins* I, u32 mask);
extern Handler* const handlers[OP_COUNT];

// What a fragment waits for.
enum Wait { WAIT_NONE, WAIT_CONVERGE, WAIT_MBARRIER, WAIT_BARRIER, WAIT_WGMMA, WAIT_CLUSTER, WAIT_REGISTERS };

// The lanes of a warp that share a pc (PTX ISA 3.1: lanes of a warp may diverge and are scheduled independently).
typedef struct {
  u32 pc, mask, wait;
  u32 want;        // converge: lanes needed; mbarrier: parity; registers: target
  u32 address;     // mbarrier: shared address; barrier: id
  bool timed_out;  // mbarrier: let the next try_wait return false
  bool blocked;    // mbarrier: this wait has already been counted as not ready
  u64 since;       // instruction count of the cluster when it blocked
} Fragment;

typedef struct {
  u32 pc, group;
  u64 desc_a, desc_b;
  bool accumulate, done;
  bool move;   // a register move that waits for the wgmma before it
  u32 ticket;  // of the race detector
} WgmmaOp;

typedef struct {
  u32 mask, pc, size;
  bool arrive;  // cp.async.mbarrier.arrive rather than a copy
  bool done;
  u32 ticket;
  u32* clock;  // race detector: clock of the arrival
  u32 group[32], dst[32], src_size[32];
  u64 src[32];
} CpAsyncOp;

typedef struct {
  bool linear, done;  // linear: cp.async.bulk, else a tensor tile
  u32 lane, group, pc, smem, size, reduction, ticket;
  u64 tmap, gptr;
  s32 coord[5];
} BulkStore;

typedef struct {
  bool linear;
  Cta* cta;
  u32 smem, mbar, size, pc, multicast;
  u32 ticket[16];  // race detector: per destination CTA
  u32* clock;      // race detector: of the warp that issued it
  u64 tmap, gptr;
  s32 coord[5];
} TmaLoad;

struct Warp {
  u8* rf;  // register file: slots of 32 lanes
  Cta* cta;
  u32 id, alive;  // alive: lanes that have not exited
  int num_fragments;
  bool done, yielded;
  Fragment fragment[32];
  u32 registers;  // per thread, what setmaxnreg last set
  u64 counters[CLASS_COUNT + COUNT_COUNTERS];
  // wgmma
  WgmmaOp* wgmma;
  int num_wgmma, cap_wgmma;
  u32 wgmma_group, num_flight;
  u16* flight;   // per slot: low byte = wgmmas that own it as accumulator, high byte = as A operand
  u32* touched;  // per slot: sequence number of the last access that matters for wgmma.fence
  u32 sequence, fence_sequence;
  bool fenced;
  // cp.async and bulk stores
  CpAsyncOp* cp;
  int num_cp, cap_cp;
  u32 cp_group[32];
  BulkStore* bulk;
  int num_bulk, cap_bulk;
  u32 bulk_group[32];
  // checks
  u32* initialised;  // per tracked register: lanes written
  u64 proxy_fence;   // time of the last fence.proxy.async
  u64 last_time_out;
  u32* clock;  // vector clock of the race detector
  u32 cluster_generation;
  u8* local;
};

typedef struct {
  u32 expected, arrived, true_threads;
} NamedBarrier;
typedef struct {
  u32 pc, arrived;
  u64 desc_a, desc_b;
} WarpgroupMeeting;

#define MAX_MBARRIERS 512
#define PAGE_SHIFT 10
struct Cta {
  u8* smem;  // indexed by shared address (the first SMEM_BASE bytes are unused)
  u32 smem_size, rank, id[3];
  Warp* warps;
  int num_warps;
  NamedBarrier barrier[16];
  WarpgroupMeeting meeting[32];
  u32 page_version[(SMEM_ADDRESSES >> PAGE_SHIFT) + 2];        // counts writes, so that decoded operands can be reused
  u64 page_generic_write[(SMEM_ADDRESSES >> PAGE_SHIFT) + 2];  // time of the last write through the generic proxy
  u32 mbarrier[MAX_MBARRIERS];
  int num_mbarriers;
  u32 register_pool;   // free registers of this CTA
  u64* generic_write;  // per 16 bytes: who wrote it through the generic proxy, and when (0: nobody)
  u8* smem_written;    // one bit per byte
  Race* race;
};

typedef struct OperandCache OperandCache;
typedef struct {
  FindingRecord* list;
  u32 count, capacity;
} Findings;

struct Machine {
  const Kernel* kernel;
  const Launch* launch;
  const Ins* code;
  const u32* aux;
  u32 checks;
  Cta* ctas;
  int num_ctas;
  u64 cluster_index;
  jmp_buf escape;
  Findings findings;
  bool failed;
  char* report;  // text of the fatal fault
  Warp* warp;    // running now
  Fragment* fragment;
  u32 async_pc;      // instruction of the asynchronous operation that takes effect now, or NONE
  u64 instructions;  // of this cluster
  u64 progress;      // changes whenever something a warp may wait for happens
  u64 random_state, clock_ticks, proxy_time;
  bool allow_secondary;
  TmaLoad* tma;
  int num_tma, cap_tma;
  u32 cluster_arrived, cluster_generation;
  u32 last_region;
  OperandCache* operands;
};

// ---- report.c
_Noreturn void fail(Machine* m, u32 kind, const char* format, ...) __attribute__((format(printf, 3, 4)));
_Noreturn void fail_at(Machine* m, u32 kind, int lane, u64 address, const char* format, ...)
    __attribute__((format(printf, 5, 6)));
void warn(Machine* m, u32 kind, u32 pc, int lane, u64 address, const char* format, ...)
    __attribute__((format(printf, 6, 7)));

// ---- sched.c, fragment.c
void run_cluster(Machine* m);
void describe_waits(Machine* m, char* text, size_t capacity);
bool converged(Machine* m, Warp* w, u32 lanes);
void block(Machine* m, u32 wait, u32 want, u32 address);
void drop_fragment(Warp* w, Fragment* f);
Flow split_fragment(Machine* m, Warp* w, u32 taken, u32 target);
u64 run_warp(Machine* m, Warp* w, u64 quantum);
bool fragment_ready(Machine* m, Warp* w, Fragment* f);
void finish_warp(Machine* m, Warp* w);

// The instruction at work: that of the asynchronous operation being completed, else the running fragment's.
static inline u32 current_pc(const Machine* m) {
  return m->async_pc != NONE ? m->async_pc : m->fragment ? m->fragment->pc : NONE;
}

static inline u64 random_next(Machine* m) {  // xorshift64
  u64 x = m->random_state;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return m->random_state = x;
}

// ---- register file access
static inline u32* reg32(const Warp* w, u32 offset) { return (u32*)(w->rf + offset); }
static inline u64* reg64(const Warp* w, u32 offset) { return (u64*)(w->rf + offset); }
static inline u32* pred(const Warp* w, u32 offset) { return (u32*)(w->rf + offset); }
static inline void set_pred(const Warp* w, u32 offset, u32 mask, u32 value) {
  u32* p = pred(w, offset);
  *p = (*p & ~mask) | (value & mask);
}
static inline int first_lane(u32 mask) { return __builtin_ctz(mask); }
#define FOR_LANES(mask, lane) \
  for (u32 lanes_ = (mask), lane; lanes_ && ((lane = (u32)__builtin_ctz(lanes_)), 1); lanes_ &= lanes_ - 1)
// Address of a lane: register a plus the immediate; 32-bit addresses wrap.
static inline u64 lane_address(const Warp* w, const Ins* I, u32 lane) {
  if (I->x & X_WIDE) return reg64(w, I->a)[lane] + (u64)I->imm;
  return (u32)(reg32(w, I->a)[lane] + (u32)I->imm);
}
u32 uniform32(Machine* m, const u32* values, u32 mask, const char* what);
static inline void count(Warp* w, u32 counter, u64 amount) { w->counters[CLASS_COUNT + counter] += amount; }
#endif
