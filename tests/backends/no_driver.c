/* A libcuda.so.1 that does nothing but note which kernels it was asked to launch, for null_driver.py. */
#include <stdint.h>
#include <string.h>

typedef int Result; /* CUresult: 0 is success */

static char launched[1 << 16];
static size_t used;

/* The names of the kernels since the last call, each with a space behind it; those of the first are lost where
 * there is no room for all. */
const char* taken(void) {
    static char copy[sizeof launched];
    memcpy(copy, launched, used);
    copy[used] = 0;
    used = 0;
    return copy;
}

typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned count;
} Launch; /* CUlaunchConfig */

Result cuLaunchKernelEx(const Launch* launch, const char* name, void** parameters, void** extra) {
    (void)extra;
    if (!parameters || launch->grid[0] == 0 || launch->block[0] % 32 != 0 || launch->block[0] > 1024) return 1;
    const size_t length = strlen(name);
    if (used + length + 2 > sizeof launched) used = 0;
    memcpy(launched + used, name, length);
    launched[used + length] = ' ';
    used += length + 1;
    return 0;
}

Result cuModuleLoadData(void** module, const void* image) {
    *module = (void*)image;
    return image == 0;
}
Result cuModuleGetFunction(void** function, void* module, const char* name) {
    (void)module;
    *function = strdup(name);
    return 0;
}
Result cuModuleUnload(void* module) { return module == 0; }
Result cuFuncGetAttribute(int* value, int attribute, void* function) {
    (void)function;
    *value = attribute == 0 ? 1024 : 0; /* 0: threads to a block */
    return 0;
}
Result cuFuncSetAttribute(void* function, int attribute, int value) {
    (void)attribute, (void)value;
    return function == 0;
}
Result cuFuncSetCacheConfig(void* function, int config) {
    (void)config;
    return function == 0;
}
Result cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) {
    (void)attribute;
    *(uint64_t*)value = pointer;
    return 0;
}
Result cuPointerGetAttributes(unsigned count, int* attributes, void** values, uint64_t pointer) {
    (void)attributes;
    for (unsigned i = 0; i < count; ++i) *(uint64_t*)values[i] = pointer;
    return 0;
}
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
    (void)attribute, (void)device;
    *value = 227 << 10; /* bytes of shared memory; nothing else is asked for by number */
    return 0;
}
Result cuCtxGetCurrent(void** context) {
    static int some;
    *context = &some;
    return 0;
}

Result cuGetErrorString(int error, const char** text) {
    (void)error;
    *text = "refused by the driver that does nothing";
    return 0;
}

#define NOTHING(name) \
    Result name(void) { return 0; }
NOTHING(cuCtxGetDevice)
NOTHING(cuCtxGetLimit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuDeviceGet)
NOTHING(cuDeviceGetCount)
NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuDriverGetVersion)
NOTHING(cuInit)
NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuStreamIsCapturing)
NOTHING(cuTensorMapEncodeIm2col)
NOTHING(cuTensorMapEncodeTiled)
