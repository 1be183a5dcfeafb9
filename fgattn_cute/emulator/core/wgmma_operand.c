// SPDX-License-Identifier: Apache-2.0
// Matrix operands in shared memory: descriptors (PTX ISA 9.7.15.5.1), canonical layouts and swizzles, decoding to f32
// with a cache.
#include <stdlib.h>
#include <string.h>
#include "memory.h"
#include "numeric.h"
#include "race.h"
#include "wgmma.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef struct {
  u32 start, leading, stride, base,
      mode;   // bytes; mode: 0 none, 1 128B, 2 64B, 3 32B (the other way round from tensor maps)
  u32 width;  // 16-byte chunks per row of a swizzle atom
} Descriptor;

#define RESERVED_BITS 0x3ff1c000c000c000ull  // bits 14-15, 30-31, 46-48, 52-61
#define ADDRESS_BITS 0x3ffffu

static Descriptor parse(u64 d) {
  static const u32 widths[] = {1, 8, 4, 2};
  u32 mode = (u32)(d >> 62);
  Descriptor r = {(u32)(d & 0x3fff) << 4,
                  (u32)(d >> 16 & 0x3fff) << 4,
                  (u32)(d >> 32 & 0x3fff) << 4,
                  (u32)(d >> 49) & 7,
                  mode,
                  widths[mode]};
  return r;
}

static void check_descriptor(Machine* m, u64 d, const Descriptor* r) {
  if (r->base) fail(m, KIND_UNSUPPORTED, "wgmma descriptor %#lx has base offset %u", (long)d, r->base);
  if (d & RESERVED_BITS)
    fail(m, KIND_DESCRIPTOR, "wgmma descriptor %#lx sets reserved bits (%#lx)", (long)d, (long)(d & RESERVED_BITS));
  // The swizzle is a function of address bits 7 and up; with base offset 0 the 8-row pattern must start where these
  // bits are 0.
  u32 pattern = 128 * r->width - 1;
  if (r->mode && (r->start & pattern) >> 7)
    fail(m, KIND_DESCRIPTOR, "wgmma descriptor %#lx starts at %#x, inside a swizzle pattern of %u bytes", (long)d,
         r->start, pattern + 1);
}

// Shared address (18 bits) of the 16-byte chunk that holds element (mn, k). The swizzle is applied to the absolute
// address, which is why advancing the start by 32 bytes inside an atom steps along k.
static inline u32 chunk_address(const Descriptor* r, u32 mn_major, u32 bytes, u32 mn, u32 k) {
  u32 offset;
  if (!mn_major) {
    u32 chunk = k * bytes >> 4;
    offset = (mn & 7) * 16 * r->width + (mn >> 3) * r->stride + (r->mode ? chunk * 16 : chunk * r->leading);
  } else {
    u32 chunk = mn * bytes >> 4;
    if (!r->mode)
      offset = chunk * r->stride + (k & 7) * 16 + (k >> 3) * r->leading;
    else
      offset =
          (chunk % r->width) * 16 + (chunk / r->width) * r->leading + (k & 7) * (r->width * 16) + (k >> 3) * r->stride;
  }
  u32 address = r->start + offset;
  static const u32 swizzle_bits[] = {0, 0x70, 0x30, 0x10};
  return (address ^ (address >> 3 & swizzle_bits[r->mode])) & ADDRESS_BITS;
}

static inline const u8* chunk_pointer(Machine* m, Cta* cta, u32 address) {
  if (UNLIKELY(address < SMEM_BASE || address + 16 > SMEM_BASE + cta->smem_size))
    fail_at(m, KIND_BOUNDS, -1, address, "wgmma operand at shared address %#x is outside shared memory [%#x, %#x)",
            address, SMEM_BASE, SMEM_BASE + cta->smem_size);
  return cta->smem + address;
}

f32 operand_value(u32 type, const u8* p) {
  switch (type) {
    case OPERAND_BF16: return bf16_to_f32(*(const u16*)p);
    case OPERAND_F16: return f16_to_f32(*(const u16*)p);
    case OPERAND_E4M3: return fp8_e4m3_table[*p];
    case OPERAND_E5M2: return fp8_e5m2_table[*p];
    default: return f32_of(*(const u32*)p & 0xffffe000);  // tf32: the lower bits are ignored
  }
}

