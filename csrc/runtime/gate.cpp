#include "gate.h"

#if defined(__linux__) && !defined(PARAXIS_PORTABLE_SLEEP)
#define PARAXIS_FUTEX 1
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>
#else
#include <condition_variable>
#include <mutex>
#endif

namespace paraxis {
namespace {

using Word = std::atomic<std::uint32_t>;

// Nobody knows which gates an Abort concerns, so sleepers look up this often. Twenty wake-ups a second cost nothing.
constexpr std::chrono::milliseconds nap{50};

// Abort and clock are looked at once in a glance: a microsecond or so.
constexpr int looks = 64;

void pause() noexcept {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // `yield` is a no-op on most cores
#endif
}

#ifdef PARAXIS_FUTEX

static_assert(sizeof(Word) == sizeof(std::uint32_t) && Word::is_always_lock_free, "a futex is a plain 32-bit word");

// The kernel compares once more under its own lock, which closes the gap between our last look and falling asleep.
void sleep_while(Word& word, std::uint32_t seen) noexcept {
    const timespec timeout{0, std::chrono::nanoseconds(nap).count()};
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, &timeout, nullptr, 0);
}

void wake_all(Word& word) noexcept { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }

#else

// std::atomic::wait has no time limit, and an aborted rank must not sleep for ever. One bell for all gates.
std::mutex bedroom;
std::condition_variable bell;

void sleep_while(Word& word, std::uint32_t seen) {
    std::unique_lock hold(bedroom);
    if (word.load(std::memory_order_seq_cst) == seen) bell.wait_for(hold, nap);
}

void wake_all(Word&) {
    { std::lock_guard hold(bedroom); }  // whoever has looked but not yet lain down is asleep after this
    bell.notify_all();
}

#endif

}  // namespace

void Gate::wait_long(std::uint32_t target) {
    if (spin_.count() == 0 || !spin(target)) sleep(target);
}

bool Gate::glance(std::uint32_t target) const noexcept {
    for (int look = 0; look < looks; ++look) {
        if (reached(target)) return true;
        pause();
    }
    return false;
}

bool Gate::spin(std::uint32_t target) const {
    if (glance(target)) return true;  // most waits end here, without reading a clock
    const auto end = std::chrono::steady_clock::now() + spin_;
    do {
        if (abandoned(target)) throw Aborted();
        if (glance(target)) return true;
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

void Gate::sleep(std::uint32_t target) {
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    std::uint32_t seen;
    while (before(seen = phase_.load(std::memory_order_seq_cst), target) && !abandoned(target))
        sleep_while(phase_, seen);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
    if (!reached(target)) throw Aborted();
}

void Gate::wake() noexcept { wake_all(phase_); }

}  // namespace paraxis
