// Where processes meet, in memory that they share and that is 0 to begin with; and the sum of what each has brought.

#include <atomic>
#include <chrono>
#include <cstdint>

#include <sched.h>

struct Meeting {
    alignas(64) std::atomic<uint32_t> arrived;
    alignas(64) std::atomic<uint32_t> number;  // of meetings that are over
};

extern "C" {

void meeting_arrive(Meeting* meeting, int64_t ranks) {
    if (meeting->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < ranks) return;
    meeting->arrived.store(0, std::memory_order_relaxed);
    meeting->number.fetch_add(1, std::memory_order_release);
}

// Whether the meeting of this number is over, which is waited for so long
int64_t meeting_is_over(Meeting* meeting, int64_t number, int64_t microseconds) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
    for (int64_t turn = 0;; ++turn) {
        if (meeting->number.load(std::memory_order_acquire) != (uint32_t)number) return 1;
        if (turn % 64 == 63 && std::chrono::steady_clock::now() > deadline) return 0;
        if (turn > 4000) sched_yield();  // others may need this core to arrive
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
    }
}

// sum [count] = the parts [ranks], one behind the other, `stride` bytes from each to the next
void meeting_sum(const char* parts, int64_t ranks, int64_t stride, float* sum, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        float value = 0;
        for (int64_t rank = 0; rank < ranks; ++rank) value += ((const float*)(parts + rank * stride))[i];
        sum[i] = value;
    }
}

}
