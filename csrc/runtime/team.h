// A team of ranks on OpenMP threads. Its parallel region is the only one of the runtime.
#pragma once

#include <omp.h>

#include <atomic>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "gate.h"

namespace paraxis {
namespace detail {

// What the ranks of one run share.
template <class F>
struct Run {
    Run(int threads, Abort& abort, F& f) : threads(threads), abort(abort), f(f), errors(threads) {}

    void rank(int rank) noexcept {
        try {
            f(rank);
        } catch (...) {
            errors[rank] = std::current_exception();
            abort.raise();
        }
    }

    // The cause: an Aborted is only its echo, and counts where nothing else is (stopped from outside).
    void rethrow() const {
        std::exception_ptr echo;
        for (const auto& error : errors) {
            if (!error) continue;
            try {
                std::rethrow_exception(error);
            } catch (const Aborted&) {
                if (!echo) echo = error;
            }
        }
        if (echo) std::rethrow_exception(echo);
    }

    const int threads;
    Abort& abort;
    F& f;
    std::vector<std::exception_ptr> errors;
    std::atomic<int> left{0};
};

[[noreturn]] inline void too_few(int given, int wanted) {
    throw std::runtime_error("OpenMP gave " + std::to_string(given) + " of " + std::to_string(wanted) +
                             " threads (OMP_THREAD_LIMIT allows " + std::to_string(omp_get_thread_limit()) +
                             ", OMP_DYNAMIC is " + (omp_get_dynamic() ? "true" : "false") +
                             (omp_in_parallel() ? ", and this is inside another parallel region)" : ")"));
}

// One rank, from reading what the caller published to its last touch of it.
template <class F>
[[gnu::noinline]] void take_part(const std::atomic<Run<F>*>& published) {
    Run<F>& run = *published.load(std::memory_order_acquire);
    if (omp_get_num_threads() == run.threads) run.rank(omp_get_thread_num());
    run.left.fetch_add(1, std::memory_order_acq_rel);
}

// ThreadSanitizer does not see libgomp order anything: neither the start of a region after what the caller wrote
// before, nor its end before what the caller reads next. So this function, which only hands over one address, is not
// instrumented, and what lies behind the address is ordered by atomics of our own: `published` on the way in, `left`
// on the way out. Twice per run, they cost nothing.
template <class F>
[[gnu::noinline, gnu::no_sanitize("thread")]] void fork(const std::atomic<Run<F>*>& published, int threads) {
#pragma omp parallel num_threads(threads)
    take_part(published);
}

}  // namespace detail

// Runs f(rank) for rank 0 .. threads - 1, each on a thread of its own, the caller's included. If f throws on a rank,
// `abort` is raised, so that no other rank waits for ever, and once all have left the caller gets the exception of the
// lowest rank that had one of its own. f must wait only on what was made with the same `abort`.
template <class F>
void team(int threads, Abort& abort, F&& f) {
    if (threads < 1) throw std::invalid_argument("a team needs at least one thread");
    detail::Run run(threads, abort, f);
    std::atomic<decltype(run)*> published{nullptr};
    published.store(&run, std::memory_order_release);
    detail::fork(published, threads);
    const int left = run.left.load(std::memory_order_acquire);
    if (left != threads) detail::too_few(left, threads);
    run.rethrow();
}

// For ranks that do not wait for each other.
template <class F>
void team(int threads, F&& f) {
    Abort unheard;
    team(threads, unheard, f);
}

}  // namespace paraxis
