// SPDX-License-Identifier: Apache-2.0
// What Python and C exchange. This file is the one source of truth: fgattn_cute/emulator/abi.py parses it and builds
// the ctypes structures and enums from it, so keep to the simple forms used here (one field list per line, plain enums,
// no expressions).
#ifndef FGE_ABI_H
#define FGE_ABI_H
#include <stdint.h>

typedef uint8_t u8;
typedef int8_t s8;
typedef uint16_t u16;
typedef int16_t s16;
typedef uint32_t u32;
typedef int32_t s32;
typedef uint64_t u64;
typedef int64_t s64;
typedef float f32;
typedef double f64;

// One lowered instruction, 64 bytes. d, a, b, c, e and guard are byte offsets into the warp's register file (NONE:
// absent); what x, n, aux and imm mean is said where the opcode is implemented.
typedef struct {
  u16 op;
  u8 cls, flags;
  u32 guard, d, a, b, c, e;
  u32 x, n, aux, line;
  u32 pad;
  s64 imm;
  u64 handler;
} Ins;

enum InsFlag { INS_GUARD_NOT = 1, INS_FLIGHT = 2, INS_TOUCH = 4, INS_MOVE = 8, INS_PSEUDO = 16 };

// Classes of instructions, for the counters.
enum Class {
  CLASS_CONTROL,
  CLASS_INTEGER,
  CLASS_FLOAT,
  CLASS_MUFU,
  CLASS_CONVERT,
  CLASS_MOVE,
  CLASS_PREDICATE,
  CLASS_GLOBAL,
  CLASS_SHARED,
  CLASS_PARAM,
  CLASS_ATOMIC,
  CLASS_WARP,
  CLASS_BARRIER,
  CLASS_MBARRIER,
  CLASS_CP_ASYNC,
  CLASS_TMA,
  CLASS_MMA,
  CLASS_WGMMA,
  CLASS_FENCE,
  CLASS_COUNT
};

// Counters of one warp, after its CLASS_COUNT instruction counts.
enum Counter {
  COUNT_LANE_INSTRUCTIONS,
  COUNT_WGMMA_FLOPS,
  COUNT_MMA_FLOPS,
  COUNT_EX2,
  COUNT_CP_ASYNC_BYTES,
  COUNT_TMA_LOAD_BYTES,
  COUNT_TMA_STORE_BYTES,
  COUNT_GLOBAL_LOAD_BYTES,
  COUNT_GLOBAL_STORE_BYTES,
  COUNT_SHARED_LOAD_BYTES,
  COUNT_SHARED_STORE_BYTES,
  COUNT_MBARRIER_WAITS,
  COUNT_MBARRIER_NOT_READY,
  COUNT_BARRIER_SYNCS,
  COUNT_BARRIER_BLOCKED,
  COUNT_COUNTERS
};

// Special registers, by slot in Kernel.special.
enum Special {
  SPECIAL_TID_X,
  SPECIAL_TID_Y,
  SPECIAL_TID_Z,
  SPECIAL_NTID_X,
  SPECIAL_NTID_Y,
  SPECIAL_NTID_Z,
  SPECIAL_CTAID_X,
  SPECIAL_CTAID_Y,
  SPECIAL_CTAID_Z,
  SPECIAL_NCTAID_X,
  SPECIAL_NCTAID_Y,
  SPECIAL_NCTAID_Z,
  SPECIAL_LANEID,
  SPECIAL_WARPID,
  SPECIAL_NWARPID,
  SPECIAL_SMID,
  SPECIAL_NSMID,
  SPECIAL_CLUSTERID_X,
  SPECIAL_CLUSTERID_Y,
  SPECIAL_CLUSTERID_Z,
  SPECIAL_NCLUSTERID_X,
  SPECIAL_NCLUSTERID_Y,
  SPECIAL_NCLUSTERID_Z,
  SPECIAL_CLUSTER_CTAID_X,
  SPECIAL_CLUSTER_CTAID_Y,
  SPECIAL_CLUSTER_CTAID_Z,
  SPECIAL_CLUSTER_NCTAID_X,
  SPECIAL_CLUSTER_NCTAID_Y,
  SPECIAL_CLUSTER_NCTAID_Z,
  SPECIAL_CLUSTER_CTARANK,
  SPECIAL_CLUSTER_NCTARANK,
  SPECIAL_LANEMASK_EQ,
  SPECIAL_LANEMASK_LT,
  SPECIAL_LANEMASK_LE,
  SPECIAL_LANEMASK_GT,
  SPECIAL_LANEMASK_GE,
  SPECIAL_DYNAMIC_SMEM_SIZE,
  SPECIAL_TOTAL_SMEM_SIZE,
  SPECIAL_GRIDID,
  SPECIAL_COUNT
};

// A constant slot whose value is a shared-memory address: known only when the CTA's rank in its cluster is.
typedef struct {
  u32 offset, wide, value, pad;
} SharedSymbol;

typedef struct {
  u64 code, aux, image, special, du_ptr, du, symbols;
  u32 num_code, image_bytes, static_smem, local_bytes, num_symbols, num_tracked, param_bytes, num_special;
} Kernel;

// Global memory: host bytes [lo, hi). written: address of a bitmap, one bit per byte, or 0. read_sectors,
// write_sectors: bitmaps, one bit per 32 bytes. Regions are sorted and disjoint.
typedef struct {
  u64 lo, hi, written, read_sectors, write_sectors;
} MemoryRegion;

typedef struct {
  u32 grid[3], block[3], cluster[3];
  u32 dynamic_smem, num_regions, checks, threads, seed;
  u32 async_wgmma, async_tma, async_cp, random_schedule, quantum, cta_order, num_sms, registers;
  u64 max_instructions, params, regions, counters, warp_registers;
} Launch;

// Kinds of findings; the lower-case names are those of errors.KINDS.
enum Kind {
  KIND_LAUNCH,
  KIND_UNSUPPORTED,
  KIND_BOUNDS,
  KIND_MISALIGNED,
  KIND_UNINITIALISED,
  KIND_DEADLOCK,
  KIND_RACE,
  KIND_BARRIER,
  KIND_PROXY,
  KIND_WGMMA,
  KIND_DESCRIPTOR,
  KIND_REGISTERS,
  KIND_LIMIT,
  KIND_EXIT,
  KIND_TRAP
};

enum Check {
  CHECK_BOUNDS = 1,
  CHECK_SHARED = 2,
  CHECK_ALIGNMENT = 4,
  CHECK_DESCRIPTOR = 8,
  CHECK_MBARRIER = 16,
  CHECK_DEADLOCK = 32,
  CHECK_UNINIT_REGISTER = 64,
  CHECK_UNINIT_SHARED = 128,
  CHECK_UNINIT_GLOBAL = 256,
  CHECK_WGMMA = 512,
  CHECK_PROXY = 1024,
  CHECK_RACE = 2048,
  CHECK_SETMAXNREG = 4096,
  CHECK_EXIT = 8192,
  CHECK_WGMMA_ORDER = 16384
};

enum Completion { COMPLETE_EAGER = 0, COMPLETE_LATE = 1, COMPLETE_RANDOM = 2, COMPLETE_NEWEST = 3 };

typedef struct {
  u32 kind, pc, warp, lane;
  u32 cta[3], fatal;
  u64 address, count, cluster;
  char message[512];
} FindingRecord;

typedef struct {
  u32 num_findings, failed;
  FindingRecord findings[256];
  char report[32768];
} Result;
#endif
