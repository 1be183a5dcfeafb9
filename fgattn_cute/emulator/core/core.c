// hsim core: a functional interpreter for lowered Hopper PTX (see ptx.py, which lowers the text).
// Execution unit: one warp "fragment" (lanes of a warp that share a pc), 32-lane vector ops.
#define _GNU_SOURCE
#include "core.h"
#include "ops.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <stdarg.h>
#include <setjmp.h>
#include <math.h>
#include <pthread.h>
#include <immintrin.h>

#define SHWIN  0x7000000000000000ull
#define LOCWIN 0x7100000000000000ull
#define SMEM_BASE 1024u          // first byte of user shared memory, as on sm_90
#define SMEM_MAX (228u*1024u)

enum { W_NONE, W_CONV, W_MBAR, W_BAR, W_WGMMA, W_CLUSTER, W_YIELD };
static const char* wname[] = {"runnable","warp reconvergence (.sync)","mbarrier","named barrier","warpgroup (wgmma)","cluster barrier","yield"};

typedef struct { u32 pc, mask, wait, wp, forced; u64 wa; } Frag;
typedef struct { u32 pc, group; u64 da, db; u32 aux; u8 scale, done, move; u32 tick; } WgOp; // move: a register move that waits for the wgmma before it
typedef struct { u32 mask; u32 kind; u32 size; u32 pc; u32 group[32]; u32 dst[32]; u64 src[32]; u32 ssz[32]; u32 noinc, done, tick; u32 vc[MAXA]; } CpOp; // kind 0 copy, 1 mbarrier arrive
typedef struct { u32 kind, lane, group; u32 pc; u64 tmap; u64 gptr; u32 smem; u32 size; s32 crd[5]; u32 red, tick; } BulkOp; // stores; kind 0 tensor, 1 linear
struct CTA;
typedef struct Race Race;
typedef struct Warp {
  u8* rf; Frag fr[32]; int nfr; u32 alive, id; struct CTA* cta; int done;
  WgOp* wg; int nwg, capwg; u32 wgcommit; u32 nflight; u16* flight;
  CpOp* cp; int ncp, capcp; u32 cpcommit[32];
  BulkOp* bk; int nbk, capbk; u32 bkcommit[32];
  u64 fence_time, ins, lastfalse; u8* local;
  u32 vc[MAXA]; u32 fseq, iseq, fenced; u32* wseq;     // register write sequence vs last wgmma.fence
} Warp;
typedef struct { u32 expected, arrived, gen; u32 warps; } NBar;
typedef struct { u32 active, nw; u32 pc; u32 arrived; u64 da, db; } WGroup;
typedef struct CTA {
  u8* smem; u32 smem_size; u32 rank; u32 id[3]; Warp* w; int nw; int alive;
  NBar bar[16]; WGroup wgp[32]; u32 pagever[256]; u64* shadow; struct { u32 addr; } mbars[512]; int nmbar;
  Race* race;
} CTA;
typedef struct { u32 kind; CTA* cta; u64 tmap, gptr; u32 smem, mbar, size; s32 crd[5]; u32 pc; u32 mcast, tick; u32 vc[MAXA]; } TmaOp;
typedef struct { u64 db; u32 N, ty, tr, K; CTA* cta; u64 ver; u32 lo, hi; f32* buf; u64 stamp; } BEnt;
#define NBC 48
typedef struct Ctx {
  const Kernel* k; const Launch* L; Result* R; jmp_buf jb;
  CTA* ctas; int ncta; u32 clid[3];
  TmaOp* tq; int ntq, captq; u64 progress; u64 rng; u64 ins, lane_ins, wgmma, tma_bytes, switches, stalls;
  u32 last_alloc; BEnt bc[NBC]; u64 stamp; u32 cl_arrived, cl_gen, cl_total; int allow_secondary;
  Warp* cw; Frag* cf; u64 hist[4096]; u64 clock, ftime; TMap tm;
  f32 Av[64][2][32] __attribute__((aligned(64)));
} Ctx;

static pthread_mutex_t g_atom = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t g_res = PTHREAD_MUTEX_INITIALIZER;

static void __attribute__((noreturn, format(printf,2,3))) fail(Ctx* c, const char* fmt, ...) {
  va_list ap; va_start(ap, fmt);
  pthread_mutex_lock(&g_res);
  if (!c->R->code) {
    c->R->code = 1;
    int n = vsnprintf(c->R->msg, sizeof c->R->msg, fmt, ap); (void)n;
    c->R->pc = c->cf ? c->cf->pc : NONE; c->R->warp = c->cw ? c->cw->id : NONE;
    c->R->lane = c->cf ? c->cf->mask : 0;
    if (c->cw) memcpy(c->R->cta, c->cw->cta->id, 12);
  }
  pthread_mutex_unlock(&g_res);
  va_end(ap); longjmp(c->jb, 1);
}
static void __attribute__((format(printf,3,4))) warnf(Ctx* c, u32 pc, const char* fmt, ...) {
  char b[512]; va_list ap; va_start(ap, fmt); vsnprintf(b, sizeof b, fmt, ap); va_end(ap);
  pthread_mutex_lock(&g_res);
  c->R->nwarn++;
  size_t n = strlen(c->R->warn);
  char key[32]; snprintf(key, sizeof key, "pc %u:", pc);
  if (!strstr(c->R->warn, key) && n + strlen(b) + 40 < sizeof c->R->warn)
    sprintf(c->R->warn + n, "%s %s (cta %u,%u,%u warp %d)\n", key, b, c->cw?c->cw->cta->id[0]:0, c->cw?c->cw->cta->id[1]:0, c->cw?c->cw->cta->id[2]:0, c->cw?(int)c->cw->id:-1);
  pthread_mutex_unlock(&g_res);
}
static inline u64 rnd(Ctx* c) { u64 x = c->rng; x ^= x << 13; x ^= x >> 7; x ^= x << 17; return c->rng = x; }

// ---------------------------------------------------------------- number formats
static inline f32 asf(u32 x) { f32 f; memcpy(&f, &x, 4); return f; }
static inline u32 asu(f32 f) { u32 x; memcpy(&x, &f, 4); return x; }
static inline f32 bf2f(u16 h) { return asf((u32)h << 16); }
static inline u16 f2bf(f32 f) { u32 x = asu(f); if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff; return (u16)((x + 0x7fff + ((x >> 16) & 1)) >> 16); }
static inline u16 f2bf_rz(f32 f) { u32 x = asu(f); if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff; return (u16)(x >> 16); }
static inline f32 hf2f(u16 h) { return _cvtsh_ss(h); }
static inline u16 f2hf(f32 f) { if (f != f) return 0x7fff; return _cvtss_sh(f, 0); }
static inline u16 f2hf_rz(f32 f) { if (f != f) return 0x7fff; return _cvtss_sh(f, 3); }
static f32 T_e4m3[256], T_e5m2[256];
static void fp8_init(void) {
  for (int i = 0; i < 256; i++) {
    int s = i >> 7, e = (i >> 3) & 15, m = i & 7; f32 v;
    if (e == 15 && m == 7) v = NAN; else if (e == 0) v = ldexpf(m, -9); else v = ldexpf(8 + m, e - 10);
    T_e4m3[i] = s ? -v : v;
    e = (i >> 2) & 31; m = i & 3;
    if (e == 31) v = m ? NAN : INFINITY; else if (e == 0) v = ldexpf(m, -16); else v = ldexpf(4 + m, e - 17);
    T_e5m2[i] = s ? -v : v;
  }
}
// round-to-nearest-even to an fp8 format, saturating to finite
static u8 f2fp8(f32 f, int e5) {
  u8 sg = (asu(f) >> 31) << 7;
  if (f != f) return 0x7f;
  f32 a = fabsf(f); f32 mx = e5 ? 57344.f : 448.f;
  if (a >= mx) return sg | (e5 ? 0x7b : 0x7e);
  const f32* T = e5 ? T_e5m2 : T_e4m3; int lo = 0, hi = e5 ? 0x7b : 0x7e;
  while (hi - lo > 1) { int md = (lo + hi) / 2; if (T[md] <= a) lo = md; else hi = md; }
  f32 dl = a - T[lo], dh = T[hi] - a;
  int r = dl < dh ? lo : dh < dl ? hi : (lo & 1 ? hi : lo);
  return sg | r;
}
static inline f32 ftzf(f32 x) { u32 u = asu(x); return (u & 0x7f800000) ? x : asf(u & 0x80000000); }
static inline f32 ex2f(f32 x) {
  f32 xc = x < -160.f ? -160.f : x; xc = xc > 130.f ? 130.f : xc;
  f32 n = rintf(xc), f = xc - n;
  f32 p = 1.5403530e-4f; p = fmaf(p, f, 1.3333558e-3f); p = fmaf(p, f, 9.6181291e-3f); p = fmaf(p, f, 5.5504109e-2f);
  p = fmaf(p, f, 2.4022651e-1f); p = fmaf(p, f, 6.9314718e-1f); p = fmaf(p, f, 1.0f);
  int i = (int)n, i1 = i >> 1, i2 = i - i1;
  return p * asf((u32)(i1 + 127) << 23) * asf((u32)(i2 + 127) << 23);
}
static inline f32 fminp(f32 a, f32 b) { return a != a ? (b != b ? asf(0x7fffffff) : b) : b != b ? a : (a < b || (a == b && asu(a) >> 31)) ? a : b; }
static inline f32 fmaxp(f32 a, f32 b) { return a != a ? (b != b ? asf(0x7fffffff) : b) : b != b ? a : (a > b || (a == b && !(asu(a) >> 31))) ? a : b; }
static inline f32 fminn(f32 a, f32 b) { return (a != a || b != b) ? asf(0x7fffffff) : fminp(a, b); }
static inline f32 fmaxn(f32 a, f32 b) { return (a != a || b != b) ? asf(0x7fffffff) : fmaxp(a, b); }
static inline f32 satf(f32 a) { return a != a ? 0.f : a < 0.f ? 0.f : a > 1.f ? 1.f : a; }

