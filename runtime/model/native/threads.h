// How threads share work, and wait for each other.

#pragma once

#include <atomic>
#include <cstdint>

#include <omp.h>

#include "vectors.h"

namespace {

struct Range {
    int64_t start, stop;
};

// This thread's share of `count` pieces of work
INLINE Range share(int64_t count) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return {count * thread / threads, count * (thread + 1) / threads};
}

// Where threads wait for each other. Who waits long sleeps, so that on a machine with other work the thread that is
// waited for may have its core: OpenMP's own barrier spins for milliseconds there.
class Barrier {
    std::atomic<int> arrived{0}, phase{0};

   public:
    void wait() {
        const int current = phase.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == omp_get_num_threads()) {
            arrived.store(0, std::memory_order_relaxed);
            phase.store(current + 1, std::memory_order_release);
            phase.notify_all();
            return;
        }
        for (int spin = 0; spin < 8000; ++spin) {  // 100 microseconds and more
            if (phase.load(std::memory_order_acquire) != current) return;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        phase.wait(current, std::memory_order_acquire);
    }
};

}  // namespace
