// Everything that waits in the runtime waits on a gate.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <type_traits>
#include <vector>

namespace paraxis {

// Two lines, because the adjacent-line prefetcher fetches them in pairs.
inline constexpr std::size_t line = 128;

// Longer than a healthy rank keeps another waiting for, about what sleeping and waking costs.
inline constexpr int usual_spin_us = 50;

struct Aborted : std::runtime_error {
    Aborted() : std::runtime_error("left a wait because another rank failed") {}
};

// One rank failed: all others leave their waits by throwing Aborted. It is never lowered again, because the gates
// that were abandoned half-way are of no further use: a new run takes a new Abort, new barriers and new channels.
struct Abort {
    void raise() noexcept { raised_.store(true, std::memory_order_release); }  // safe in a signal handler
    bool raised() const noexcept { return raised_.load(std::memory_order_acquire); }

private:
    alignas(line) std::atomic<bool> raised_{false};
};

// A phase that only goes up (modulo 2^32) and those who wait until it has got somewhere. `spin_us` should be 0 where
// ranks outnumber usable cores: spinning would then keep the awaited rank off its core.
class Gate {
public:
    Gate(int spin_us, const Abort& abort) : spin_(spin_us), abort_(abort) {}
    Gate(const Gate&) = delete;
    Gate& operator=(const Gate&) = delete;

    // All that the caller wrote before is visible to whoever waited for this phase.
    void advance() noexcept {
        step();
        ring();
    }

    // The two halves of advance, for one who knows that nobody waits for the phase that step returns.
    //
    // Sleeping is Dekker's pattern: the sleeper writes `sleepers_` and then reads `phase_`, the waker writes `phase_`
    // and then reads `sleepers_`. With acquire and release alone each write may still sit in its core's store buffer
    // while the other core reads the old value: the waker sees nobody, the sleeper sees the old phase, and sleeps for
    // ever. Sequential consistency of these four puts them in one order, in which at least one sees the other.
    std::uint32_t step() noexcept { return phase_.fetch_add(1, std::memory_order_seq_cst) + 1; }
    void ring() noexcept {
        if (sleepers_.load(std::memory_order_seq_cst) != 0) wake();
    }

    void wait(std::uint32_t target) {
        if (!reached(target)) wait_long(target);
    }

private:
    // Signed distance, so that the phase may wrap.
    static bool before(std::uint32_t phase, std::uint32_t target) noexcept {
        return static_cast<std::int32_t>(phase - target) < 0;
    }
    bool reached(std::uint32_t target) const noexcept {
        return !before(phase_.load(std::memory_order_acquire), target);
    }

    // In this order: a gate that opened before the failure lets everybody through, so that which ranks get as far as
    // an error of their own does not depend on who was asleep.
    bool abandoned(std::uint32_t target) const noexcept { return abort_.raised() && !reached(target); }

    void wait_long(std::uint32_t target);
    bool glance(std::uint32_t target) const noexcept;
    bool spin(std::uint32_t target) const;
    void sleep(std::uint32_t target);
    void wake() noexcept;

    // A sleeper announcing itself must not disturb those who spin on the phase.
    alignas(line) std::atomic<std::uint32_t> phase_{0};
    alignas(line) std::atomic<std::uint32_t> sleepers_{0};
    alignas(line) const std::chrono::microseconds spin_;
    const Abort& abort_;
};

// The phase of one gate counts arrivals: a barrier moves a single line there and back, and one system call wakes all
// sleepers. A tree would spare many spinning ranks transfers, and cost sleeping ones a wake-up for each of its levels.
class Barrier {
public:
    Barrier(int parties, int spin_us, const Abort& abort)
        : opens_(static_cast<std::size_t>(std::max(parties, 0))), gate_(spin_us, abort) {
        if (parties < 1) throw std::invalid_argument("a barrier needs at least one party");
    }

    void wait(int rank) {
        // Each rank counts by itself: rounding the phase up to a multiple of the parties would fail where it wraps.
        std::uint32_t& opens = opens_[static_cast<std::size_t>(rank)].phase;
        opens += static_cast<std::uint32_t>(opens_.size());
        if (gate_.step() == opens) {
            gate_.ring();
        } else {
            gate_.wait(opens);
        }
    }

private:
    struct alignas(line) Opens {
        std::uint32_t phase = 0;
    };
    std::vector<Opens> opens_;
    Gate gate_;
};

// A ring with one producer and one consumer. Room is credit: a producer that is `capacity` items ahead waits.
template <class T>
class Channel {
    static_assert(std::is_trivially_copyable_v<T>, "a channel carries pointers and small values, not their contents");

public:
    Channel(int capacity, int spin_us, const Abort& abort) : popped_(spin_us, abort), pushed_(spin_us, abort) {
        if (capacity < 1) throw std::invalid_argument("a channel needs room for at least one item");
        slots_.resize(static_cast<std::size_t>(capacity));
    }

    void push(T item) {
        popped_.wait(static_cast<std::uint32_t>(next_push_ + 1 - slots_.size()));
        slots_[next_push_++ % slots_.size()] = item;
        pushed_.advance();
    }

    T pop() {
        pushed_.wait(static_cast<std::uint32_t>(next_pop_ + 1));
        const T item = slots_[next_pop_++ % slots_.size()];
        popped_.advance();
        return item;
    }

private:
    std::vector<T> slots_;
    // 64 bits, so that the slot does not jump where the gates' phases wrap. Each belongs to one side alone.
    alignas(line) std::uint64_t next_push_ = 0;
    alignas(line) std::uint64_t next_pop_ = 0;
    Gate popped_;
    Gate pushed_;
};

}  // namespace paraxis
