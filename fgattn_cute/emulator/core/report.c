// SPDX-License-Identifier: Apache-2.0
// Findings: faults that stop the launch (fail) and faults it survives (warn).
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "machine.h"

#define REPORT_BYTES sizeof(((Result*)0)->report)

static FindingRecord* new_record(Machine* m) {
  Findings* f = &m->findings;
  if (f->count == f->capacity) {
    f->capacity = f->capacity ? 2 * f->capacity : 16;
    f->list = realloc(f->list, f->capacity * sizeof(FindingRecord));
  }
  FindingRecord* r = &f->list[f->count++];
  memset(r, 0, sizeof *r);
  r->count = 1;
  r->cluster = m->cluster_index;
  return r;
}

static void locate(Machine* m, FindingRecord* r, u32 pc, int lane, u64 address) {
  r->pc = pc;
  r->warp = m->warp ? m->warp->id : NONE;
  r->lane = lane >= 0 ? (u32)lane : NONE;
  r->address = address;
  memcpy(r->cta, m->warp ? m->warp->cta->id : m->ctas[0].id, sizeof r->cta);
}

static _Noreturn void stop(Machine* m, u32 kind, int lane, u64 address, const char* format, va_list arguments) {
  FindingRecord* r = new_record(m);
  r->kind = kind;
  r->fatal = 1;
  locate(m, r, current_pc(m), lane, address);
  if (!m->report) m->report = malloc(REPORT_BYTES);
  vsnprintf(m->report, REPORT_BYTES, format, arguments);
  snprintf(r->message, sizeof r->message, "%.*s", (int)sizeof r->message - 1, m->report);
  m->failed = true;
  longjmp(m->escape, 1);
}

void fail(Machine* m, u32 kind, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  stop(m, kind, -1, 0, format, arguments);
}

void fail_at(Machine* m, u32 kind, int lane, u64 address, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  stop(m, kind, lane, address, format, arguments);
}

// One record per kind and instruction: the first occurrence is kept, later ones are counted. A host thread runs its
// clusters in ascending order, so the record names the lowest cluster whatever the number of threads (launch.c merges
// the threads' records).
void warn(Machine* m, u32 kind, u32 pc, int lane, u64 address, const char* format, ...) {
  for (u32 i = 0; i < m->findings.count; i++) {
    FindingRecord* r = &m->findings.list[i];
    if (r->kind == kind && r->pc == pc && (pc != NONE || r->address == address)) {
      r->count++;
      return;
    }
  }
  FindingRecord* r = new_record(m);
  r->kind = kind;
  locate(m, r, pc, lane, address);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(r->message, sizeof r->message, format, arguments);
  va_end(arguments);
}
