#include "ensemble.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <string>

namespace paraxis {
namespace {

constexpr size_t STRIP = 2048;  // elements whose gradients are summed and applied at once, in the first cache

int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// The part of `count` elements, in whole cache lines, that number `n` of `parts` takes care of.
std::pair<size_t, size_t> part_of(size_t count, int n, int parts) {
    const size_t lines = (count + 31) / 32, each = (lines + parts - 1) / parts;
    return {std::min(count, n * each * 32), std::min(count, (n + 1) * each * 32)};
}

bool meets(const Instruction& i) { return i.buffer == Buffer::moments || i.buffer == Buffer::moment_grads; }

// Throws if an instruction names a segment, or a layer that ends one, that a stage has not.
void fits(const Body& body, const Instruction& i, int segments) {
    const bool computes = i.op == Op::F || i.op == Op::B || i.op == Op::I || i.op == Op::W;
    const int number = computes ? i.segment : i.bucket;
    if ((computes || meets(i)) && (number < 0 || number >= segments - meets(i)))
        throw std::invalid_argument("body " + body.name + " has other segments than its stage");
}

}  // namespace

template <class T>
Ensemble<T>::Ensemble(Grid grid, std::vector<std::unique_ptr<Stage<T>>> given, std::vector<Body> bodies, Hyper hyper,
                      bool shared, int usable_cores)
    : grid(grid), shared(shared), stages(std::move(given)), bodies(std::move(bodies)), hyper(hyper),
      spin(grid.size() > usable_cores ? 0 : usual_spin_us), norms(grid.size()), clocks(size_t(grid.size()) * RING) {
    if (int(stages.size()) != grid.size()) throw std::invalid_argument("there must be one stage a rank");
    for (const Body& body : this->bodies)
        if (int(body.ranks.size()) != grid.size())
            throw std::invalid_argument("body " + body.name + " has another number of ranks than the mesh");
    for (const Body& body : this->bodies)
        for (int rank = 0; rank < grid.size(); ++rank)
            for (const Instruction& i : body.ranks[rank]) fits(body, i, stages[rank]->segments());
    for (int rank = 0; rank < grid.size(); ++rank) {
        Stage<T>& own = *stages[rank];
        const int first = grid.rank(0, grid.pp_of(rank));
        if (shared && rank != first)
            own.weights = stages[first]->weights;
        else
            own.weights = std::make_shared<Weights<T>>(own.parameters, own.statistics);
        strips.emplace_back(STRIP);
    }
    bool owners = false;
    for (const Body& body : this->bodies)
        for (const auto& list : body.ranks)
            for (const Instruction& i : list) owners |= i.op == Op::W;
    // Of a pipeline, the stage in front would overwrite what the owners behind it still read.
    if (owners && (!shared || stages[0]->microbatches > 1 || grid.pp > 1))
        throw std::invalid_argument("owners of gradients need weights in common, one microbatch and one stage");
    divide(owners);
    connect();
}

// Gates that a failure has left half-way are of no further use, so every failure is followed by new ones.
template <class T>
void Ensemble<T>::connect() {
    abort = std::make_unique<Abort>();
    replicas.clear(), pipelines.clear(), links.clear();
    for (int p = 0; p < grid.pp; ++p) replicas.push_back(std::make_unique<Barrier>(grid.dp, spin, *abort));
    for (int d = 0; d < grid.dp; ++d) pipelines.push_back(std::make_unique<Barrier>(grid.pp, spin, *abort));
    const int room = stages.front()->microbatches + 1;
    for (int rank = 0; rank < grid.size(); ++rank) links.push_back(std::make_unique<Links>(room, spin, *abort));
}

template <class T>
void Ensemble<T>::start(const std::function<void(int)>& f) {
    try {
        if (grid.size() == 1)
            f(0);
        else
            team(grid.size(), *abort, f);
    } catch (...) {
        connect();
        throw;
    }
}

template <class T>
std::vector<Score> Ensemble<T>::run(int64_t first, const std::vector<int>& names, const std::vector<double>& rates,
                                    const Samples& samples) {
    std::vector<std::vector<Score>> seen(grid.size(), std::vector<Score>(names.size()));
    start([&](int rank) {
        Hand hand{rank, first, 0, 0, &samples};
        for (size_t s = 0; s < names.size(); ++s, ++hand.step, ++hand.within) {
            hand.rate = rates[s];
            body(hand, bodies[names[s]], &clocks[rank * RING + hand.step % RING]);
            seen[rank][s] = stages[rank]->step_score;
        }
    });
    std::vector<Score> total(names.size());
    for (int rank = 0; rank < grid.size(); ++rank)
        for (size_t s = 0; s < names.size(); ++s)
            if (stages[rank]->tail) total[s].loss += seen[rank][s].loss, total[s].weight += seen[rank][s].weight;
    return total;
}

template <class T>
Score Ensemble<T>::evaluate(int name, int times, const Samples& samples) {
    for (auto& stage : stages) stage->evaluation = {};
    start([&](int rank) {
        Hand hand{rank, 0, 0, 0, &samples};
        for (; hand.within < times; ++hand.within) {
            body(hand, bodies[name], nullptr);
            pipelines[grid.dp_of(rank)]->wait(grid.pp_of(rank));  // a forward alone gives no buffer back: all are given back here
        }
    });
    Score total;
    for (auto& stage : stages) {
        total.loss += stage->evaluation.loss;
        total.weight += stage->evaluation.weight;
        total.hits += stage->evaluation.hits;
    }
    return total;
}

template <class T>
void Ensemble<T>::settle(int name) {
    const Samples none;
    start([&](int rank) {
        Hand hand{rank, 0, 0, 0, &none};
        body(hand, bodies[name], nullptr);
    });
}

template <class T>
std::vector<std::vector<int64_t>> Ensemble<T>::stamps(int64_t step) const {
    std::vector<std::vector<int64_t>> found;
    for (int rank = 0; rank < grid.size(); ++rank) found.push_back(clocks[rank * RING + step % RING]);
    return found;
}

template <class T>
void Ensemble<T>::begin() {
    for (auto& stage : stages) stage->backwards = 0, stage->step_score = {};
}

template <class T>
void Ensemble<T>::load(int microbatch, const Samples& samples, int64_t first) {
    start([&](int rank) { stages[rank]->load(microbatch, samples, 0, first + int64_t(rank) * stages[rank]->slice); });
}

template <class T>
void Ensemble<T>::forward(int segment, int microbatch, int64_t step, int64_t first, bool training) {
    start([&](int rank) {
        stages[rank]->forward(segment, microbatch, uint64_t(step), first + int64_t(rank) * stages[rank]->slice, training);
    });
}

template <class T>
void Ensemble<T>::backward(int segment, int microbatch, int64_t step, int64_t first) {
    const bool last = !segment && stages[0]->backwards + 1 == stages[0]->microbatches;
    start([&](int rank) {
        Stage<T>& own = *stages[rank];
        own.backward(segment, microbatch, uint64_t(step), first + int64_t(rank) * own.slice);
        if (!last || grid.dp == 1) return;
        replicas[0]->wait(rank);
        const auto [begin, end] = part_of(own.parameters, rank, grid.dp);
        for (int n = 1; n < grid.dp; ++n)
            own.kernels.add_into(ptrdiff_t(end - begin), stages[n]->gradients.data() + begin,
                                 stages[0]->gradients.data() + begin);
    });
}

template <class T>
void Ensemble<T>::finish(int64_t step, double rate, double scale) {
    start([&](int rank) {
        Hand hand{rank, step, 0, rate, nullptr};
        const auto [begin, end] = part_of(stages[0]->parameters, rank, grid.dp);
        apply(hand, begin, end - begin, stages[0]->gradients.data() + begin, T(scale));
    });
}

template <class T>
void Ensemble<T>::body(Hand& hand, const Body& body, std::vector<int64_t>* stamps) {
    const auto& instructions = body.ranks[hand.rank];
    if (stamps) {
        stamps->resize(instructions.size() + 1);
        (*stamps)[0] = now();
    }
    for (size_t n = 0; n < instructions.size(); ++n) {
        execute(hand, instructions[n]);
        if (stamps) (*stamps)[n + 1] = now();
    }
}

template <class T>
void Ensemble<T>::execute(Hand& hand, const Instruction& i) {
    Stage<T>& stage = *stages[hand.rank];
    const int behind = hand.rank, before = hand.rank - grid.dp;  // the links of a rank lead to the next stage
    switch (i.op) {
        case Op::Load:
        case Op::F:
        case Op::B:
        case Op::I:
        case Op::W: return compute(hand, i);
        case Op::Update: return update(hand, i);
        case Op::SendActStart: return links[behind]->acts.push(stage.output(i.microbatch));
        case Op::RecvActWait: return stage.give_input(i.microbatch, links[before]->acts.pop());
        case Op::SendGradStart: return links[before]->grads.push(stage.input_gradient(i.microbatch));
        case Op::RecvGradWait: return stage.give_gradient(i.microbatch, links[behind]->grads.pop());
        case Op::AllReduceWait: return all_reduce(hand, i);
        // With shared weights these are barriers: gradients are summed where they lie, new weights are where they are read.
        case Op::ReduceScatterWait:
        case Op::AllGatherWait: return replicas[grid.pp_of(hand.rank)]->wait(grid.dp_of(hand.rank));
        default: return;  // what only begins something that its wait does
    }
}

template <class T>
void Ensemble<T>::compute(Hand& hand, const Instruction& i) {
    Stage<T>& stage = *stages[hand.rank];
    const int64_t first = int64_t(i.slice) * stage.slice;
    if (i.op == Op::Load) return stage.load(i.microbatch, *hand.samples, hand.within, first);
    if (i.op == Op::W) return stage.own(i.segment, kin[grid.pp_of(hand.rank)], grid.dp_of(hand.rank));
    if (i.op == Op::I) return stage.backward(i.segment, i.microbatch, uint64_t(hand.step), first, true);
    if (i.op == Op::B) return stage.backward(i.segment, i.microbatch, uint64_t(hand.step), first);
    stage.forward(i.segment, i.microbatch, uint64_t(hand.step), first, i.rule != Rule::evaluate);
}

template <class T>
T* Ensemble<T>::buffer(int rank, Buffer which, size_t* size) {
    Stage<T>& stage = *stages[rank];
    const Memory<T>& found = which == Buffer::params    ? stage.weights->params
                             : which == Buffer::running ? stage.weights->running
                             : which == Buffer::statistics ? stage.collected
                                                        : stage.gradients;
    *size = found.size();
    return found.data();
}

// In shared memory: every rank sums its own part over all and writes it back to all.
template <class T>
void Ensemble<T>::all_reduce(Hand& hand, const Instruction& i) {
    if (meets(i)) return sum_moments(hand, i);
    const bool along_dp = i.axis == Axis::dp;
    const int parts = along_dp ? grid.dp : grid.pp, me = along_dp ? grid.dp_of(hand.rank) : grid.pp_of(hand.rank);
    Barrier& gate = *(along_dp ? replicas[grid.pp_of(hand.rank)] : pipelines[grid.dp_of(hand.rank)]);
    auto member = [&](int n) { return along_dp ? grid.rank(n, grid.pp_of(hand.rank)) : grid.rank(grid.dp_of(hand.rank), n); };
    gate.wait(me);
    if (i.buffer == Buffer::norm) {
        double sum = 0;
        for (int n = 0; n < parts; ++n) sum += norms[member(n)];
        gate.wait(me);
        norms[hand.rank] = sum;
        return gate.wait(me);
    }
    if (i.buffer == Buffer::score || i.buffer == Buffer::totals) return gate.wait(me);  // summed by whoever asks
    std::vector<T*> from(parts);
    size_t size = 0;
    for (int n = 0; n < parts; ++n) from[n] = buffer(member(n), i.buffer, &size);
    const auto [begin, end] = part_of(size, me, parts);
    T* strip = strips[hand.rank].data();
    for (size_t at = begin; at < end; at += STRIP) {
        const size_t count = std::min(STRIP, end - at);
        std::fill(strip, strip + count, T(0));
        for (int n = 0; n < parts; ++n) stages[hand.rank]->kernels.add_into(ptrdiff_t(count), from[n] + at, strip);
        if (i.mean)
            for (size_t k = 0; k < count; ++k) strip[k] /= T(parts);
        for (int n = 0; n < parts; ++n) std::copy(strip, strip + count, from[n] + at);
    }
    gate.wait(me);
}

// The same for the sums of one layer that its replicas share, which are few and in double precision.
template <class T>
void Ensemble<T>::sum_moments(Hand& hand, const Instruction& i) {
    const int stage = grid.pp_of(hand.rank), me = grid.dp_of(hand.rank);
    Barrier& gate = *replicas[stage];
    gate.wait(me);
    const auto [begin, end] = part_of(stages[hand.rank]->moments[i.bucket].size(), me, grid.dp);
    for (size_t k = begin; k < end; ++k) {
        double sum = 0;
        for (int n = 0; n < grid.dp; ++n) sum += stages[grid.rank(n, stage)]->moments[i.bucket][k];
        for (int n = 0; n < grid.dp; ++n) stages[grid.rank(n, stage)]->moments[i.bucket][k] = sum;
    }
    gate.wait(me);
}

template <class T>
void Ensemble<T>::update(Hand& hand, const Instruction& i) {
    Stage<T>& stage = *stages[hand.rank];
    if (i.rule == Rule::zero) {
        stage.backwards = 0;
        stage.step_score = {};
    } else if (i.rule == Rule::norm) {
        norm(hand);
    } else if (i.rule == Rule::statistics) {
        const bool writes = !shared || grid.dp_of(hand.rank) == 0;
        for (size_t k = 0; k < stage.statistics; ++k) {
            if (writes) stage.weights->running[k] = stage.collected[k] / T(stage.microbatches);
            stage.collected[k] = 0;
        }
    } else if (i.rule == Rule::step) {
        descend(hand);
    } else if (i.rule == Rule::hogwild) {
        hogwild(hand);
    }
}

// Of the parameters, what each rank updates: all of its own copy, or its share of the common one; owners also compute the
// gradient of their share, where it is one of a matrix.
template <class T>
void Ensemble<T>::divide(bool owners) {
    pieces.resize(grid.size());
    kin.resize(grid.pp);
    sources.resize(grid.size());
    for (int rank = 0; rank < grid.size(); ++rank) {
        Stage<T>& stage = *stages[rank];
        const int me = grid.dp_of(rank);
        kin[grid.pp_of(rank)].push_back(&stage);
        if (!owners) {
            const auto [begin, end] = shared ? part_of(stage.parameters, me, grid.dp) : std::pair<size_t, size_t>{0, stage.parameters};
            pieces[rank].push_back({begin, end, shared && grid.dp > 1});
            continue;
        }
        stage.own_by(grid.dp);
        for (size_t n = 0; n < stage.layers.size(); ++n) {
            const Layer<T>& layer = *stage.layers[n];
            const size_t at = stage.places[n].weights, rest = at + layer.matrix;
            const auto [first, last] = layer.owned(me, grid.dp);
            const auto [begin, end] = part_of(layer.parameters - layer.matrix, me, grid.dp);
            if (first < last) pieces[rank].push_back({at + first, at + last, false});
            if (begin < end) pieces[rank].push_back({rest + begin, rest + end, true});
        }
    }
}

template <class T>
T Ensemble<T>::scale(int rank) const {
    double scale = 1 / hyper.weight;
    if (hyper.clip > 0) scale *= std::min(1.0, hyper.clip / (std::sqrt(norms[rank]) + 1e-6));
    return T(scale);
}

// A strip of a piece's gradient, summed over the replicas where it must be.
template <class T>
const T* Ensemble<T>::gradient(int rank, const Piece& piece, size_t at, size_t count) {
    Stage<T>& stage = *stages[rank];
    if (!piece.summed) return stage.gradients.data() + at;
    const auto& replicas = kin[grid.pp_of(rank)];
    std::vector<const T*>& from = sources[rank];
    from.resize(replicas.size());
    for (size_t n = 0; n < replicas.size(); ++n) from[n] = replicas[n]->gradients.data() + at;
    stage.kernels.sum_parts(ptrdiff_t(count), int(replicas.size()), from.data(), strips[rank].data());
    return strips[rank].data();
}

// Sum the replicas' gradients and apply them, a strip at a time, so that the sum never leaves the first cache.
template <class T>
void Ensemble<T>::descend(Hand& hand) {
    for (const Piece& piece : pieces[hand.rank])
        for (size_t at = piece.begin; at < piece.end; at += STRIP) {
            const size_t count = std::min(STRIP, piece.end - at);
            apply(hand, at, count, gradient(hand.rank, piece, at, count), scale(hand.rank));
        }
}

template <class T>
void Ensemble<T>::apply(Hand& hand, size_t at, size_t count, const T* gradient, T by) {
    Stage<T>& stage = *stages[hand.rank];
    Weights<T>& weights = *stage.weights;
    if (hyper.adam) {
        const double t = double(hand.step + 1);
        const Adam<T> rule{T(hand.rate), T(1 - hyper.beta1), T(hyper.beta2), T(1 - hyper.beta2), T(hyper.epsilon), T(hyper.decay), by,
                           T(1 - std::pow(hyper.beta1, t)), T(1 - std::pow(hyper.beta2, t)), hyper.decoupled};
        stage.kernels.adam(ptrdiff_t(count), rule, weights.params.data() + at, gradient, weights.first.data() + at,
                           weights.second.data() + at);
    } else {
        const Sgd<T> rule{T(hand.rate), T(hyper.momentum), T(hyper.decay), by, hyper.nesterov, hand.step == 0};
        stage.kernels.sgd(ptrdiff_t(count), rule, weights.params.data() + at, gradient, weights.first.data() + at);
    }
}

// Every rank steps by itself on the common weights, whatever the others do (Niu et al. 2011): each element is read and
// written by relaxed atomics, so that an update may be lost but never torn.
template <class T>
void Ensemble<T>::hogwild(Hand& hand) {
    Stage<T>& stage = *stages[hand.rank];
    T* w = stage.weights->params.data();
    const T* g = stage.gradients.data();
    const T rate = T(hand.rate * grid.dp / hyper.weight);  // of this rank's own samples
    for (size_t k = 0; k < stage.parameters; ++k) {
        std::atomic_ref<T> place(w[k]);
        place.store(place.load(std::memory_order_relaxed) - rate * g[k], std::memory_order_relaxed);
    }
}

// Square of the gradient's norm on the part that this rank updates.
template <class T>
void Ensemble<T>::norm(Hand& hand) {
    double total = 0;
    for (const Piece& piece : pieces[hand.rank])
        for (size_t at = piece.begin; at < piece.end; at += STRIP) {
            const size_t count = std::min(STRIP, piece.end - at);
            total += stages[hand.rank]->kernels.square_sum(ptrdiff_t(count), gradient(hand.rank, piece, at, count));
        }
    norms[hand.rank] = total / (hyper.weight * hyper.weight);
}

template class Ensemble<float>;
template class Ensemble<double>;

}  // namespace paraxis
