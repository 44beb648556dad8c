#include "ensemble.h"

#include <algorithm>
#include <chrono>
#include <string>

namespace paraxis {
namespace {

int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

bool computes(Op op) { return op == Op::F || op == Op::B || op == Op::I || op == Op::W; }

}  // namespace

template <class T>
Ensemble<T>::Ensemble(Grid grid, std::vector<std::unique_ptr<Stage<T>>> given, std::vector<Body> bodies, Hyper hyper,
                      bool shared, int usable_cores)
    : grid(grid), shared(shared), each(int(given.size()) / grid.size()), every(std::move(given)), bodies(std::move(bodies)), hyper(hyper),
      spin(grid.size() > usable_cores ? 0 : usual_spin_us), norms(grid.size()), clocks(size_t(grid.size()) * RING) {
    if (!each || int(every.size()) != grid.size() * each) throw std::invalid_argument("there must be stages for every rank");
    for (int rank = 0; rank < grid.size(); ++rank) stages.push_back(&stage(rank));
    for (const Body& body : this->bodies)
        if (int(body.ranks.size()) != grid.size())
            throw std::invalid_argument("body " + body.name + " has another number of ranks than the mesh");
    for (const Body& body : this->bodies)
        for (int rank = 0; rank < grid.size(); ++rank)
            for (const Instruction& i : body.ranks[rank]) fits(body, rank, i);
    for (int rank = 0; rank < grid.size(); ++rank)
        for (int number = 1; number < each; ++number) stage(rank, number).join(*stages[rank]);
    for (int rank = 0; rank < grid.size(); ++rank) {
        Stage<T>& own = *stages[rank];
        const int first = grid.rank(shared ? 0 : grid.dp_of(rank), grid.pp_of(rank));
        if (rank != first)
            own.weights = stages[first]->weights;
        else
            own.weights = std::make_shared<Weights<T>>(own.gradients.size(), own.collected.size(), own.dry);
        strips.emplace_back(STRIP);
    }
    bool owners = false, outer = false;
    for (const Body& body : this->bodies)
        for (const auto& list : body.ranks)
            for (const Instruction& i : list) owners |= i.rule == Rule::owner, outer |= i.rule >= Rule::snapshot;
    for (int rank = 0; outer && rank < grid.size(); ++rank) {
        const size_t count = stages[rank]->weights->params.size();
        const bool dry = stages[rank]->dry;
        outers.push_back({Memory<T>(count, dry), Memory<T>(count, dry), Memory<T>(count, dry)});
    }
    // Of a pipeline, the stage in front would overwrite what the owners behind it still read.
    if (owners && (!shared || stages[0]->microbatches > 1 || grid.pp > 1 || grid.tp > 1))
        throw std::invalid_argument("owners of gradients need weights in common, one microbatch and one stage");
    if (grid.tp > 1 && (!shared || each > 1))
        throw std::invalid_argument("threads of a group need replicas with weights in common, and one stage");
    tie();
    divide(owners);
    connect();
}

template <class T>
std::array<size_t, 4> Ensemble<T>::reserved(int rank) const {
    const Stage<T>& own = *stages[rank];
    const Weights<T>& weights = *own.weights;
    size_t state = weights.first.bytes() + weights.second.bytes(), activations = strips[rank].bytes();
    if (!outers.empty()) {
        const Outer& outer = outers[rank];
        state += outer.snapshot.bytes() + outer.delta.bytes() + outer.momentum.bytes();
    }
    for (int number = 0; number < each; ++number) activations += every[rank * each + number]->activation_bytes();
    return {weights.params.bytes() + weights.running.bytes(), own.gradients.bytes() + own.collected.bytes(), state, activations};
}

// Throws if an instruction names a stage that does not lie on its rank, or what that stage has not.
template <class T>
void Ensemble<T>::fits(const Body& body, int rank, const Instruction& i) {
    const auto need = [&](bool holds, const char* what) {
        if (!holds) throw std::invalid_argument("body " + body.name + what);
    };
    if (i.stage >= 0)
        need(i.stage < each * grid.pp && i.stage % grid.pp == grid.pp_of(rank), " names a stage that lies elsewhere");
    if (computes(i.op) || meets(i)) {
        const int number = computes(i.op) ? i.segment : i.bucket;
        const Stage<T>& own = stage(rank, std::max(i.stage, 0) / grid.pp);
        need(number >= 0 && number < own.segments() - meets(i) && (!computes(i.op) || own.starts(i.op == Op::F, number)),
             " has other segments than its stage");
    }
    need(i.buffer != Buffer::tied || tied(rank, i.bucket).second, " adds up what its stage has no copy of");
}

template <class T>
std::pair<size_t, size_t> Ensemble<T>::tied(int rank, int tie) {
    for (int number = 0; number < each; ++number)
        if (const auto found = stage(rank, number).tied(tie); found.second) return found;
    return {0, 0};
}

// Gates that a failure has left half-way are of no further use, so every failure is followed by new ones.
template <class T>
void Ensemble<T>::connect() {
    abort = std::make_unique<Abort>();
    replicas.clear(), pipelines.clear(), groups.clear(), knots.clear(), links.clear();
    const auto set_up = [&](std::vector<std::unique_ptr<Barrier>>& gates, int count, int parties) {
        while (int(gates.size()) < count) gates.push_back(std::make_unique<Barrier>(parties, spin, *abort));
    };
    set_up(replicas, grid.pp * grid.tp, grid.dp);
    set_up(pipelines, grid.dp * grid.tp, grid.pp);
    set_up(groups, grid.pp * grid.dp, grid.tp);
    for (const auto& places : ties) set_up(knots, int(knots.size()) + grid.dp, int(places.size()) * grid.tp);
    for (int n = 0; n < grid.size() * each; ++n)
        links.push_back(std::make_unique<Links>(stages.front()->microbatches, spin, *abort));
}

template <class T>
typename Ensemble<T>::Row Ensemble<T>::row(int rank, Axis axis) const {
    const int d = grid.dp_of(rank), p = grid.pp_of(rank), t = grid.tp_of(rank);
    if (axis == Axis::dp) return {grid.dp, d, [=, this](int n) { return grid.rank(n, p, t); }, *replicas[p * grid.tp + t]};
    if (axis == Axis::pp) return {grid.pp, p, [=, this](int n) { return grid.rank(d, n, t); }, *pipelines[d * grid.tp + t]};
    return {grid.tp, t, [=, this](int n) { return grid.rank(d, p, n); }, *groups[p * grid.dp + d]};
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
            seen[rank][s] = stage(rank, each - 1).step_score;
        }
    });
    std::vector<Score> total(names.size());
    for (int rank = 0; rank < grid.size(); ++rank)
        for (size_t s = 0; s < names.size(); ++s)
            if (stage(rank, each - 1).tail) total[s].loss += seen[rank][s].loss, total[s].weight += seen[rank][s].weight;
    return total;
}

