// SPDX-License-Identifier: Apache-2.0
// Stands in front of libcute_dsl_runtime.so in CUTE_DSL_LIBS: the CUDA entry points that the DSL's host code calls.
//
// While an emulator session is active (fge_set_active), loads, attribute calls and launches go to Python callbacks. Otherwise every call
// is forwarded to the real runtime, so that a process on a machine with a GPU can use both. Handles are the real runtime's where a device
// exists and counters otherwise; Python keeps the table from handle to cubin.
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef struct { uint32_t x, y, z; } Dim3;
// cudaLaunchAttribute: 72 bytes, value at +8. Of interest here: id 4 = cluster dimension.
typedef struct { int32_t id; char pad[4]; union { char bytes[64]; Dim3 cluster; } value; } Attribute;
typedef struct { Dim3 grid, block; size_t smem; void* stream; Attribute* attrs; uint32_t num_attrs; } LaunchConfig;  // cudaLaunchConfig_t
_Static_assert(sizeof(Attribute) == 72, "cudaLaunchAttribute");

enum { ERROR_NO_DEVICE = 100, ATTRIBUTE_CLUSTER = 4 };
enum { DEV_SMEM_BLOCK = 8, DEV_MAX_THREADS = 1, DEV_WARP = 10, DEV_SMS = 16, DEV_THREADS_SM = 39, DEV_MAJOR = 75, DEV_MINOR = 76,
       DEV_SMEM_SM = 81, DEV_SMEM_OPTIN = 97 };  // cudaDeviceAttr

typedef struct {
  int (*load)(uint64_t library, const void* code);
  int (*kernel)(uint64_t kernel, uint64_t library, const char* name);
  int (*launch)(uint64_t kernel, const uint32_t* grid_block_cluster, uint64_t smem, void** args);
  int (*set_attribute)(uint64_t kernel, int attribute, int value);
  int (*get_attribute)(uint64_t kernel, int attribute);
  int (*no_session)(void);
} Callbacks;

static Callbacks callbacks;
static char real_path[4096];
static int active, num_sms = 132;
static uint64_t next_handle = 0x1000;
static pthread_mutex_t init_mutex = PTHREAD_MUTEX_INITIALIZER;

void fge_setup(const Callbacks* c, const char* path) { callbacks = *c; snprintf(real_path, sizeof real_path, "%s", path); }
void fge_set_active(int on, int sms) { active = on; num_sms = sms; }

static void* real(const char* name) {
  static void* library;
  if (!library) library = dlopen(real_path, RTLD_NOW | RTLD_LOCAL);
  return library ? dlsym(library, name) : NULL;
}
#define REAL(name, ...) ((int (*)(__VA_ARGS__))real(#name))

static int real_devices(void) {
  static int count = -1;
  if (count < 0) {
    int (*get)(int*) = REAL(_cudaGetDeviceCount, int*), n = 0;
    count = get && get(&n) == 0 ? n : 0;
  }
  return count;
}
int fge_real_devices(void) { return real_devices(); }

// ------------------------------------------------------------------------------------------------- libraries and kernels
typedef int LoadFn(void**, const void*, void*, void*, uint32_t, void*, void*, uint32_t);

static int load(LoadFn* f, void** lib, const void* code, void* a, void* b, uint32_t na, void* c, void* d, uint32_t nc) {
  if (real_devices()) {
    int r = f(lib, code, a, b, na, c, d, nc);
    if (r) return r;
  } else
    *lib = (void*)(next_handle += 16);
  return callbacks.load((uint64_t)*lib, code);
}
int _cudaLibraryLoadData(void** lib, const void* code, void* a, void* b, uint32_t na, void* c, void* d, uint32_t nc) {
  return load((LoadFn*)real("_cudaLibraryLoadData"), lib, code, a, b, na, c, d, nc);
}
int _cuLibraryLoadData(void** lib, const void* code, void* a, void* b, uint32_t na, void* c, void* d, uint32_t nc) {
  return load((LoadFn*)real("_cuLibraryLoadData"), lib, code, a, b, na, c, d, nc);
}
int _cudaLibraryUnload(void* lib) { return real_devices() ? REAL(_cudaLibraryUnload, void*)(lib) : 0; }
int _cuLibraryUnload(void* lib) { return real_devices() ? REAL(_cuLibraryUnload, void*)(lib) : 0; }

typedef int GetKernelFn(void**, void*, const char*);
static int get_kernel(GetKernelFn* f, void** kernel, void* lib, const char* name) {
  if (real_devices()) {
    int r = f(kernel, lib, name);
    if (r) return r;
  } else
    *kernel = (void*)(next_handle += 16);
  return callbacks.kernel((uint64_t)*kernel, (uint64_t)lib, name);
}
int _cudaLibraryGetKernel(void** k, void* lib, const char* name) { return get_kernel((GetKernelFn*)real("_cudaLibraryGetKernel"), k, lib, name); }
int _cuLibraryGetKernel(void** k, void* lib, const char* name) { return get_kernel((GetKernelFn*)real("_cuLibraryGetKernel"), k, lib, name); }