// ---- the cache: direct mapped, an entry is valid while the pages it was read from have not been written
#define CACHE_ENTRIES 256
typedef struct {
  const Cta* cta;
  u64 desc, version;
  u32 key;             // role, extent, type, major
  u32 lo, hi;          // shared addresses of the first and last byte
  u32 checked_groups;  // warpgroups that have checked this version
  bool decoded;
  f32* data;
} Operand;
struct OperandCache {
  Operand entry[CACHE_ENTRIES];
};

static u64 version_of(const Cta* cta, u32 lo, u32 hi) {
  u64 sum = 0;
  for (u32 page = lo >> PAGE_SHIFT; page <= hi >> PAGE_SHIFT; page++) sum += cta->page_version[page];
  return sum;
}

static void find_extent(Machine* m, Cta* cta, Operand* e, u32 extent, u32 bytes, u32 mn_major) {
  Descriptor r = parse(e->desc);
  check_descriptor(m, e->desc, &r);
  u32 k_depth = 32 / bytes, step_mn = mn_major ? 16 / bytes : 1, step_k = mn_major ? 1 : 16 / bytes;
  e->lo = ~0u, e->hi = 0;
  for (u32 mn = 0; mn < extent; mn += step_mn)
    for (u32 k = 0; k < k_depth; k += step_k) {
      u32 address = chunk_address(&r, mn_major, bytes, mn, k);
      chunk_pointer(m, cta, address);
      if (address < e->lo) e->lo = address;
      if (address + 15 > e->hi) e->hi = address + 15;
    }
}

static Operand* lookup(Machine* m, Cta* cta, u64 desc, Role role, u32 extent, u32 type, u32 mn_major) {
  if (!m->operands) m->operands = calloc(1, sizeof(OperandCache));
  u32 key = role | extent << 1 | type << 12 | mn_major << 16;
  u64 hash = (desc ^ desc >> 32 ^ (u64)cta->rank << 7 ^ key << 3) * 0x9E3779B97F4A7C15ull;
  Operand* e = &m->operands->entry[hash >> 56];
  if (e->cta != cta || e->desc != desc || e->key != key) {
    e->cta = cta, e->desc = desc, e->key = key;
    e->decoded = false, e->checked_groups = 0;
    find_extent(m, cta, e, extent, operand_bytes(type), mn_major);
    e->version = version_of(cta, e->lo, e->hi);
  }
  u64 version = version_of(cta, e->lo, e->hi);
  if (e->version != version) {
    e->version = version;
    e->decoded = false, e->checked_groups = 0;
  }
  return e;
}

void operand_cache_free(Machine* m) {
  if (!m->operands) return;
  for (int i = 0; i < CACHE_ENTRIES; i++) free(m->operands->entry[i].data);
  free(m->operands);
}

// Column of an operand's row or column in the decoded array.
static inline u32 position(Role role, u32 mn) {
  return role == ROLE_A ? mn : (mn & ~7u) + (mn & 1) * 4 + (mn >> 1 & 3);
}