template <class T>
Score Ensemble<T>::evaluate(int name, int times, const Samples& samples) {
    for (auto& stage : every) stage->evaluation = {};
    start([&](int rank) {
        Hand hand{rank, 0, 0, 0, &samples};
        for (; hand.within < times; ++hand.within) {
            body(hand, bodies[name], nullptr);
            meet(rank, Axis::pp);  // a forward alone gives no buffer back: all are given back here
        }
    });
    Score total;
    for (auto& stage : every) {
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
    for (auto& stage : every) stage->backwards = stage->weighed = 0, stage->step_score = {};
}

template <class T>
void Ensemble<T>::load(int number, int microbatch, const Samples& samples, int64_t first) {
    start([&](int rank) {
        stage(rank, number).load(microbatch, samples, 0, first + int64_t(rank) * stages[rank]->slice);
    });
}

template <class T>
void Ensemble<T>::forward(int number, int segment, int microbatch, int64_t step, int64_t first, bool training) {
    start([&](int rank) {
        Stage<T>& own = stage(rank, number);
        own.forward(segment, microbatch, uint64_t(step), first + int64_t(rank) * own.slice, training);
    });
}

template <class T>
void Ensemble<T>::backward(int number, int segment, int microbatch, int64_t step, int64_t first, bool parted) {
    start([&](int rank) {
        Stage<T>& own = stage(rank, number);
        own.backward(segment, microbatch, uint64_t(step), first + int64_t(rank) * own.slice, parted);
        if (!segment && !parted) complete(rank, number);
    });
}

template <class T>
void Ensemble<T>::weigh(int number, int segment, int microbatch) {
    start([&](int rank) {
        stage(rank, number).weigh(segment, microbatch);
        if (!segment) complete(rank, number);
    });
}

// Once a stage has the gradients of all microbatches its threads add theirs up.
template <class T>
void Ensemble<T>::complete(int rank, int number) {
    const Stage<T>& own = stage(rank, number);
    if (own.weighed < own.microbatches || grid.dp == 1) return;
    replicas[0]->wait(rank);
    const auto [begin, end] = part_of(own.parameters, rank, grid.dp);
    for (int n = 1; n < grid.dp; ++n)
        own.kernels.add_into(ptrdiff_t(end - begin), stages[n]->gradients.data() + own.begins + begin,
                             stages[0]->gradients.data() + own.begins + begin);
}

template <class T>
void Ensemble<T>::finish(int64_t step, double rate, double scale) {
    start([&](int rank) {
        Hand hand{rank, step, 0, rate, nullptr};
        const auto [begin, end] = part_of(stages[0]->gradients.size(), rank, grid.dp);
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
    const int number = place(hand, i);
    Stage<T>& own = stage(hand.rank, number / grid.pp);
    switch (i.op) {
        case Op::Load:
        case Op::F:
        case Op::B:
        case Op::I:
        case Op::W: return compute(hand, i);
        case Op::Update: return update(hand, i);
        case Op::SendActStart: return link(hand, number).acts.send(i.microbatch, own.output(i.microbatch));
        case Op::RecvActWait: return own.give_input(i.microbatch, link(hand, number - 1).acts.receive(i.microbatch));
        case Op::SendGradStart: return link(hand, number - 1).grads.send(i.microbatch, own.input_gradient(i.microbatch));
        case Op::RecvGradWait: return own.give_gradient(i.microbatch, link(hand, number).grads.receive(i.microbatch));
        case Op::AllReduceWait: return all_reduce(hand, i);
        // In common memory these are barriers: gradients are summed where they lie, new weights, and what the threads of a
        // group have made of an activation, are where they are read.
        case Op::ReduceScatterWait:
        case Op::AllGatherWait: return meet(hand.rank, i.axis);
        default: return;  // what only begins something that its wait does
    }
}

template <class T>
void Ensemble<T>::meet(int rank, Axis axis) {
    const Row ranks = row(rank, axis);
    ranks.gate.wait(ranks.me);
}

template <class T>
void Ensemble<T>::compute(Hand& hand, const Instruction& i) {
    Stage<T>& own = stage(hand.rank, place(hand, i) / grid.pp);
    const int64_t first = int64_t(i.slice) * own.slice;
    if (i.op == Op::Load) return own.load(i.microbatch, *hand.samples, hand.within, first);
    if (i.op == Op::W && i.rule == Rule::owner) return own.own(i.segment, kin[grid.pp_of(hand.rank)], grid.dp_of(hand.rank));
    if (i.op == Op::W) return own.weigh(i.segment, i.microbatch);
    if (i.op == Op::I) {
        own.backward(i.segment, i.microbatch, uint64_t(hand.step), first, true);
        return own.keep_input(i.microbatch);
    }
    if (i.op == Op::B) return own.backward(i.segment, i.microbatch, uint64_t(hand.step), first);
    own.forward(i.segment, i.microbatch, uint64_t(hand.step), first, i.rule != Rule::evaluate);
}

template class Ensemble<float>;
template class Ensemble<double>;

}  // namespace paraxis
