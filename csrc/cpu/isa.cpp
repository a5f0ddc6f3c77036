// Selects the kernels of the best instruction set that the processor supports.
#include <cstring>

#include "driver.hpp"

namespace pama {
namespace {

#if defined(PAMA_HAVE_AVX512)
bool supports_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool supports_avx512() {
    return supports_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Kernels* best() {
#if defined(PAMA_HAVE_AVX512)
    if (supports_avx512()) return &kernels_avx512;
    if (supports_avx2()) return &kernels_avx2;
#endif
    return &kernels_portable;
}

}  // namespace

const Kernels& kernels(const char* name) {
    static const Kernels* chosen = best();
    if (name) {
        const Kernels* wanted = &kernels_portable;
#if defined(PAMA_HAVE_AVX512)
        if (std::strcmp(name, "avx2") == 0 && supports_avx2()) wanted = &kernels_avx2;
        if (std::strcmp(name, "avx512") == 0 && supports_avx512()) wanted = &kernels_avx512;
        if (std::strcmp(name, "best") == 0) wanted = best();
#endif
        chosen = wanted;
    }
    return *chosen;
}

}  // namespace pama
