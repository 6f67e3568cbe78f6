// Where processes meet, in memory that they share and that is 0 to begin with; and the sum of what each has brought.

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>

#include <sched.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

struct Meeting {
    alignas(64) std::atomic<uint32_t> arrived;
    alignas(64) std::atomic<uint32_t> number;  // of meetings that are over
};

using Word = std::atomic<uint32_t>;
static_assert(sizeof(Word) == 4 && Word::is_always_lock_free);

extern "C" {

// Give a word that others wait for a value.
void word_set(Word* word, uint32_t value) {
    word->store(value, std::memory_order_release);
#if defined(__linux__)
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#endif
}

// Wait until a word has this value: looking at it so many times, then asleep, so long at most. Returns whether it has.
int64_t word_wait(Word* word, uint32_t wanted, int64_t looks, int64_t microseconds) {
    for (int64_t look = 0; look < looks; ++look) {
        if (word->load(std::memory_order_acquire) == wanted) return 1;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    const uint32_t found = word->load(std::memory_order_acquire);
    if (found == wanted) return 1;
#if defined(__linux__)
    const timespec patience{microseconds / 1000000, microseconds % 1000000 * 1000};
    syscall(SYS_futex, word, FUTEX_WAIT, found, &patience, nullptr, 0);
#else
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
    while (word->load(std::memory_order_acquire) == found && std::chrono::steady_clock::now() < deadline) sched_yield();
#endif
    return word->load(std::memory_order_acquire) == wanted;
}

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