// ---------------------------------------------------------------- memory
static inline void galloc_check(Ctx* c, u64 p, u64 n, const char* what) {
  const Alloc* A = c->L->alloc; u32 na = c->L->nalloc;
  if (c->last_alloc < na && p >= A[c->last_alloc].lo && p + n <= A[c->last_alloc].hi) return;
  u32 lo = 0, hi = na;
  while (lo < hi) { u32 md = (lo + hi) / 2; if (A[md].lo <= p) lo = md + 1; else hi = md; }
  if (lo && p + n <= A[lo - 1].hi) { c->last_alloc = lo - 1; return; }
  char near[256] = "";
  if (lo) snprintf(near, sizeof near, "; nearest allocation below [%#lx,%#lx): %ld bytes past its end", A[lo-1].lo, A[lo-1].hi, (long)(p + n - A[lo-1].hi));
  fail(c, "%s of %lu bytes at %#lx is outside every registered allocation%s", what, (unsigned long)n, (unsigned long)p, near);
}
static CTA* sh_cta(Ctx* c, CTA* cta, u32 addr) {
  u32 r = addr >> 24; if (r == cta->rank) return cta;
  if (r < (u32)c->ncta) return &c->ctas[r];
  fail(c, "shared address %#x names cluster rank %u of %d", addr, r, c->ncta);
}
static inline u8* shp(Ctx* c, CTA* cta, u32 addr, u32 n, const char* what) {
  if (__builtin_expect((addr >> 24) != cta->rank, 0)) cta = sh_cta(c, cta, addr);
  u32 o = addr & 0xffffff;
  if (__builtin_expect(o < SMEM_BASE || o + n > SMEM_BASE + cta->smem_size, 0))
    fail(c, "%s of %u bytes at shared address %#x is outside shared memory [%#x,%#x)", what, n, addr, SMEM_BASE, SMEM_BASE + cta->smem_size);
  return cta->smem + o;
}
static inline void sh_wrote(Ctx* c, CTA* cta, u32 addr, u32 n) {
  if ((addr >> 24) != cta->rank) cta = sh_cta(c, cta, addr);
  u32 o = addr & 0xffffff; cta->pagever[o >> 10]++; if (((o + n - 1) >> 10) != (o >> 10)) for (u32 p = (o >> 10) + 1; p <= (o + n - 1) >> 10; p++) cta->pagever[p]++;
}
static inline void shadow_generic(Ctx* c, Warp* w, u32 addr, u32 n) {
  CTA* cta = w->cta; if ((addr >> 24) != cta->rank) return;
  u32 o = addr & 0xffffff; for (u32 g = o >> 4; g <= (o + n - 1) >> 4; g++) cta->shadow[g] = (u64)(w->id + 1) << 48 | c->ftime;
}
static void shadow_async_write(Ctx* c, CTA* cta, u32 addr, u32 n) {
  if (!cta->shadow) return;
  u32 o = addr & 0xffffff; for (u32 g = o >> 4; g <= (o + n - 1) >> 4; g++) cta->shadow[g] = 0;
}
// a generic write is fine once its writer, or the warp that starts the asynchronous read, has run fence.proxy.async after it
static inline int shadow_bad(Warp* rd, u32 o) {
  CTA* cta = rd->cta; u64 s = cta->shadow[o >> 4]; if (!s) return 0;
  u32 wr = (u32)(s >> 48) - 1; u64 t = s & 0xffffffffffffull; return cta->w[wr].fence_time > t || rd->fence_time > t ? 0 : (int)wr + 1;
}
static u8* gp(Ctx* c, Warp* w, u64 addr, u32 n, int lane, int space, const char* what, int wr) {
  // space 0 generic 1 global 2 shared 3 param/const 4 local
  if (space == 2) return shp(c, w->cta, (u32)addr, n, what);
  if (space == 4 || (addr >> 56) == 0x71) {
    u64 o = addr & 0xffffffff; if (o + n > c->k->local_bytes) fail(c, "%s of %u bytes at local %#lx outside %u", what, n, (long)addr, c->k->local_bytes);
    return w->local + (size_t)lane * c->k->local_bytes + o;
  }
  if ((addr >> 56) == 0x70) { if (space == 1) fail(c, "%s.global at a shared address %#lx", what, (long)addr); return shp(c, w->cta, (u32)addr, n, what); }
  if (addr & (n - 1)) fail(c, "%s of %u bytes at misaligned address %#lx (lane %d)", what, n, (long)addr, lane);
  galloc_check(c, addr, n, what); return (u8*)addr;
}
#include "race_inc.h"
// ---------------------------------------------------------------- mbarrier (state kept in its 64 bits of shared memory)
// [0,20) pending arrivals, [20,40) expected, [40,61) tx count biased by 2^20, 61 phase, [62,64) = 1
#define MB_PEND(v) ((u32)((v) & 0xfffff))
#define MB_EXP(v) ((u32)(((v) >> 20) & 0xfffff))
#define MB_TX(v) ((s32)(((v) >> 40) & 0x1fffff) - (1 << 20))
#define MB_PH(v) ((u32)(((v) >> 61) & 1))
static inline u64 mb_make(u32 p, u32 e, s32 tx, u32 ph) { return (u64)p | (u64)e << 20 | (u64)(u32)(tx + (1 << 20)) << 40 | (u64)ph << 61 | 1ull << 62; }
static u64* mb_get(Ctx* c, CTA* cta, u32 addr, const char* what) {
  if (addr & 7) fail(c, "%s: mbarrier address %#x is not 8-byte aligned", what, addr);
  u64* p = (u64*)shp(c, cta, addr, 8, what);
  if ((*p >> 62) != 1) fail(c, "%s: no initialised mbarrier at shared address %#x (+%d from smem base), content %#lx", what, addr, (int)(addr & 0xffffff) - (int)SMEM_BASE, (long)*p);
  return p;
}
static void mb_update(Ctx* c, CTA* cta, u32 addr, u64* p, u32 pend, u32 exp, s32 tx, u32 ph) {
  if (tx >= (1 << 20) || tx <= -(1 << 20)) fail(c, "mbarrier tx-count overflow (%d)", tx);
  if (pend == 0 && tx == 0) { ph ^= 1; pend = exp; race_phase(c, cta, addr); }
  *p = mb_make(pend, exp, tx, ph); c->progress++;
}
static u64 mb_arrive(Ctx* c, CTA* cta, u32 addr, u32 cnt, s32 txadd, const char* what) {
  u64* p = mb_get(c, cta, addr, what); u64 v = *p; u32 pend = MB_PEND(v);
  if (cnt > pend) fail(c, "%s at shared %#x: arrive count %u exceeds the pending count %u (expected %u, tx %d, phase %u): too many arrivals in this phase", what, addr, cnt, pend, MB_EXP(v), MB_TX(v), MB_PH(v));
  mb_update(c, cta, addr, p, pend - cnt, MB_EXP(v), MB_TX(v) + txadd, MB_PH(v)); return v;
}
static void mb_tx(Ctx* c, CTA* cta, u32 addr, s32 d, const char* what) {
  u64* p = mb_get(c, cta, addr, what); u64 v = *p; mb_update(c, cta, addr, p, MB_PEND(v), MB_EXP(v), MB_TX(v) + d, MB_PH(v));
}
// ---------------------------------------------------------------- TMA
static inline u32 swz(u32 a, u32 mode) { // TMA swizzle modes: 0 none 1 32B 2 64B 3 128B
  switch (mode) { case 1: return a ^ ((a >> 3) & 0x10); case 2: return a ^ ((a >> 3) & 0x30); case 3: return a ^ ((a >> 3) & 0x70); } return a;
}
static const TMap* tmap_get(Ctx* c, u64 a) {
  if (a & 63) fail(c, "tensor map address %#lx is not 64-byte aligned", (long)a);
  galloc_check(c, a, 128, "tensor map read");
  const char* e = tmap_decode((const void*)a, &c->tm); if (e) fail(c, "tensor map at %#lx: %s (%08x %08x %08x %08x)", (long)a, e, ((u32*)a)[2], ((u32*)a)[3], ((u32*)a)[13], ((u32*)a)[14]);
  return &c->tm;
}
static u32 tmap_bytes(const TMap* t) { u32 n = t->esize; for (u32 i = 0; i < t->rank; i++) n *= t->box[i]; return n; }
static u32 oobfill(const TMap* t, u8* row, u32 n) {
  if (!t->oob) { memset(row, 0, n); return 0; }
  if (t->esize == 2) for (u32 i = 0; i < n / 2; i++) ((u16*)row)[i] = 0x7fff; else for (u32 i = 0; i < n / 4; i++) ((u32*)row)[i] = 0x7fffffff;
  return 1;
}
static inline void red_one(Ctx* c, u32 red, u8* g, const u8* s, int dtype, int esize);
// dir 0 load, 1 store, 2 reduce (red: 1 add 2 min 3 max 4 and 5 or 6 xor)
static void tma_tile(Ctx* c, CTA* cta, const TMap* t, const s32* crd, u32 smem, int dir, u32 red) {
  u32 rowb = t->box[0] * t->esize; u8 row[4096];
  if ((smem & 127)) fail(c, "TMA tile at shared address %#x: must be 128-byte aligned", smem);
  u32 span = t->swizzle == 1 ? 32 : t->swizzle == 2 ? 64 : t->swizzle == 3 ? 128 : 0;
  if (span && rowb != span) fail(c, "TMA box inner dimension of %u bytes with swizzle span %u: unsupported by this emulator", rowb, span);
  u32 total = tmap_bytes(t); shp(c, cta, smem, total, dir ? "TMA store source" : "TMA load destination");
  u8* sm = sh_cta(c, cta, smem)->smem; u32 so = smem & 0xffffff;
  u32 n1 = t->rank > 1 ? t->box[1] : 1, n2 = t->rank > 2 ? t->box[2] : 1, n3 = t->rank > 3 ? t->box[3] : 1, n4 = t->rank > 4 ? t->box[4] : 1;
  s64 x0 = crd[0], lo = x0 < 0 ? -x0 : 0, hi = (s64)t->dim[0] - x0; if (hi > (s64)t->box[0]) hi = t->box[0]; if (lo > hi) lo = hi;
  for (u32 i4 = 0; i4 < n4; i4++) for (u32 i3 = 0; i3 < n3; i3++) for (u32 i2 = 0; i2 < n2; i2++) for (u32 i1 = 0; i1 < n1; i1++) {
    u32 ii[5] = {0, i1, i2, i3, i4}; int ok = hi > lo; u64 g = t->gaddr;
    for (u32 d = 1; d < t->rank; d++) { s64 x = (s64)crd[d] + ii[d]; if (x < 0 || x >= (s64)t->dim[d]) ok = 0; else g += (u64)x * t->stride[d - 1]; }
    u32 off = so; 
    if (dir == 0) {
      oobfill(t, row, rowb);
      if (ok) { u64 ga = g + (x0 + lo) * t->esize; u32 nb = (u32)(hi - lo) * t->esize; galloc_check(c, ga, nb, "TMA load"); memcpy(row + lo * t->esize, (void*)ga, nb); }
      if (!t->swizzle) memcpy(sm + off, row, rowb); else for (u32 b = 0; b < rowb; b += 16) memcpy(sm + swz(off + b, t->swizzle), row + b, 16);
    } else {
      if (ok) {
        if (!t->swizzle) memcpy(row, sm + off, rowb); else for (u32 b = 0; b < rowb; b += 16) memcpy(row + b, sm + swz(off + b, t->swizzle), 16);
        u64 ga = g + (x0 + lo) * t->esize; u32 nb = (u32)(hi - lo) * t->esize; galloc_check(c, ga, nb, "TMA store");
        if (dir == 1) memcpy((void*)ga, row + lo * t->esize, nb);
        else { pthread_mutex_lock(&g_atom); for (u32 b = 0; b < nb; b += t->esize) red_one(c, red, (u8*)ga + b, row + lo * t->esize + b, t->dtype, t->esize); pthread_mutex_unlock(&g_atom); }
      }
    }
    so += rowb;
  }
  c->tma_bytes += total;
  if (dir == 0) { sh_wrote(c, cta, smem, total); shadow_async_write(c, sh_cta(c, cta, smem), smem, total); }
}
// dtype: TM_*
static inline void red_one(Ctx* c, u32 red, u8* g, const u8* s, int dtype, int esize) {
  #define RI(T) { T a, b; memcpy(&a, g, sizeof a); memcpy(&b, s, sizeof b); a = red==1 ? a+b : red==2 ? (b<a?b:a) : red==3 ? (b>a?b:a) : red==4 ? (a&b) : red==5 ? (a|b) : (a^b); memcpy(g, &a, sizeof a); break; }
  switch (dtype) {
    case 0: RI(u8) case 1: RI(u16) case 2: RI(u32) case 3: RI(s32) case 4: RI(u64) case 5: RI(s64)
    case TM_F16: case TM_BF16: { u16 a, b; memcpy(&a, g, 2); memcpy(&b, s, 2); f32 x = dtype==TM_F16?hf2f(a):bf2f(a), y = dtype==TM_F16?hf2f(b):bf2f(b), r = red==1?x+y:red==2?fminp(x,y):fmaxp(x,y); a = dtype==TM_F16?f2hf(r):f2bf(r); memcpy(g,&a,2); break; }
    case TM_F32: case TM_F32FTZ: { f32 a, b; memcpy(&a, g, 4); memcpy(&b, s, 4); a = red==1?a+b:red==2?fminp(a,b):fmaxp(a,b); memcpy(g,&a,4); break; }
    case TM_F64: { f64 a, b; memcpy(&a, g, 8); memcpy(&b, s, 8); a += b; memcpy(g,&a,8); break; }
    default: fail(c, "reduction on tensor map data type %d", dtype);
  }
}
static void tma_exec(Ctx* c, TmaOp* o) {
  u32 n;
  if (o->cta->race) { RMbar* rm = race_mb(c, o->cta->race, o->mbar); race_join(rm->acc, o->vc); int a = race_actor(c, o->cta->race, RK_TMA, o->mbar); if (rm->acc[a] < o->tick) rm->acc[a] = o->tick; }
  if (o->kind == 0) { const TMap* t = tmap_get(c, o->tmap); n = tmap_bytes(t);
    if (!o->mcast) { tma_tile(c, o->cta, t, o->crd, o->smem, 0, 0); mb_tx(c, o->cta, o->mbar, -(s32)n, "TMA complete_tx"); }
    else for (int r = 0; r < c->ncta; r++) if (o->mcast >> r & 1) { u32 sa = (o->smem & 0xffffff) | r << 24, ma = (o->mbar & 0xffffff) | r << 24; tma_tile(c, &c->ctas[r], t, o->crd, sa, 0, 0); mb_tx(c, &c->ctas[r], ma, -(s32)n, "TMA complete_tx"); }
  } else { n = o->size;
    u32 nr = o->mcast ? c->ncta : 1;
    for (u32 r = 0; r < nr; r++) { if (o->mcast && !(o->mcast >> r & 1)) continue;
      u32 sa = o->mcast ? ((o->smem & 0xffffff) | r << 24) : o->smem, ma = o->mcast ? ((o->mbar & 0xffffff) | r << 24) : o->mbar;
      const u8* src; if ((o->gptr >> 56) == 0x70) src = shp(c, o->cta, (u32)o->gptr, n, "bulk copy source"); else { galloc_check(c, o->gptr, n, "bulk copy load"); src = (u8*)o->gptr; }
      memcpy(shp(c, o->cta, sa, n, "bulk copy destination"), src, n); sh_wrote(c, o->cta, sa, n); shadow_async_write(c, sh_cta(c, o->cta, sa), sa, n);
      mb_tx(c, o->cta, ma, -(s32)n, "bulk copy complete_tx"); c->tma_bytes += n; }
  }
  c->progress++;
}
static void tma_issue(Ctx* c, TmaOp* o) {
  if (o->kind == 0) { tmap_get(c, o->tmap); }
  mb_get(c, o->cta, o->mbar, "TMA load");
  if (o->cta->race) { Race* r = o->cta->race; int a = race_actor(c, r, RK_TMA, o->mbar); o->tick = ++r->tick[a]; memcpy(o->vc, c->cw->vc, sizeof o->vc); race_write(c, c->cw, o->pc, o->smem, o->kind == 0 ? tmap_bytes(&c->tm) : o->size, a, o->tick, "TMA write to"); }
  u32 mode = c->L->async_tma; if (mode == 0 || (mode == 2 && (rnd(c) & 1))) { tma_exec(c, o); return; }
  if (c->ntq == c->captq) { c->captq = c->captq ? 2 * c->captq : 64; c->tq = realloc(c->tq, c->captq * sizeof(TmaOp)); }
  c->tq[c->ntq++] = *o;
}
static void bulk_exec(Ctx* c, Warp* w, BulkOp* o) {
  if (o->kind == 0) { const TMap* t = tmap_get(c, o->tmap); tma_tile(c, w->cta, t, o->crd, o->smem, o->red ? 2 : 1, o->red); }
  else { u8* s = shp(c, w->cta, o->smem, o->size, "bulk copy source"); galloc_check(c, o->gptr, o->size, "bulk copy store");
    if (!o->red) memcpy((void*)o->gptr, s, o->size);
    else { int dt = o->red >> 8, es = tm_esize[dt]; pthread_mutex_lock(&g_atom); for (u32 b = 0; b < o->size; b += es) red_one(c, o->red & 255, (u8*)o->gptr + b, s + b, dt, es); pthread_mutex_unlock(&g_atom); }
    c->tma_bytes += o->size; }
  c->progress++;
}
static void bulk_check(Ctx* c, Warp* w, BulkOp* o, u32 n) {
  if (!(c->L->checks & 2)) return;
  for (u32 a = 0; a < n; a += 16) { int b = shadow_bad(w, ((o->smem & 0xffffff) + a)); if (b) { warnf(c, o->pc, "bulk/TMA store reads shared +%#x written through the generic proxy by warp %d with no fence.proxy.async after it", (o->smem & 0xffffff) + a - SMEM_BASE, b - 1); break; } }
}
static void bulk_issue(Ctx* c, Warp* w, BulkOp* o) {
  u32 n = o->kind ? o->size : tmap_bytes(tmap_get(c, o->tmap)); bulk_check(c, w, o, n);
  o->group = w->bkcommit[o->lane];
  if (w->cta->race) { Race* r = w->cta->race; int a = race_actor(c, r, RK_BULK, w->id); o->tick = ++r->tick[a]; race_read(c, w, o->pc, o->smem, n, a, o->tick, "bulk/TMA store read of"); }
  u32 mode = c->L->async_tma; if (mode == 0 || (mode == 2 && (rnd(c) & 1))) { bulk_exec(c, w, o); o->kind |= 0x100; }
  if (w->nbk == w->capbk) { w->capbk = w->capbk ? 2 * w->capbk : 16; w->bk = realloc(w->bk, w->capbk * sizeof(BulkOp)); }
  w->bk[w->nbk++] = *o;
}
static void bulk_wait(Ctx* c, Warp* w, u32 m, u32 keep) {
  int j = 0;
  for (int i = 0; i < w->nbk; i++) { BulkOp* o = &w->bk[i];
    if ((m >> o->lane & 1) && (s64)o->group < (s64)w->bkcommit[o->lane] - (s64)keep) { if (!(o->kind & 0x100)) bulk_exec(c, w, o); if (w->cta->race) { int a = race_actor(c, w->cta->race, RK_BULK, w->id); if (w->vc[a] < o->tick) w->vc[a] = o->tick; } }
    else w->bk[j++] = *o; }
  w->nbk = j;
}
// ---------------------------------------------------------------- cp.async
static void cp_exec_lane(Ctx* c, Warp* w, CpOp* o, int l) {
  if (o->kind == 1) { mb_arrive(c, w->cta, o->dst[l], 1, 0, "cp.async.mbarrier.arrive"); return; }
  u8* d = shp(c, w->cta, o->dst[l], o->size, "cp.async destination");
  if (o->ssz[l]) { galloc_check(c, o->src[l], o->ssz[l], "cp.async source"); memcpy(d, (void*)o->src[l], o->ssz[l]); }
  if (o->ssz[l] < o->size) memset(d + o->ssz[l], 0, o->size - o->ssz[l]);
  sh_wrote(c, w->cta, o->dst[l], o->size);
  if (c->L->checks & 2) shadow_generic(c, w, o->dst[l], o->size);
}
static void cp_exec(Ctx* c, Warp* w, CpOp* o, u32 m) {
  if (o->kind == 1 && w->cta->race) for (int l = 0; l < 32; l++) if (m >> l & 1) { RMbar* rm = race_mb(c, w->cta->race, o->dst[l]); race_join(rm->acc, o->vc); }
  for (int l = 0; l < 32; l++) if (m >> l & 1) cp_exec_lane(c, w, o, l); c->progress++; }
