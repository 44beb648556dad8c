// All ranks of a program as the threads of one process, with the stages that they compute.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <utility>

#include "../layers/stage.h"
#include "gate.h"
#include "program.h"
#include "team.h"

namespace paraxis {

struct Grid {
    int dp = 1, pp = 1, tp = 1;
    int size() const { return dp * pp * tp; }
    int tp_of(int rank) const { return rank % tp; }
    int dp_of(int rank) const { return rank / tp % dp; }
    int pp_of(int rank) const { return rank / (tp * dp); }
    int rank(int d, int p, int t = 0) const { return (p * dp + d) * tp + t; }
};

// How parameters follow their gradients; `rate` of every step comes with a run.
struct Hyper {
    bool adam = false, nesterov = false, decoupled = false;
    double momentum = 0, decay = 0, beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, clip = 0;
    double weight = 1;  // what a sum of gradients is divided by
};

constexpr int RING = 1024;  // steps whose timestamps are kept: those of a chunk that is measured

constexpr size_t STRIP = 2048;  // elements whose gradients are summed and applied at once, in the first cache

// The part of `count` elements, in whole cache lines, that number `n` of `parts` takes care of.
inline std::pair<size_t, size_t> part_of(size_t count, int n, int parts) {
    const size_t lines = (count + 31) / 32, each = (lines + parts - 1) / parts;
    return {std::min(count, n * each * 32), std::min(count, (n + 1) * each * 32)};
}

// Whether an instruction sums what a batch norm over all replicas needs.
inline bool meets(const Instruction& i) { return i.buffer == Buffer::moments || i.buffer == Buffer::moment_grads; }

// From a stage to one beside it, which may want microbatches in another order than they are sent in.
template <class T>
class Line {
  public:
    Line(int microbatches, int spin, const Abort& abort) : channel(microbatches + 1, spin, abort), early(microbatches) {}
    void send(int microbatch, T* data) { channel.push({microbatch, data}); }
    T* receive(int microbatch) {
        while (!early[microbatch]) {
            const Parcel parcel = channel.pop();
            early[parcel.microbatch] = parcel.data;
        }
        return std::exchange(early[microbatch], nullptr);
    }

  private:
    struct Parcel {
        int microbatch;
        T* data;
    };
    Channel<Parcel> channel;
    std::vector<T*> early;  // the receiver's: what has come before its turn
};

template <class T>
class Ensemble {
  public:
    // `stages`: equally many of each rank, those of a rank side by side; stage s of a replica is number s / pp on place
    // s % pp. `shared`: replicas have one copy of the weights; otherwise each its own. The threads of a `tp` group have one
    // copy of everything, and one stage. Throws std::invalid_argument.
    Ensemble(Grid grid, std::vector<std::unique_ptr<Stage<T>>> stages, std::vector<Body> bodies, Hyper hyper,
             bool shared, int usable_cores);

    // Optimiser steps [first, first + bodies.size()), step s running body[s]; losses[s]: (sum, weight).
    std::vector<Score> run(int64_t first, const std::vector<int>& body, const std::vector<double>& rates,
                           const Samples& samples);
    // A body that trains nothing, `times` times; returns the sum of all scores.
    Score evaluate(int body, int times, const Samples& samples);
    void settle(int body);
    std::vector<std::vector<int64_t>> stamps(int64_t step) const;  // nanoseconds of each rank around its instructions

    // Driven from outside, as one rank of a larger mesh: the replicas here are the threads of that rank, which share
    // the samples of every microbatch and add their gradients up in those of the first. `number`: of a stage on it.
    void load(int number, int microbatch, const Samples& samples, int64_t first);
    void forward(int number, int segment, int microbatch, int64_t step, int64_t first, bool training);
    // `parted`: an I, whose W is `weigh`; both take a stage that has been told to part.
    void backward(int number, int segment, int microbatch, int64_t step, int64_t first, bool parted);
    void weigh(int number, int segment, int microbatch);
    void finish(int64_t step, double rate, double scale);
    void begin();

    // Bytes of a rank's parameters (which replicas may have in common), gradients, optimiser's state, activations.
    std::array<size_t, 4> reserved(int rank) const;

