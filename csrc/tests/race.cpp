// Everything that ranks do to each other, under a sanitizer: race [--seed-fault missing-barrier|early-reuse]
//
// The arithmetic is modulo 2^64: every order of the additions gives the same bits, and one lost, doubled or stale
// number changes them. The expected values come from plain loops that share nothing with the parallel side.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../runtime/gate.h"
#include "../runtime/team.h"

namespace {

using namespace paraxis;
using Number = std::uint64_t;
using Numbers = std::vector<Number>;

std::string fault;
bool seeded(const char* name) { return fault == name; }

void expect(bool holds, const std::string& what) {
    if (!holds) throw std::logic_error(what);
}

Number sample(int step, int part, int i) { return 0x9e3779b97f4a7c15u * (Number(step) * 4099 + part * 257 + i + 1); }
Number gradient(Number weight, int step, int rank, int i) {
    return (weight ^ sample(step, rank, i)) * 0xbf58476d1ce4e5b9u;
}

// Data parallel with shared weights: private gradients, barrier, everyone reduces and updates a block, barrier.
Numbers data_parallel(int ranks, int spin_us, int steps, int size) {
    Abort abort;
    Barrier barrier(ranks, spin_us, abort);
    Numbers weights(size, 1);
    std::vector<Numbers> gradients(ranks, Numbers(size));
    team(ranks, abort, [&](int rank) {
        for (int step = 0; step < steps; ++step) {
            for (int i = 0; i < size; ++i) gradients[rank][i] = gradient(weights[i], step, rank, i);
            if (!seeded("missing-barrier")) barrier.wait(rank);
            for (int i = size * rank / ranks; i < size * (rank + 1) / ranks; ++i)
                for (const Numbers& part : gradients) weights[i] -= part[i];
            barrier.wait(rank);
        }
    });
    return weights;
}

Numbers data_serial(int ranks, int steps, int size) {
    Numbers weights(size, 1);
    for (int step = 0; step < steps; ++step)
        for (Number& weight : weights) {
            Number sum = 0;
            for (int rank = 0; rank < ranks; ++rank) sum += gradient(weight, step, rank, int(&weight - weights.data()));
            weight -= sum;
        }
    return weights;
}

// Between two stages a buffer goes down with activations and comes back with their gradients written over them.
struct Boundary {
    Boundary(int credit, int spin_us, const Abort& abort) : down(credit, spin_us, abort), up(credit, spin_us, abort) {}
    Channel<Numbers*> down, up;
};

// A stage multiplies by its weight. It owns as many buffers as microbatches may be under way below it, and uses one
// again only after its gradient came back.
class Stage {
public:
    Stage(int rank, int stages, int width, Boundary* above, Boundary* below)
        : above_(above), below_(below), own_(seeded("early-reuse") ? 1 : stages - rank, Numbers(width)) {}

    void forward(int step, int microbatch) {
        Numbers& out = own_[microbatch % own_.size()];
        Numbers* in = above_ ? above_->down.pop() : nullptr;
        for (int i = 0; i < int(out.size()); ++i) out[i] = (in ? (*in)[i] : sample(step, microbatch, i)) * weight;
        received_.push_back(in);
        if (below_) below_->down.push(&out);
    }

    void backward(int step, int microbatch) {
        const Numbers& upstream = below_ ? *below_->up.pop() : own_[microbatch % own_.size()];  // loss: y^2 / 2
        Numbers* in = received_.front();
        received_.pop_front();
        for (int i = 0; i < int(upstream.size()); ++i) {
            gradient_ += upstream[i] * (in ? (*in)[i] : sample(step, microbatch, i));
            if (in) (*in)[i] = upstream[i] * weight;
        }
        if (above_) above_->up.push(in);
    }

    void update() { weight -= std::exchange(gradient_, 0) * 2; }  // even: an odd weight stays odd, and forgets nothing