static void cp_issue(Ctx* c, Warp* w, CpOp* o) {
  u32 mode = c->L->async_cp; o->done = 0; o->tick = 0;
  if (w->cta->race) { Race* r = w->cta->race; int a = race_actor(c, r, RK_CP, w->id);
    if (o->kind == 0) { o->tick = ++r->tick[a]; for (int l = 0; l < 32; l++) if (o->mask >> l & 1) race_write(c, w, o->pc, o->dst[l], o->size, a, o->tick, "cp.async write to"); }
    else { memcpy(o->vc, w->vc, sizeof o->vc); o->vc[a] = r->tick[a]; w->vc[w->id]++; } }
  int pend = 0; for (int i = 0; i < w->ncp; i++) pend |= !w->cp[i].done;
  if (mode == 0 || (!pend && (o->kind == 1 || (mode == 2 && (rnd(c) & 1))))) { cp_exec(c, w, o, o->mask); o->done = 1; if (o->kind == 1) { w->ncp = 0; return; } }
  for (int l = 0; l < 32; l++) o->group[l] = w->cpcommit[l];
  if (w->ncp == w->capcp) { w->capcp = w->capcp ? 2 * w->capcp : 32; w->cp = realloc(w->cp, w->capcp * sizeof(CpOp)); }
  w->cp[w->ncp++] = *o;
}
static void cp_wait(Ctx* c, Warp* w, u32 m, u32 keep, int all) {
  int j = 0;
  for (int i = 0; i < w->ncp; i++) { CpOp* o = &w->cp[i]; u32 r = 0;
    for (int l = 0; l < 32; l++) if ((o->mask & m) >> l & 1) if (all || (s64)o->group[l] < (s64)w->cpcommit[l] - (s64)keep) r |= 1u << l;
    if (r) { if (!o->done) cp_exec(c, w, o, r); o->mask &= ~r; }
    if (o->mask) { if (j != i) w->cp[j] = *o; j++; } else if (w->cta->race && o->tick) { int a = race_actor(c, w->cta->race, RK_CP, w->id); if (w->vc[a] < o->tick) w->vc[a] = o->tick; } }
  w->ncp = j;
}
// at a global stall: complete the oldest unfinished record of a warp; an mbarrier arrive retires everything before it
static int cp_force_one(Ctx* c, Warp* w) {
  for (int i = 0; i < w->ncp; i++) if (!w->cp[i].done) { CpOp* o = &w->cp[i]; cp_exec(c, w, o, o->mask); o->done = 1;
    if (o->kind == 1) { memmove(w->cp, w->cp + i + 1, (w->ncp - i - 1) * sizeof(CpOp)); w->ncp -= i + 1; } return 1; }
  return 0;
}
// ---------------------------------------------------------------- wgmma
// operand types: 0 bf16 1 f16 2 e4m3 3 e5m2 4 tf32
static const int ty_es[] = {2, 2, 1, 1, 4};
static inline f32 ty_get(int ty, const u8* p) {
  switch (ty) { case 0: return bf2f(*(u16*)p); case 1: return hf2f(*(u16*)p); case 2: return T_e4m3[*p]; case 3: return T_e5m2[*p]; default: return asf(*(u32*)p & 0xffffe000); }
}
typedef struct { u32 start, lbo, sbo, base, mode; } MDesc;
static MDesc mdesc(u64 d) { MDesc r; r.start = (u32)(d & 0x3fff) << 4; r.lbo = (u32)((d >> 16) & 0x3fff) << 4; r.sbo = (u32)((d >> 32) & 0x3fff) << 4; r.base = (u32)(d >> 49) & 7; r.mode = (u32)(d >> 62); return r; }
// byte address (18 bits) of the 16-byte chunk that holds element (mn,k)
static inline u32 md_chunk(const MDesc* m, int trans, int es, u32 mn, u32 k) {
  static const u32 W[4] = {1, 8, 4, 2}; u32 w = W[m->mode], off;
  if (!trans) { u32 ck = (k * es) >> 4; off = (mn & 7) * 16 * w + (mn >> 3) * m->sbo + (m->mode ? ck * 16 : ck * m->lbo); }
  else { u32 cm = (mn * es) >> 4;
    if (!m->mode) off = cm * m->sbo + (k & 7) * 16 + (k >> 3) * m->lbo;
    else off = (cm % w) * 16 + (cm / w) * m->lbo + (k & 7) * (w * 16) + (k >> 3) * m->sbo; }
  u32 a = m->start + off;
  if (m->mode == 1) a ^= (a >> 3) & 0x70; else if (m->mode == 2) a ^= (a >> 3) & 0x30; else if (m->mode == 3) a ^= (a >> 3) & 0x10;
  return a;
}
static inline const u8* wg_sh(Ctx* c, CTA* cta, u32 a) {
  a &= 0x3ffff;
  if (a < SMEM_BASE || a + 16 > SMEM_BASE + cta->smem_size) fail(c, "wgmma operand read at shared %#x is outside shared memory [%#x,%#x)", a, SMEM_BASE, SMEM_BASE + cta->smem_size);
  return cta->smem + a;
}
static void wg_descchk(Ctx* c, const MDesc* m) { if (m->base) fail(c, "wgmma descriptor base offset %u: unsupported by this emulator", m->base); }
// aux layout: 0 nD, 1 N, 2 tyA, 3 tyB, 4 dtypeD(0 f32 1 f16), 5 negA, 6 negB, 7 tA, 8 tB, 9 amode(0 desc 1 regs), 10 scale pred off, 11 descA off, 12 descB off, 13.. A regs(4), 17.. D regs
static u64 pages(CTA* cta, u32 lo, u32 hi) { u64 s = 0; for (u32 p = lo >> 10; p <= hi >> 10 && p < 256; p++) s += cta->pagever[p]; return s; }
static const f32* wg_decodeB(Ctx* c, CTA* cta, u64 db, u32 N, u32 ty, u32 tr, u32 K) {
  BEnt* best = &c->bc[0];
  for (int i = 0; i < NBC; i++) { BEnt* e = &c->bc[i];
    if (e->buf && e->db == db && e->N == N && e->ty == ty && e->tr == tr && e->cta == cta && pages(cta, e->lo, e->hi) == e->ver) { e->stamp = ++c->stamp; return e->buf; }
    if (e->stamp < best->stamp) best = e; }
  BEnt* e = best; if (!e->buf) e->buf = aligned_alloc(64, 32 * 256 * 4);
  MDesc m = mdesc(db); wg_descchk(c, &m); int es = ty_es[ty]; u32 lo = ~0u, hi = 0; f32* B = e->buf; u32 J = N / 8;
  // B[(k*J + j)*8 + p*4 + t] = b(k, n = 8j+2t+p)
  if (!tr) { u32 per = 16 / es;
    for (u32 n = 0; n < N; n++) for (u32 k0 = 0; k0 < K; k0 += per) { u32 a = md_chunk(&m, 0, es, n, k0); const u8* s = wg_sh(c, cta, a); if (a < lo) lo = a; if (a > hi) hi = a;
      f32* d = B + (n >> 3) * 8 + (n & 1) * 4 + ((n >> 1) & 3);
      if (ty == 0) for (u32 i = 0; i < 8; i++) d[(k0 + i) * J * 8] = bf2f(((u16*)s)[i]);
      else for (u32 i = 0; i < per; i++) d[(k0 + i) * J * 8] = ty_get(ty, s + i * es); }
  } else {
    if (es != 2) fail(c, "wgmma: transposed operand needs a 16-bit type");
    for (u32 k = 0; k < K; k++) for (u32 j = 0; j < J; j++) { u32 a = md_chunk(&m, 1, 2, j * 8, k); const u16* s = (const u16*)wg_sh(c, cta, a); if (a < lo) lo = a; if (a > hi) hi = a;
      f32* d = B + (k * J + j) * 8; for (u32 i = 0; i < 8; i++) d[(i & 1) * 4 + (i >> 1)] = ty == 0 ? bf2f(s[i]) : hf2f(s[i]); }
  }
  e->db = db; e->N = N; e->ty = ty; e->tr = tr; e->K = K; e->cta = cta; e->lo = lo & 0x3ffff; e->hi = (hi & 0x3ffff) + 15; e->ver = pages(cta, e->lo, e->hi); e->stamp = ++c->stamp;
  return B;
}
static void wg_exec(Ctx* c, Warp* w, WgOp* o) {
  const u32* X = c->k->aux + o->aux; u32 N = X[1], tyA = X[2], tyB = X[3]; int esA = ty_es[tyA]; u32 K = 32 / esA, J = N / 8; u8* rf = w->rf;
  f32 (*Av)[2][32] = c->Av; f32 sg = X[5] ^ X[6] ? -1.f : 1.f; u32 wr = (w->id & 3) * 16;
  if (!X[9]) { MDesc m = mdesc(o->da); wg_descchk(c, &m);
    f32 T[64][16] __attribute__((aligned(64))); // [k][row]
    if (!X[7]) { u32 per = 16 / esA; for (u32 r = 0; r < 16; r++) for (u32 k0 = 0; k0 < K; k0 += per) { const u8* s = wg_sh(c, w->cta, md_chunk(&m, 0, esA, wr + r, k0));
        if (tyA == 0) for (u32 i = 0; i < 8; i++) T[k0 + i][r] = bf2f(((u16*)s)[i]); else for (u32 i = 0; i < per; i++) T[k0 + i][r] = ty_get(tyA, s + i * esA); } }
    else { for (u32 k = 0; k < K; k++) for (u32 r0 = 0; r0 < 16; r0 += 8) { const u8* s = wg_sh(c, w->cta, md_chunk(&m, 1, 2, wr + r0, k)); for (u32 i = 0; i < 8; i++) T[k][r0 + i] = ty_get(tyA, s + i * 2); } }
#ifdef __AVX512F__
    __m512i ix = _mm512_set_epi32(3,3,3,3,2,2,2,2,1,1,1,1,0,0,0,0); __m512 sgv = _mm512_set1_ps(sg);
    for (u32 k = 0; k < K; k++) { __m512 t = _mm512_mul_ps(_mm512_load_ps(T[k]), sgv);
      for (int q = 0; q < 4; q++) _mm512_store_ps(&Av[k][q >> 1][(q & 1) * 16], _mm512_permutexvar_ps(_mm512_add_epi32(ix, _mm512_set1_epi32(4 * q)), t)); }
#else
    for (u32 k = 0; k < K; k++) for (int h = 0; h < 2; h++) for (int l = 0; l < 32; l++) Av[k][h][l] = sg * T[k][(l >> 2) + 8 * h];
#endif
  } else {
    u32 pr = 4 / esA; // elements per register
#ifdef __AVX512F__
    if (tyA == 0) { // register r, lane 4g+t holds a[g+8(r&1)][8(r>>1)+2t+i]: broadcast lane t of every quad over the quad
      __m512 sgv = _mm512_set1_ps(sg);
      for (int r = 0; r < 4; r++) for (int hf = 0; hf < 2; hf++) { __m512i v = _mm512_load_si512(rf + X[13 + r] + 64 * hf);
        for (int i = 0; i < 2; i++) { __m512 f = _mm512_mul_ps(_mm512_castsi512_ps(i ? _mm512_and_si512(v, _mm512_set1_epi32(0xffff0000)) : _mm512_slli_epi32(v, 16)), sgv); int kb = (r >> 1) * 8 + i;
          _mm512_store_ps(&Av[kb][r & 1][16 * hf], _mm512_permute_ps(f, 0x00)); _mm512_store_ps(&Av[kb + 2][r & 1][16 * hf], _mm512_permute_ps(f, 0x55));
          _mm512_store_ps(&Av[kb + 4][r & 1][16 * hf], _mm512_permute_ps(f, 0xaa)); _mm512_store_ps(&Av[kb + 6][r & 1][16 * hf], _mm512_permute_ps(f, 0xff)); } }
    } else
#endif
    for (int r = 0; r < 4; r++) { const u32* s = (const u32*)(rf + X[13 + r]); int h = r & 1; u32 kb = (r >> 1) * 4 * pr;
      for (int t = 0; t < 4; t++) for (u32 i = 0; i < pr; i++) { f32* d = Av[kb + t * pr + i][h];
        for (int g = 0; g < 8; g++) { u32 v = s[g * 4 + t]; f32 f = esA == 2 ? (tyA == 0 ? bf2f(v >> (16 * i)) : hf2f(v >> (16 * i))) : esA == 1 ? (tyA == 2 ? T_e4m3[(v >> (8 * i)) & 255] : T_e5m2[(v >> (8 * i)) & 255]) : asf(v & 0xffffe000); f *= sg; d[g*4] = d[g*4+1] = d[g*4+2] = d[g*4+3] = f; } } }
  }
  const f32* B = wg_decodeB(c, w->cta, o->db, N, tyB, X[8], K);
  const u32* D = X + 17; int sc = o->scale;
  if (X[4] == 0) {
    for (u32 j = 0; j < J; j++) {
      f32* r0 = (f32*)(rf + D[4*j]), *r1 = (f32*)(rf + D[4*j+1]), *r2 = (f32*)(rf + D[4*j+2]), *r3 = (f32*)(rf + D[4*j+3]);
#ifdef __AVX512F__
      __m512 z = _mm512_setzero_ps(), a0 = sc ? _mm512_load_ps(r0) : z, a1 = sc ? _mm512_load_ps(r0 + 16) : z, b0 = sc ? _mm512_load_ps(r1) : z, b1 = sc ? _mm512_load_ps(r1 + 16) : z,
        c0 = sc ? _mm512_load_ps(r2) : z, c1 = sc ? _mm512_load_ps(r2 + 16) : z, d0 = sc ? _mm512_load_ps(r3) : z, d1 = sc ? _mm512_load_ps(r3 + 16) : z;
      for (u32 k = 0; k < K; k++) {
        __m512 p0 = _mm512_broadcast_f32x4(_mm_load_ps(B + (k * J + j) * 8)), p1 = _mm512_broadcast_f32x4(_mm_load_ps(B + (k * J + j) * 8 + 4));
        __m512 x0 = _mm512_load_ps(Av[k][0]), x1 = _mm512_load_ps(Av[k][0] + 16), y0 = _mm512_load_ps(Av[k][1]), y1 = _mm512_load_ps(Av[k][1] + 16);
        a0 = _mm512_fmadd_ps(x0, p0, a0); a1 = _mm512_fmadd_ps(x1, p0, a1); b0 = _mm512_fmadd_ps(x0, p1, b0); b1 = _mm512_fmadd_ps(x1, p1, b1);
        c0 = _mm512_fmadd_ps(y0, p0, c0); c1 = _mm512_fmadd_ps(y1, p0, c1); d0 = _mm512_fmadd_ps(y0, p1, d0); d1 = _mm512_fmadd_ps(y1, p1, d1);
      }
      _mm512_store_ps(r0, a0); _mm512_store_ps(r0 + 16, a1); _mm512_store_ps(r1, b0); _mm512_store_ps(r1 + 16, b1);
      _mm512_store_ps(r2, c0); _mm512_store_ps(r2 + 16, c1); _mm512_store_ps(r3, d0); _mm512_store_ps(r3 + 16, d1);
#else
      f32 acc[4][32]; for (int l = 0; l < 32; l++) { acc[0][l] = sc ? r0[l] : 0; acc[1][l] = sc ? r1[l] : 0; acc[2][l] = sc ? r2[l] : 0; acc[3][l] = sc ? r3[l] : 0; }
      for (u32 k = 0; k < K; k++) { const f32* bp = B + (k * J + j) * 8; for (int l = 0; l < 32; l++) { f32 u = bp[l & 3], v = bp[4 + (l & 3)], x = Av[k][0][l], y = Av[k][1][l];
        acc[0][l] = fmaf(x, u, acc[0][l]); acc[1][l] = fmaf(x, v, acc[1][l]); acc[2][l] = fmaf(y, u, acc[2][l]); acc[3][l] = fmaf(y, v, acc[3][l]); } }
      memcpy(r0, acc[0], 128); memcpy(r1, acc[1], 128); memcpy(r2, acc[2], 128); memcpy(r3, acc[3], 128);
#endif
    }
  } else { // f16 accumulators: two per register
    for (u32 j = 0; j < J; j++) for (int h = 0; h < 2; h++) { u32* r = (u32*)(rf + D[2*j + h]);
      for (int l = 0; l < 32; l++) { f32 x = sc ? hf2f(r[l]) : 0, y = sc ? hf2f(r[l] >> 16) : 0;
        for (u32 k = 0; k < K; k++) { const f32* bp = B + (k * J + j) * 8; x = fmaf(Av[k][h][l], bp[l & 3], x); y = fmaf(Av[k][h][l], bp[4 + (l & 3)], y); }
        r[l] = f2hf(x) | (u32)f2hf(y) << 16; } }
  }
  c->wgmma++;
}
static void wg_flight(Ctx* c, Warp* w, const u32* X, int d) {
  for (u32 i = 0; i < X[0]; i++) w->flight[X[17 + i] >> 7] += d;
  if (X[9]) for (int i = 0; i < 4; i++) w->flight[X[13 + i] >> 7] += d * 256;
  w->nflight += d;
}
// PTX moves accumulators around before the wait (ptxas turns those moves into register renaming), so a pure move of a register
// in flight joins the queue instead of being an error.
static int is_move(int op) { return op == OP_MOV32 || op == OP_MOV16 || op == OP_MOV64 || op == OP_PACK32 || op == OP_UNPACK32 || op == OP_PACK64 || op == OP_UNPACK64; }
static void exec_move(u8* rf, const Ins* I) {
  u32* a = (u32*)(rf + I->a), *b = I->b == NONE ? 0 : (u32*)(rf + I->b), *d = I->d == NONE ? 0 : (u32*)(rf + I->d), *e = I->e == NONE ? 0 : (u32*)(rf + I->e);
  for (int l = 0; l < 32; l++) switch (I->op) {
    case OP_MOV32: d[l] = a[l]; break; case OP_MOV16: d[l] = a[l] & 0xffff; break; case OP_MOV64: ((u64*)d)[l] = ((u64*)a)[l]; break;
    case OP_PACK32: d[l] = b[l] << 16 | (a[l] & 0xffff); break; case OP_UNPACK32: { u32 v = a[l]; if (d) d[l] = v & 0xffff; if (e) e[l] = v >> 16; break; }
    case OP_PACK64: ((u64*)d)[l] = (u64)b[l] << 32 | a[l]; break; case OP_UNPACK64: { u64 v = ((u64*)a)[l]; if (d) d[l] = (u32)v; if (e) e[l] = v >> 32; break; } }
}
static void move_flight(Ctx* c, Warp* w, u32 pc, int d) { const Kernel* k = c->k; for (u32 i = k->du_ptr[pc]; i < k->du_ptr[pc + 1]; i++) if (k->du[i] >> 31) w->flight[k->du[i] & 0x7fffffff] += d; w->nflight += d; }
static int wg_defines(Ctx* c, const WgOp* o, u32 r) {
  const Kernel* k = c->k; if (o->move) { for (u32 i = k->du_ptr[o->pc]; i < k->du_ptr[o->pc + 1]; i++) if (k->du[i] == (r | 0x80000000u)) return 1; return 0; }
  const u32* X = k->aux + o->aux; for (u32 i = 0; i < X[0]; i++) if (X[17 + i] >> 7 == r) return 1; return 0; }
