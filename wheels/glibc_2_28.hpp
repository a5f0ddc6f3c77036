// Included before every source of a wheel (`-include`): functions whose default version in a newer glibc does not exist
// in glibc 2.28 are bound to their first version, which every newer glibc still has.
#if defined(__x86_64__)
#define PAMA_FIRST_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define PAMA_FIRST_GLIBC "GLIBC_2.17"
#endif

__asm__(".symver log,log@" PAMA_FIRST_GLIBC);                    // 2.29: without the wrapper that sets errno
__asm__(".symver pthread_once,pthread_once@" PAMA_FIRST_GLIBC);  // 2.34: moved into libc.so; libgomp.so brings
                                                                 // libpthread.so