    Number weight = 3;

private:
    Boundary* above_;
    Boundary* below_;
    std::vector<Numbers> own_;
    std::deque<Numbers*> received_;
    Number gradient_ = 0;
};

// 1F1B: stage s runs at most stages - s microbatches ahead of their gradients. Credit 1 makes producers wait for room.
Numbers pipeline(int stages, int spin_us, int steps, int microbatches, int width) {
    Abort abort;
    std::deque<Boundary> boundaries;
    for (int s = 0; s + 1 < stages; ++s) boundaries.emplace_back(1 + s, spin_us, abort);
    Numbers weights(stages);
    team(stages, abort, [&](int rank) {
        Stage stage(rank, stages, width, rank ? &boundaries[rank - 1] : nullptr,
                    rank + 1 < stages ? &boundaries[rank] : nullptr);
        for (int step = 0; step < steps; ++step) {
            const int ahead = std::min(microbatches, stages - rank);
            for (int m = 0; m < ahead; ++m) stage.forward(step, m);
            for (int m = 0; m < microbatches; ++m) {
                stage.backward(step, m);
                if (m + ahead < microbatches) stage.forward(step, m + ahead);
            }
            stage.update();
        }
        weights[rank] = stage.weight;
    });
    return weights;
}

Numbers pipeline_serial(int stages, int steps, int microbatches, int width) {
    Numbers weights(stages, 3);
    for (int step = 0; step < steps; ++step) {
        Number sum = 0;  // of y * x; the gradient of weight s is y * x * the product of the other weights
        for (int m = 0; m < microbatches; ++m)
            for (int i = 0; i < width; ++i) sum += sample(step, m, i) * sample(step, m, i);
        Number product = 1;
        for (Number weight : weights) product *= weight;
        Numbers next = weights;
        for (int s = 0; s < stages; ++s) {
            Number others = 1;
            for (int o = 0; o < stages; ++o)
                if (o != s) others *= weights[o];
            next[s] -= 2 * sum * product * others;
        }
        weights = next;
    }
    return weights;
}

// Rank 1 and the last one fail while the others wait at a barrier, for an item, and for room. The caller gets the
// error of the lowest rank, not that of a rank which only left its wait, and soon.
void failure(int ranks, int spin_us) {
    Abort abort;
    Barrier barrier(ranks, spin_us, abort);
    std::deque<Channel<int>> channels;
    for (int rank = 0; rank < ranks; ++rank) channels.emplace_back(1, spin_us, abort);
    const auto start = std::chrono::steady_clock::now();
    std::string caught;
    try {
        team(ranks, abort, [&](int rank) {
            barrier.wait(rank);
            if (rank == 1 || rank == ranks - 1) throw std::domain_error("rank " + std::to_string(rank));
            if (rank % 3 == 0) barrier.wait(rank);
            if (rank % 3 == 1) channels[rank].pop();
            if (rank % 3 == 2) channels[rank].push(0), channels[rank].push(0);
        });
    } catch (const std::domain_error& error) {
        caught = error.what();
    }
    expect(caught == "rank 1", "the error of rank 1 did not reach the caller");
    expect(std::chrono::steady_clock::now() - start < std::chrono::seconds(5), "leaving took too long");
}

void all() {
    for (int spin_us : {usual_spin_us, 0}) {
        for (int ranks : {2, 4, 8}) {
            const std::string with = std::to_string(ranks) + " ranks, spin " + std::to_string(spin_us) + " us";
            const int steps = 4000 / ranks;
            expect(data_parallel(ranks, spin_us, steps, 96) == data_serial(ranks, steps, 96), "data parallel, " + with);
            failure(ranks, spin_us);
        }
        for (int stages : {2, 3}) {
            const std::string with = std::to_string(stages) + " stages, spin " + std::to_string(spin_us) + " us";
            expect(pipeline(stages, spin_us, 1000, 5, 32) == pipeline_serial(stages, 1000, 5, 32), "pipeline, " + with);
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc == 3 && !std::strcmp(argv[1], "--seed-fault")) fault = argv[2];
    if (argc != 1 && !seeded("missing-barrier") && !seeded("early-reuse")) {
        std::fprintf(stderr, "usage: race [--seed-fault missing-barrier|early-reuse]\n");
        return 2;
    }
    try {
        all();
    } catch (const std::exception& error) {
        std::fprintf(stderr, "race: %s\n", error.what());
        return 1;
    }
    std::puts("race: all results equal the serial ones");
}