// Eight rows of eight bf16 elements, transposed; two elements at a time, which become the upper halves of f32.
#ifdef __AVX512F__
static void decode_bf16_rows(const u8* const row[8], f32* into, u32 extent) {
  __m512i halves[2];
  for (int h = 0; h < 2; h++) {
    __m512i v = _mm512_castsi128_si512(_mm_load_si128((const __m128i*)row[4 * h]));
    v = _mm512_inserti32x4(v, _mm_load_si128((const __m128i*)row[4 * h + 1]), 1);
    v = _mm512_inserti32x4(v, _mm_load_si128((const __m128i*)row[4 * h + 2]), 2);
    halves[h] = _mm512_inserti32x4(v, _mm_load_si128((const __m128i*)row[4 * h + 3]), 3);
  }
  // Pair 0 of the eight rows in the lower, pair 1 in the upper half; then pairs 2 and 3.
  __m512i order = _mm512_set_epi32(29, 25, 21, 17, 13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
  for (u32 k = 0; k < 8; k += 4) {
    __m512i both = _mm512_permutex2var_epi32(halves[0], order, halves[1]);
    __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    __m512 high = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
    _mm256_storeu_ps(into + (size_t)k * extent, _mm512_castps512_ps256(low));
    _mm256_storeu_ps(into + (size_t)(k + 1) * extent, _mm512_castps512_ps256(high));
    _mm256_storeu_ps(into + (size_t)(k + 2) * extent,
                     _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(low), 1)));
    _mm256_storeu_ps(into + (size_t)(k + 3) * extent,
                     _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(high), 1)));
    order = _mm512_add_epi32(order, _mm512_set1_epi32(2));
  }
}
#else
static void decode_bf16_rows(const u8* const row[8], f32* into, u32 extent) {
  for (u32 k = 0; k < 8; k++)
    for (u32 i = 0; i < 8; i++) into[(size_t)k * extent + i] = bf16_to_f32(((const u16*)row[i])[k]);
}
#endif
static void decode_k_major(Machine* m, Cta* cta, const Descriptor* r, Role role, u32 extent, u32 type, f32* data) {
  u32 bytes = operand_bytes(type), per_chunk = 16 / bytes, k_depth = 32 / bytes;
  for (u32 mn = 0; mn < extent; mn += 8)
    for (u32 k = 0; k < k_depth; k += per_chunk) {
      const u8* row[8];
      for (u32 i = 0; i < 8; i++) row[position(role, i)] = chunk_pointer(m, cta, chunk_address(r, 0, bytes, mn + i, k));
      f32* into = data + (size_t)k * extent + mn;
      if (type == OPERAND_BF16)
        decode_bf16_rows(row, into, extent);
      else
        for (u32 e = 0; e < per_chunk; e++)
          for (u32 i = 0; i < 8; i++) into[(size_t)e * extent + i] = operand_value(type, row[i] + e * bytes);
    }
}
static void decode_mn_major(Machine* m, Cta* cta, const Descriptor* r, Role role, u32 extent, u32 type, f32* data) {
  for (u32 k = 0; k < 16; k++)
    for (u32 mn = 0; mn < extent; mn += 8) {
      const u16* chunk = (const u16*)chunk_pointer(m, cta, chunk_address(r, 1, 2, mn, k));
      f32* into = data + (size_t)k * extent + mn;
      for (u32 i = 0; i < 8; i++)
        into[position(role, i)] = type == OPERAND_BF16 ? bf16_to_f32(chunk[i]) : f16_to_f32(chunk[i]);
    }
}

const f32* operand_decode(Machine* m, Cta* cta, u64 desc, Role role, u32 extent, u32 type, u32 mn_major) {
  Operand* e = lookup(m, cta, desc, role, extent, type, mn_major);
  if (e->decoded) return e->data;
  if (mn_major && operand_bytes(type) != 2) fail(m, KIND_DESCRIPTOR, "wgmma: only 16-bit operands may be MN-major");
  if (!e->data) e->data = aligned_alloc(64, 32 * 256 * sizeof(f32));
  Descriptor r = parse(desc);
  if (mn_major)
    decode_mn_major(m, cta, &r, role, extent, type, e->data);
  else
    decode_k_major(m, cta, &r, role, extent, type, e->data);
  e->decoded = true;
  return e->data;
}

void operand_check(Machine* m, Warp* leader, u64 desc, Role role, u32 extent, u32 type, u32 mn_major, u32 ticket) {
  Cta* cta = leader->cta;
  Operand* e = lookup(m, cta, desc, role, extent, type, mn_major);
  u32 group = leader->id >> 2, pc = m->fragment->pc;
  bool first = !(e->checked_groups >> group & 1), races = m->checks & CHECK_RACE;
  if (!races && (!first || !(m->checks & (CHECK_PROXY | CHECK_UNINIT_SHARED)))) return;
  e->checked_groups |= 1u << group;
  Descriptor r = parse(desc);
  u64 fenced = last_common_fence(cta, 0xfu << (leader->id & ~3u));
  bool proxy = (m->checks & CHECK_PROXY) && first && !pages_fenced(cta, fenced, e->lo, e->hi),
       uninit = (m->checks & CHECK_UNINIT_SHARED) && first;
  if (!races && !proxy && !uninit) return;
  u32 bytes = operand_bytes(type), k_depth = 32 / bytes, step_mn = mn_major ? 8 : 1, step_k = mn_major ? 1 : 16 / bytes;
  for (u32 mn = 0; mn < extent; mn += step_mn)
    for (u32 k = 0; k < k_depth; k += step_k) {
      u32 address = chunk_address(&r, mn_major, bytes, mn, k) | cta->rank << RANK_SHIFT;
      if (races) race_async_read(m, leader, AGENT_WGMMA, group, ticket, address, 16, pc);
      u32 writer = proxy ? unfenced_writer(m, cta, fenced, address) : 0;
      if (writer)
        warn(m, KIND_PROXY, pc, -1, address,
             "wgmma reads smem+%u, written through the generic proxy by warp %u with no fence.proxy.async after it",
             (address & OFFSET_MASK) - SMEM_BASE, writer - 1);
      if (uninit) shared_check_written(m, cta, address, 16, pc, -1, "wgmma operand");
    }
}