    Stage<T>& stage(int rank, int number = 0) { return *every[rank * each + number]; }
    std::pair<size_t, size_t> tied(int rank, int tie);  // where a rank's flat buffers have the parameters of a tie
    const Grid grid;
    const bool shared;
    const int each;  // stages of a rank

  private:
    // What one rank has in hand while it runs.
    struct Hand {
        int rank;
        int64_t step = 0;   // of the training
        int64_t within = 0;  // of the samples handed over with this run
        double rate = 0;
        const Samples* samples = nullptr;
    };
    struct Links {  // between two stages of a replica
        Links(int microbatches, int spin, const Abort& abort) : acts(microbatches, spin, abort), grads(microbatches, spin, abort) {}
        Line<T> acts, grads;
    };

    std::vector<std::unique_ptr<Stage<T>>> every;
    std::vector<Stage<T>*> stages;  // the first of each rank, which has the flat buffers
    std::vector<Body> bodies;
    Hyper hyper;
    int spin;
    std::unique_ptr<Abort> abort;
    // Of those who differ in one coordinate only: dp, pp, tp.
    std::vector<std::unique_ptr<Barrier>> replicas, pipelines, groups;
    std::vector<std::vector<int>> ties;            // of what stages have copies of: these stages
    std::vector<std::unique_ptr<Barrier>> knots;  // [tie * dp + replica], of all threads of these stages
    std::vector<std::unique_ptr<Links>> links;    // [(stage in front * dp + replica) * tp + thread]
    std::vector<double> norms;
    std::vector<std::vector<int64_t>> clocks;  // [rank * RING + step % RING]
    std::vector<Memory<T>> strips;
    struct Outer {  // what DiLoCo keeps beside the weights of a rank
        Memory<T> snapshot, delta, momentum;
    };
    std::vector<Outer> outers;
    struct Piece {  // of the parameters; summed: its gradient is the sum of the replicas' own
        size_t begin, end;
        bool summed;
        bool counted = true;  // in the norm; of copies, one is
    };
    std::vector<std::vector<Piece>> pieces;    // that each rank updates
    std::vector<std::vector<Stage<T>*>> kin;  // replicas of each stage
    std::vector<std::vector<const T*>> sources;  // whose gradients a rank is summing

    void fits(const Body& body, int rank, const Instruction& i);
    int place(const Hand& hand, const Instruction& i) const { return i.stage < 0 ? grid.pp_of(hand.rank) : i.stage; }
    Links& link(const Hand& hand, int edge) {
        return *links[(edge * grid.dp + grid.dp_of(hand.rank)) * grid.tp + grid.tp_of(hand.rank)];
    }
    void complete(int rank, int number);
    void connect();
    struct Row {  // the ranks along an axis, the place of one of them, and their barrier
        int parts, me;
        std::function<int(int)> member;
        Barrier& gate;
    };
    Row row(int rank, Axis axis) const;
    void meet(int rank, Axis axis);
    void start(const std::function<void(int)>& f);
    void body(Hand& hand, const Body& body, std::vector<int64_t>* stamps);
    void execute(Hand& hand, const Instruction& i);
    void compute(Hand& hand, const Instruction& i);
    void all_reduce(Hand& hand, const Instruction& i);
    void sum_moments(Hand& hand, const Instruction& i);
    void sum_copies(Hand& hand, const Instruction& i);
    void sum_into_all(Hand& hand, const std::vector<T*>& from, size_t size, int me, int parts, bool mean);
    void tie();
    void update(Hand& hand, const Instruction& i);
    void descend(Hand& hand);
    void hogwild(Hand& hand);
    void outer(Hand& hand, Rule rule);
    void norm(Hand& hand);
    T* buffer(int rank, Buffer which, size_t* size);
    void divide(bool owners);
    void assign(int rank, size_t begin, size_t end, bool summed);
    const T* gradient(int rank, const Piece& piece, size_t at, size_t count);
    T scale(int rank) const;
    void apply(Hand& hand, size_t begin, size_t count, const T* gradient, T scale);
};

}  // namespace paraxis