static int defer_move(Ctx* c, Warp* w, u32 pc) {
  const Kernel* k = c->k; int any = 0; u32 g = 0;
  for (u32 i = k->du_ptr[pc]; i < k->du_ptr[pc + 1]; i++) { u32 r = k->du[i]; if (r >> 31 || !(w->flight[r] & 255)) continue; any = 1;
    for (int j = w->nwg - 1; j >= 0; j--) if (wg_defines(c, &w->wg[j], r)) { if (w->wg[j].group > g) g = w->wg[j].group; break; } }
  if (!any) return 0;
  if (w->nwg == w->capwg) { w->capwg = w->capwg ? 2 * w->capwg : 32; w->wg = realloc(w->wg, w->capwg * sizeof(WgOp)); }
  WgOp o; memset(&o, 0, sizeof o); o.pc = pc; o.group = g; o.move = 1; o.done = 1; for (int j = 0; j < w->nwg; j++) if (!w->wg[j].done) o.done = 0; if (o.done) exec_move(w->rf, &k->code[pc]);
  w->wg[w->nwg++] = o; move_flight(c, w, pc, 1); return 1;
}
static void wg_complete(Ctx* c, Warp* w, u32 keep) {
  int j = 0;
  for (int i = 0; i < w->nwg; i++) { WgOp* o = &w->wg[i];
    if ((s64)o->group < (s64)w->wgcommit - (s64)keep) { if (o->move) { if (!o->done) exec_move(w->rf, &c->k->code[o->pc]); move_flight(c, w, o->pc, -1); continue; }
      if (!o->done) wg_exec(c, w, o); if (w->cta->race) { int a = race_actor(c, w->cta->race, RK_WGMMA, w->id); if (w->vc[a] < o->tick) w->vc[a] = o->tick; } if (c->L->checks & 1) wg_flight(c, w, c->k->aux + o->aux, -1); }
    else { if (j != i) w->wg[j] = *o; j++; } }
  w->nwg = j;
}
static void wg_push(Ctx* c, Warp* w, u32 pc, const Ins* I) {
  const u32* X = c->k->aux + I->aux; u8* rf = w->rf; WgOp o; memset(&o, 0, sizeof o); o.pc = pc; o.aux = I->aux; o.group = w->wgcommit;
  u32 sp = *(u32*)(rf + X[10]); if (sp != 0 && sp != FULL) fail(c, "wgmma scale-d predicate differs between lanes (%#x)", sp); o.scale = sp != 0;
  o.db = *(u64*)(rf + X[12]); for (int l = 1; l < 32; l++) if (((u64*)(rf + X[12]))[l] != o.db) fail(c, "wgmma B descriptor differs between lanes");
  if (!X[9]) { o.da = *(u64*)(rf + X[11]); for (int l = 1; l < 32; l++) if (((u64*)(rf + X[11]))[l] != o.da) fail(c, "wgmma A descriptor differs between lanes"); }
  if (c->L->checks & 1) { // registers touched since the last wgmma.fence?
    if (!w->fenced) warnf(c, pc, "first wgmma without a wgmma.fence before it");
    for (u32 i = 0; i < X[0]; i++) if (w->wseq[X[17+i] >> 7] > w->fseq) { warnf(c, pc, "wgmma accumulator register accessed after the last wgmma.fence"); break; }
    if (X[9]) for (int i = 0; i < 4; i++) if (w->wseq[X[13+i] >> 7] > w->fseq) { warnf(c, pc, "wgmma A register accessed after the last wgmma.fence"); break; }
    wg_flight(c, w, X, 1);
  }
  if ((c->L->checks & 2) && (w->id & 3) == 0) { // proxy fence check, whole operand, once per warpgroup
    u32 N = X[1]; int esA = ty_es[X[2]]; u32 K = 32 / esA; MDesc m = mdesc(o.db); int bad = 0; u32 ad = 0;
    for (u32 n = 0; n < N && !bad; n += X[8] ? 8 : 1) for (u32 k = 0; k < K; k += X[8] ? 1 : 16 / esA) { u32 a = md_chunk(&m, X[8], esA, n, k) & 0x3ffff; wg_sh(c, w->cta, a); bad = shadow_bad(w, a); if (bad) { ad = a; break; } }
    if (!X[9] && !bad) { MDesc ma = mdesc(o.da); for (u32 n = 0; n < 64 && !bad; n += X[7] ? 8 : 1) for (u32 k = 0; k < K; k += X[7] ? 1 : 16 / esA) { u32 a = md_chunk(&ma, X[7], esA, n, k) & 0x3ffff; wg_sh(c, w->cta, a); bad = shadow_bad(w, a); if (bad) { ad = a; break; } } }
    if (bad) warnf(c, pc, "wgmma reads shared +%#x written through the generic proxy by warp %d with no fence.proxy.async after it", ad - SMEM_BASE, bad - 1);
  }
  if (w->cta->race) { Race* r = w->cta->race; int a = race_actor(c, r, RK_WGMMA, w->id); o.tick = ++r->tick[a]; u32 N = X[1]; int esA = ty_es[X[2]]; u32 K = 32 / esA; MDesc m = mdesc(o.db);
    u32 rk = w->cta->rank << 24;
    for (u32 n = 0; n < N; n += X[8] ? 8 : 1) for (u32 k = 0; k < K; k += X[8] ? 1 : 16 / esA) { u32 ad = md_chunk(&m, X[8], esA, n, k) & 0x3ffff; wg_sh(c, w->cta, ad); race_read(c, w, pc, ad | rk, 16, a, o.tick, "wgmma read of"); }
    if (!X[9]) { MDesc ma = mdesc(o.da); u32 wr = (w->id & 3) * 16; for (u32 n = wr; n < wr + 16; n += X[7] ? 8 : 1) for (u32 k = 0; k < K; k += X[7] ? 1 : 16 / esA) { u32 ad = md_chunk(&ma, X[7], esA, n, k) & 0x3ffff; wg_sh(c, w->cta, ad); race_read(c, w, pc, ad | rk, 16, a, o.tick, "wgmma read of"); } } }
  u32 mode = c->L->async_wgmma;
  int pend = 0; for (int i = 0; i < w->nwg; i++) pend |= !w->wg[i].done; // moves count as pending
  if (mode == 0 || (mode == 2 && !pend && (rnd(c) & 1))) { wg_exec(c, w, &o); o.done = 1; }
  if (w->nwg == w->capwg) { w->capwg = w->capwg ? 2 * w->capwg : 32; w->wg = realloc(w->wg, w->capwg * sizeof(WgOp)); }
  w->wg[w->nwg++] = o;
}
// ---------------------------------------------------------------- fragments
static void frag_drop(Warp* w, int i) { w->fr[i] = w->fr[--w->nfr]; }
static void frag_merge(Warp* w) {
  for (int i = 0; i < w->nfr; i++) for (int j = i + 1; j < w->nfr; ) {
    Frag* a = &w->fr[i], *b = &w->fr[j];
    if (a->pc == b->pc && a->wait != W_BAR && b->wait != W_BAR && a->wait != W_CLUSTER && b->wait != W_CLUSTER) { a->mask |= b->mask; a->wait = W_NONE; a->forced = 0; frag_drop(w, j); } else j++; }
}
static int frag_ready(Ctx* c, Warp* w, Frag* f) {
  switch (f->wait) {
    case W_NONE: case W_YIELD: return 1;
    case W_CONV: return (f->mask & f->wp & w->alive) == (f->wp & w->alive);
    case W_MBAR: { if (f->forced) return 1; u64* p = mb_get(c, w->cta, (u32)f->wa, "mbarrier wait"); return MB_PH(*p) != f->wp; }
    case W_BAR: return w->cta->bar[f->wa].gen != f->wp;
    case W_WGMMA: return 0; // released by the last warp
    case W_CLUSTER: return c->cl_gen != f->wp;
  } return 0;
}
static void cl_check(Ctx* c) { // all live warps of the cluster arrived?
  u32 live = 0; for (int i = 0; i < c->ncta; i++) for (int j = 0; j < c->ctas[i].nw; j++) live += !c->ctas[i].w[j].done;
  if (c->cl_arrived >= live && c->cl_arrived) { c->cl_arrived = 0; c->cl_gen++; c->progress++; }
}
static void warp_finish(Ctx* c, Warp* w) {
  w->done = 1; c->progress++;
  if (w->nwg) { for (int i = 0; i < w->nwg; i++) { warnf(c, w->wg[i].pc, "warp exits with wgmma not waited for"); break; } w->nwg = 0; }
  for (int i = 0; i < w->nbk; i++) { warnf(c, w->bk[i].pc, "warp exits with a bulk store whose shared memory read was not waited for"); if (!(w->bk[i].kind & 0x100)) bulk_exec(c, w, &w->bk[i]); }
  w->nbk = 0;
  while (cp_force_one(c, w)) ;
  cl_check(c);
}
static void bar_arrive(Ctx* c, Warp* w, u32 id, u32 cnt) {
  CTA* cta = w->cta; NBar* b = &cta->bar[id];
  if (cta->race) { race_join(cta->race->bacc[id], w->vc); w->vc[w->id]++; }
  if (cnt == 0) { u32 live = 0; for (int i = 0; i < cta->nw; i++) live += !cta->w[i].done; cnt = live * 32; }
  if (cnt & 31) fail(c, "barrier %u thread count %u is not a multiple of 32", id, cnt);
  if (b->arrived && b->expected != cnt) fail(c, "barrier %u used with %u threads while another use in the same phase expects %u", id, cnt, b->expected);
  b->expected = cnt; b->arrived += 32;
  if (b->arrived > b->expected) fail(c, "barrier %u: more arrivals (%u) than expected (%u)", id, b->arrived, b->expected);
  if (b->arrived == b->expected) { b->arrived = 0; b->gen++; if (cta->race) { memcpy(cta->race->bdone[id], cta->race->bacc[id], sizeof cta->race->bacc[id]); memset(cta->race->bacc[id], 0, sizeof cta->race->bacc[id]); } }
  c->progress++;
}
#include "exec_inc.h"