int _cudaFuncSetAttribute(void* k, int attribute, int value) {
  int r = callbacks.set_attribute((uint64_t)k, attribute, value);
  return r || !real_devices() ? r : REAL(_cudaFuncSetAttribute, void*, int, int)(k, attribute, value);
}
int _cudaKernelSetAttributeForDevice(void* k, int attribute, int value, int device) {
  int r = callbacks.set_attribute((uint64_t)k, attribute, value);
  return r || !real_devices() ? r : REAL(_cudaKernelSetAttributeForDevice, void*, int, int, int)(k, attribute, value, device);
}
int _cuKernelGetAttribute(int* value, int attribute, void* k, int device) {
  if (real_devices()) return REAL(_cuKernelGetAttribute, int*, int, void*, int)(value, attribute, k, device);
  *value = callbacks.get_attribute((uint64_t)k, attribute);
  return 0;
}

// ------------------------------------------------------------------------------------------------- devices and streams
int _cudaGetDevice(int* device) {
  if (!active && real_devices()) return REAL(_cudaGetDevice, int*)(device);
  *device = 0;
  return 0;
}
int _cudaSetDevice(int device) { return !active && real_devices() ? REAL(_cudaSetDevice, int)(device) : 0; }
int _cudaGetDeviceCount(int* count) {
  *count = real_devices() ? real_devices() : 1;
  return 0;
}
int _cudaDeviceGetAttribute(int* value, int attribute, int device) {
  if (!active && real_devices()) return REAL(_cudaDeviceGetAttribute, int*, int, int)(value, attribute, device);
  switch (attribute) {
    case DEV_SMS: *value = num_sms; break;
    case DEV_MAJOR: *value = 9; break;
    case DEV_MINOR: *value = 0; break;
    case DEV_SMEM_OPTIN: *value = 232448; break;
    case DEV_SMEM_SM: *value = 233472; break;
    case DEV_SMEM_BLOCK: *value = 49152; break;
    case DEV_MAX_THREADS: *value = 1024; break;
    case DEV_THREADS_SM: *value = 2048; break;
    case DEV_WARP: *value = 32; break;
    default: return 1;  // cudaErrorInvalidValue: an attribute the emulator has no answer for
  }
  return 0;
}
int _cudaDeviceSynchronize(void) { return !active && real_devices() ? REAL(_cudaDeviceSynchronize, void)() : 0; }
int _cudaStreamSynchronize(void* s) { return !active && real_devices() ? REAL(_cudaStreamSynchronize, void*)(s) : 0; }
int _cudaMemset(void* p, int v, size_t n) {
  if (!active) return REAL(_cudaMemset, void*, int, size_t)(p, v, n);
  memset(p, v, n);
  return 0;
}
int _cudaMemsetAsync(void* p, int v, size_t n, void* s) {
  if (!active) return REAL(_cudaMemsetAsync, void*, int, size_t, void*)(p, v, n, s);
  memset(p, v, n);
  return 0;
}

// ------------------------------------------------------------------------------------------------- launches
static int launch(void* k, const Dim3* grid, const Dim3* block, Dim3 cluster, uint64_t smem, void** args) {
  const uint32_t dims[9] = {grid->x, grid->y, grid->z, block->x, block->y, block->z, cluster.x, cluster.y, cluster.z};
  return callbacks.launch((uint64_t)k, dims, smem, args);
}
int _cudaLaunchKernel(void* k, uint32_t gx, uint32_t gy, uint32_t gz, uint32_t bx, uint32_t by, uint32_t bz, uint32_t smem, void* stream, void** args) {
  if (!active && real_devices())
    return REAL(_cudaLaunchKernel, void*, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, void*, void**)(k, gx, gy, gz, bx, by, bz, smem, stream, args);
  if (!active) return callbacks.no_session();
  Dim3 grid = {gx, gy, gz}, block = {bx, by, bz}, one = {1, 1, 1};
  return launch(k, &grid, &block, one, smem, args);
}
int _cudaLaunchKernelEx(const LaunchConfig* c, void* k, void** args) {
  if (!active && real_devices()) return REAL(_cudaLaunchKernelEx, const LaunchConfig*, void*, void**)(c, k, args);
  if (!active) return callbacks.no_session();
  Dim3 cluster = {1, 1, 1};
  for (uint32_t i = 0; i < c->num_attrs; i++)
    if (c->attrs[i].id == ATTRIBUTE_CLUSTER) cluster = c->attrs[i].value.cluster;
  return launch(k, &c->grid, &c->block, cluster, c->smem, args);
}

// ------------------------------------------------------------------------------------------------- TVM-FFI: lazy load
// Replaces the original, which refuses to load anything where cudaGetDeviceCount fails.
int cuda_dialect_init_library_once(void** lib, int (*init)(void**), int (*load_to_device)(void**, int), void (*set_error)(const char*, const char*)) {
  int r = 0;
  pthread_mutex_lock(&init_mutex);
  if (!*lib) {
    void* handle = NULL;
    r = init(&handle);
    int devices = real_devices() ? real_devices() : 1;
    for (int d = 0; !r && load_to_device && d < devices; d++) r = load_to_device(&handle, d);
    if (!r) *lib = handle;
  }
  pthread_mutex_unlock(&init_mutex);
  if (!r) return 0;
  char text[96];
  snprintf(text, sizeof text, "loading the kernel library failed with CUDA error %d", r);
  set_error("RuntimeError", text);
  return -1;
}
