// Nanoseconds of a barrier, ours and libgomp's, and of waking a sleeper: gate_bench
//
// The contenders run in turn, several rounds, so that a disturbance of the machine meets them all; each line gives
// the median and the least of its rounds.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "../runtime/gate.h"
#include "../runtime/team.h"

namespace {

using namespace paraxis;
using Clock = std::chrono::steady_clock;
using Samples = std::vector<double>;

double ns_since(Clock::time_point start) {
    return std::chrono::duration<double, std::nano>(Clock::now() - start).count();
}

double barrier_ns(int ranks, int spin_us, int times) {
    Abort abort;
    Barrier barrier(ranks, spin_us, abort);
    double ns = 0;
    team(ranks, abort, [&](int rank) {
        barrier.wait(rank);
        const auto start = Clock::now();
        for (int i = 0; i < times; ++i) barrier.wait(rank);
        if (rank == 0) ns = ns_since(start) / times;
    });
    return ns;
}

double libgomp_ns(int ranks, int times) {
    double ns = 0;
#pragma omp parallel num_threads(ranks)
    {
#pragma omp barrier
        const auto start = Clock::now();
        for (int i = 0; i < times; ++i) {
#pragma omp barrier
        }
        if (omp_get_thread_num() == 0) ns = ns_since(start) / times;
    }
    return ns;
}

// From just before the gate is advanced until the waiter, long asleep, runs again.
double wake_ns() {
    Abort abort;
    Gate gate(0, abort);
    Clock::time_point opened;
    double ns = 0;
    team(2, abort, [&](int rank) {
        if (rank == 0) {
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
            opened = Clock::now();
            gate.advance();
        } else {
            gate.wait(1);
            ns = ns_since(opened);
        }
    });
    return ns;
}

double team_ns() {
    const auto start = Clock::now();
    for (int i = 0; i < 100; ++i) team(2, [](int) {});
    return ns_since(start) / 100;
}

void print(const char* what, Samples& samples) {
    std::sort(samples.begin(), samples.end());
    std::printf("%-44s %10.0f %10.0f\n", what, samples[samples.size() / 2], samples.front());
}

}  // namespace

int main() {
    Samples ours2, gomp2, ours8, gomp8, wake, start;
    for (int round = 0; round < 15; ++round) {
        ours2.push_back(barrier_ns(2, usual_spin_us, 3000));
        gomp2.push_back(libgomp_ns(2, 3000));
        start.push_back(team_ns());
        ours8.push_back(barrier_ns(8, 0, 200));
        gomp8.push_back(libgomp_ns(8, 200));
        for (int i = 0; i < 10; ++i) wake.push_back(wake_ns());
    }
    std::printf("%-44s %10s %10s\n", "ns", "median", "least");
    print("barrier, 2 ranks, spin 30 us", ours2);
    print("barrier, 2 ranks, libgomp", gomp2);
    print("barrier, 8 ranks, spin 0", ours8);
    print("barrier, 8 ranks, libgomp", gomp8);
    print("waking a sleeper", wake);
    print("a team of 2 that does nothing", start);
}