// ---------------------------------------------------------------- scheduler
static int pick_frag(Ctx* c, Warp* w) { // lowest pc; fragments that wait for reconvergence never hold back the others
  frag_merge(w);
  int best = -1;
  for (int i = 0; i < w->nfr; i++) { Frag* f = &w->fr[i]; if (f->wait == W_CONV && !frag_ready(c, w, f)) continue; if (best < 0 || f->pc < w->fr[best].pc) best = i; }
  return best;
}
static u64 run_warp(Ctx* c, Warp* w, u64 q) {
  u64 n = 0;
  while (!w->done) {
    int fi = pick_frag(c, w); if (fi < 0) break;
    if (!frag_ready(c, w, &w->fr[fi])) {
      if (!c->allow_secondary) break;
      int o = -1; for (int i = 0; i < w->nfr; i++) if (frag_ready(c, w, &w->fr[i]) && (o < 0 || w->fr[i].pc < w->fr[o].pc)) o = i;
      if (o < 0) break; fi = o;
    }
    u64 k = run_frag(c, w, fi, q ? q - n : ~0ull); n += k; c->switches++;
    if (w->nfr == 0) { warp_finish(c, w); break; }
    if (q && n >= q) break;
    if (k == 0) break;
  }
  c->ins += n; return n;
}
static void describe(Ctx* c, char* b, size_t cap) {
  size_t n = 0;
  for (int i = 0; i < c->ncta; i++) { CTA* t = &c->ctas[i];
    for (int j = 0; j < t->nw; j++) { Warp* w = &t->w[j]; if (w->done) continue;
      for (int k = 0; k < w->nfr && n + 300 < cap; k++) { Frag* f = &w->fr[k];
        n += snprintf(b + n, cap - n, "  cta(%u,%u,%u) warp %2u lanes %08x at @pc%u@: waits on %s", t->id[0], t->id[1], t->id[2], w->id, f->mask, f->pc, wname[f->wait]);
        if (f->wait == W_MBAR) { u64 v = *(u64*)shp(c, t, (u32)f->wa, 8, "report"); n += snprintf(b + n, cap - n, " at smem+%d for parity %u (phase %u, pending %u of %u, tx %d)", (int)(f->wa & 0xffffff) - (int)SMEM_BASE, f->wp, MB_PH(v), MB_PEND(v), MB_EXP(v), MB_TX(v)); }
        else if (f->wait == W_BAR) n += snprintf(b + n, cap - n, " %u (%u of %u threads arrived)", (u32)f->wa, t->bar[f->wa].arrived, t->bar[f->wa].expected);
        else if (f->wait == W_CONV) n += snprintf(b + n, cap - n, " needs lanes %08x", f->wp & w->alive);
        else if (f->wait == W_WGMMA) n += snprintf(b + n, cap - n, " (%u warps of the group arrived)", (u32)__builtin_popcount(t->wgp[w->id >> 2].arrived));
        n += snprintf(b + n, cap - n, "\n"); } } }
}
static void run_cluster(Ctx* c) {
  u64 start = c->ins; int tot = 0; for (int i = 0; i < c->ncta; i++) tot += c->ctas[i].nw;
  Warp** ws = alloca(sizeof(Warp*) * tot); int t = 0; for (int i = 0; i < c->ncta; i++) for (int j = 0; j < c->ctas[i].nw; j++) ws[t++] = &c->ctas[i].w[j];
  u32 rounds = 0, forced = 0; u64 lastprog = c->progress; c->allow_secondary = 0;
  for (;;) {
    u64 n = 0; int left = 0;
    if (c->L->sched) for (int i = tot - 1; i > 0; i--) { int j = rnd(c) % (i + 1); Warp* x = ws[i]; ws[i] = ws[j]; ws[j] = x; }
    for (int i = 0; i < tot; i++) { if (ws[i]->done) continue; u64 q = c->L->quantum; if (c->L->sched && q) q = 1 + rnd(c) % q;
      n += run_warp(c, ws[i], q ? q : 4000000); left += !ws[i]->done; }
    if (!left) break;
    if (c->L->max_ins && c->ins - start > c->L->max_ins) { c->cw = 0; c->cf = 0; char b[6000]; describe(c, b, sizeof b); fail(c, "instruction limit reached\n%s", b); }
    if (c->L->async_tma == 2 && c->ntq && (rnd(c) & 3) == 0) { int i = rnd(c) % c->ntq; TmaOp o = c->tq[i]; memmove(c->tq + i, c->tq + i + 1, (c->ntq - 1 - i) * sizeof(TmaOp)); c->ntq--; tma_exec(c, &o); }
    if (c->progress != lastprog) { lastprog = c->progress; rounds = forced = 0; c->allow_secondary = 0; continue; }
    if (n && !forced) continue;
    // stall: every warp is blocked. Complete the asynchronous work one piece at a time.
    c->stalls++;
    if (c->ntq) { int i = c->L->async_tma == 2 ? rnd(c) % c->ntq : c->L->async_tma == 3 ? c->ntq - 1 : 0; TmaOp o = c->tq[i]; memmove(c->tq + i, c->tq + i + 1, (c->ntq - 1 - i) * sizeof(TmaOp)); c->ntq--; tma_exec(c, &o); forced = 0; continue; }
    int did = 0; for (int i = 0; i < tot && !did; i++) if (!ws[i]->done) did = cp_force_one(c, ws[i]);
    if (did) { forced = 0; continue; }
    if (!c->allow_secondary) { c->allow_secondary = 1; forced = 0; continue; }
    // then let the blocked try_waits time out (they return false)
    int any = 0; for (int i = 0; i < tot; i++) if (!ws[i]->done) for (int k = 0; k < ws[i]->nfr; k++) if (ws[i]->fr[k].wait == W_MBAR) { ws[i]->fr[k].forced = 1; any = 1; }
    forced = 1;
    if (!any || ++rounds > 40) { c->cw = 0; c->cf = 0; char b[7000]; describe(c, b, sizeof b); fail(c, "DEADLOCK: every warp is blocked\n%s", b); }
  }
}
static void warp_free(Warp* w) { free(w->rf); free(w->wg); free(w->cp); free(w->bk); free(w->flight); free(w->wseq); free(w->local); }
static void setsp(const Kernel* k, u8* rf, int id, u32 v) { if (k->sp[id] == NONE) return; u32* p = (u32*)(rf + k->sp[id]); for (int l = 0; l < 32; l++) p[l] = v; }
static void cta_init(Ctx* c, CTA* t, u32 rank, const u32 id[3]) {
  const Kernel* k = c->k; const Launch* L = c->L; u32 nthr = L->block[0] * L->block[1] * L->block[2]; int nw = (nthr + 31) / 32;
  t->rank = rank; memcpy(t->id, id, 12); t->smem_size = k->static_smem + L->dyn_smem; memset(t->smem, 0xff, SMEM_BASE + t->smem_size + 64);
  memset(t->bar, 0, sizeof t->bar); t->nmbar = 0; memset(t->wgp, 0, sizeof t->wgp);
  for (int i = 0; i < 256; i++) t->pagever[i] += 1;
  if (L->checks & 2) { if (!t->shadow) t->shadow = malloc(8 * 20000); memset(t->shadow, 0, 8 * 20000); } else if (t->shadow) { free(t->shadow); t->shadow = 0; }
  t->nw = nw;
  if ((L->checks & 16) && c->ncta == 1) { if (!t->race) t->race = race_new(); race_reset(t->race, nw, t->smem_size); }
  u32 cl[3]; for (int i = 0; i < 3; i++) cl[i] = L->cluster[i] ? L->cluster[i] : 1;
  for (int j = 0; j < nw; j++) { Warp* w = &t->w[j];
    if (!w->rf) { w->rf = aligned_alloc(64, (k->rf_bytes + 127) & ~127u); w->flight = calloc((k->rf_bytes >> 7) + 2, 2); w->wseq = calloc((k->rf_bytes >> 7) + 2, 4); if (k->local_bytes) w->local = malloc((size_t)k->local_bytes * 32); }
    memcpy(w->rf, k->rf_init, k->rf_bytes); memset(w->flight, 0, ((k->rf_bytes >> 7) + 2) * 2); memset(w->wseq, 0, ((k->rf_bytes >> 7) + 2) * 4);
    if (w->local) memset(w->local, 0xff, (size_t)k->local_bytes * 32);
    w->id = j; w->cta = t; w->done = 0; w->nwg = w->ncp = w->nbk = 0; w->wgcommit = 0; w->nflight = 0; w->fence_time = 0; w->ins = 0; w->fseq = w->iseq = w->fenced = 0; memset(w->vc, 0, sizeof w->vc); w->vc[j] = 1;
    memset(w->cpcommit, 0, sizeof w->cpcommit); memset(w->bkcommit, 0, sizeof w->bkcommit);
    w->alive = nthr - j * 32 >= 32 ? FULL : (1u << (nthr - j * 32)) - 1;
    w->nfr = 1; memset(&w->fr[0], 0, sizeof(Frag)); w->fr[0].mask = w->alive;
    u8* rf = w->rf;
    for (int l = 0; l < 32; l++) { u32 tid = j * 32 + l, x = tid % L->block[0], y = tid / L->block[0] % L->block[1], z = tid / L->block[0] / L->block[1];
      #define ST(ID, V) if (k->sp[ID] != NONE) ((u32*)(rf + k->sp[ID]))[l] = (V)
      ST(SP_TIDX, x); ST(SP_TIDY, y); ST(SP_TIDZ, z); ST(SP_LANEID, l); ST(SP_LANEMASK_EQ, 1u << l); ST(SP_LANEMASK_LT, (1u << l) - 1); ST(SP_LANEMASK_LE, (2u << l) - 1); ST(SP_LANEMASK_GT, ~((2u << l) - 1)); ST(SP_LANEMASK_GE, ~((1u << l) - 1)); }
    for (int i = 0; i < 3; i++) { setsp(k, rf, SP_NTIDX + i, L->block[i]); setsp(k, rf, SP_CTAIDX + i, id[i]); setsp(k, rf, SP_NCTAIDX + i, L->grid[i]);
      setsp(k, rf, SP_CLUSTERIDX + i, id[i] / cl[i]); setsp(k, rf, SP_NCLUSTERIDX + i, L->grid[i] / cl[i]); setsp(k, rf, SP_CCTAIDX + i, id[i] % cl[i]); setsp(k, rf, SP_CNCTAIDX + i, cl[i]); }
    setsp(k, rf, SP_CCTARANK, rank); setsp(k, rf, SP_CNCTARANK, cl[0] * cl[1] * cl[2]); setsp(k, rf, SP_WARPID, j); setsp(k, rf, SP_NWARPID, 64); setsp(k, rf, SP_SMID, (id[0] + id[1] * L->grid[0]) % L->num_sms); setsp(k, rf, SP_NSMID, L->num_sms);
    setsp(k, rf, SP_DYNSMEM, L->dyn_smem); setsp(k, rf, SP_TOTSMEM, t->smem_size); setsp(k, rf, SP_CLOCK, 0); setsp(k, rf, SP_GRIDID, 1);
    for (u32 i = 0; i < k->nshsym; i++) { u32* p = (u32*)(rf + k->shsym[2*i]); u32 v = (rank << 24) + SMEM_BASE + k->shsym[2*i+1]; if (k->shsym[2*i] & 1) { u64* q = (u64*)(rf + (k->shsym[2*i] & ~1u)); for (int l = 0; l < 32; l++) q[l] = v; } else for (int l = 0; l < 32; l++) p[l] = v; }
  }
}
typedef struct { const Kernel* k; const Launch* L; Result* R; u64* next; u64 total; const u32* order; u32 tid; } Job;
static void* worker(void* arg) {
  Job* J = arg; const Launch* L = J->L; Ctx* c = aligned_alloc(64, (sizeof(Ctx) + 63) & ~63ul); memset(c, 0, sizeof *c); c->k = J->k; c->L = L; c->R = J->R; c->rng = 0x9E3779B97F4A7C15ull ^ ((u64)L->seed * 0x2545F4914F6CDD1Dull + J->tid); for (int i = 0; i < 8; i++) rnd(c);
  u32 cl[3]; for (int i = 0; i < 3; i++) cl[i] = L->cluster[i] ? L->cluster[i] : 1;
  c->ncta = cl[0] * cl[1] * cl[2]; u32 nthr = L->block[0] * L->block[1] * L->block[2], nw = (nthr + 31) / 32;
  c->ctas = calloc(c->ncta, sizeof(CTA)); for (int i = 0; i < c->ncta; i++) { c->ctas[i].smem = aligned_alloc(1024, 256 * 1024 + 4096); c->ctas[i].w = calloc(nw, sizeof(Warp)); }
  u32 gx = L->grid[0] / cl[0], gy = L->grid[1] / cl[1];
  if (!setjmp(c->jb)) {
    for (;;) {
      u64 i = __atomic_fetch_add(J->next, 1, __ATOMIC_RELAXED); if (i >= J->total || J->R->code) break;
      u64 g = J->order ? J->order[i] : i; u32 cid[3] = {(u32)(g % gx), (u32)(g / gx % gy), (u32)(g / gx / gy)};
      for (int r = 0; r < c->ncta; r++) { u32 id[3] = {cid[0] * cl[0] + r % cl[0], cid[1] * cl[1] + r / cl[0] % cl[1], cid[2] * cl[2] + r / cl[0] / cl[1]}; cta_init(c, &c->ctas[r], r, id); }
      c->cl_arrived = 0; c->ntq = 0; c->cw = 0; c->cf = 0;
      run_cluster(c);
      for (int r = 0; r < c->ncta; r++) for (int q = 0; q < c->ctas[r].nmbar; q++) { u64 v = *(u64*)(c->ctas[r].smem + (c->ctas[r].mbars[q].addr & 0xffffff)); c->cw = &c->ctas[r].w[0];
        if ((v >> 62) == 1 && MB_TX(v)) warnf(c, 900000 + q, "CTA ends with mbarrier at smem+%d holding tx-count %d (phase %u, pending %u)", (int)(c->ctas[r].mbars[q].addr & 0xffffff) - (int)SMEM_BASE, MB_TX(v), MB_PH(v), MB_PEND(v)); }
      if (c->ntq) { c->cw = 0; warnf(c, c->tq[0].pc, "CTA ends with %d TMA loads in flight", c->ntq); c->ntq = 0; }
    }
  }
  pthread_mutex_lock(&g_res);
  J->R->ins += c->ins; J->R->lane_ins += c->lane_ins; J->R->wgmma += c->wgmma; J->R->tma_bytes += c->tma_bytes; J->R->switches += c->switches; J->R->stalls += c->stalls;
  for (int i = 0; i < 4096; i++) J->R->hist[i] += c->hist[i];
  pthread_mutex_unlock(&g_res);
  for (int i = 0; i < NBC; i++) free(c->bc[i].buf);
  for (int i = 0; i < c->ncta; i++) { for (u32 j = 0; j < nw; j++) warp_free(&c->ctas[i].w[j]); free(c->ctas[i].w); free(c->ctas[i].smem); free(c->ctas[i].shadow); race_free(c->ctas[i].race); }
  free(c->ctas); free(c->tq); free(c); return 0;
}
int hsim_run(const Kernel* k, const Launch* L, Result* R) {
  static int once; if (!once) { fp8_init(); once = 1; }
  u32 cl[3]; for (int i = 0; i < 3; i++) { cl[i] = L->cluster[i] ? L->cluster[i] : 1; if (L->grid[i] % cl[i]) { R->code = 2; snprintf(R->msg, sizeof R->msg, "grid is not a multiple of the cluster"); return 2; } }
  if (k->static_smem + L->dyn_smem > SMEM_MAX - 1024) { R->code = 2; snprintf(R->msg, sizeof R->msg, "shared memory %u exceeds the 227 KiB of sm_90", k->static_smem + L->dyn_smem); return 2; }
  u64 total = (u64)(L->grid[0] / cl[0]) * (L->grid[1] / cl[1]) * (L->grid[2] / cl[2]); u64 next = 0; u32* order = 0;
  if (L->cta_order) { order = malloc(total * 4); for (u64 i = 0; i < total; i++) order[i] = L->cta_order == 1 ? total - 1 - i : i;
    if (L->cta_order == 2) { u64 s = L->seed * 7919ull + 12345; for (u64 i = total - 1; i > 0; i--) { s = s * 6364136223846793005ull + 1442695040888963407ull; u64 j = (s >> 33) % (i + 1); u32 x = order[i]; order[i] = order[j]; order[j] = x; } } }
  u32 nt = L->nthreads ? L->nthreads : 1; if (nt > total) nt = total; if (nt > 64) nt = 64;
  Job jobs[64]; pthread_t th[64];
  for (u32 i = 0; i < nt; i++) { Job j = {k, L, R, &next, total, order, i}; jobs[i] = j; }
  for (u32 i = 1; i < nt; i++) { pthread_attr_t at; pthread_attr_init(&at); pthread_attr_setstacksize(&at, 16 << 20); pthread_create(&th[i], &at, worker, &jobs[i]); }
  if (nt) worker(&jobs[0]);
  for (u32 i = 1; i < nt; i++) pthread_join(th[i], 0);
  free(order); return R->code;
}
