// What a newer GCC's headers call and the libstdc++ of GCC 8 (manylinux_2_28) does not export: linked into a wheel's
// module, hidden, as GCC's own toolsets for older systems do.
#include <new>

#define PAMA_HIDDEN __attribute__((visibility("hidden")))

extern "C" {

// glibc 2.32: whether shared_ptr may count without atomic instructions.
PAMA_HIDDEN extern char __libc_single_threaded;
char __libc_single_threaded = 0;

// CXXABI_1.3.13: std::exception_ptr changes its count of references. Older versions export only the copy constructor
// and the destructor that contain these.
void copy_exception(void** made, void* const* from) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void destroy_exception(void** pointer) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");
PAMA_HIDDEN void add_reference(void** self) __asm__("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
PAMA_HIDDEN void release(void** self) __asm__("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");

void add_reference(void** self) {
    void* kept = nullptr;
    copy_exception(&kept, self);
}

void release(void** self) {
    void* dropped = *self;
    *self = nullptr;
    destroy_exception(&dropped);
}

// GLIBCXX_3.4.29: operator new[] with a negative size.
[[noreturn]] PAMA_HIDDEN void bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");

void bad_array_new_length() { throw std::bad_array_new_length(); }

}  // extern "C"
