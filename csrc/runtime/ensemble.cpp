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

// Throws if an instruction names a segment, or a layer that ends one, that a stage has not.
template <class T>
void fits(const Body& body, const Instruction& i, const Stage<T>& stage) {
    const bool computes = i.op == Op::F || i.op == Op::B || i.op == Op::I || i.op == Op::W;
    const int number = computes ? i.segment : i.bucket;
    const bool known = number >= 0 && number < stage.segments() - meets(i);
    if ((computes || meets(i)) && !(known && (!computes || stage.begins(i.op == Op::F, number))))
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
            for (const Instruction& i : body.ranks[rank]) {
                fits(body, i, *stages[rank]);
                if (i.buffer == Buffer::tied && !stages[rank]->tied(i.bucket).second)
                    throw std::invalid_argument("body " + body.name + " adds up what its stage has no copy of");
            }
    for (int rank = 0; rank < grid.size(); ++rank) {
        Stage<T>& own = *stages[rank];
        const int first = grid.rank(shared ? 0 : grid.dp_of(rank), grid.pp_of(rank));
        if (rank != first)
            own.weights = stages[first]->weights;
        else
            own.weights = std::make_shared<Weights<T>>(own.parameters, own.statistics, own.dry);
        strips.emplace_back(STRIP);
    }
    bool owners = false, outer = false;
    for (const Body& body : this->bodies)
        for (const auto& list : body.ranks)
            for (const Instruction& i : list) owners |= i.op == Op::W, outer |= i.rule >= Rule::snapshot;
    for (int rank = 0; outer && rank < grid.size(); ++rank) {
        const size_t count = stages[rank]->weights->params.size();
        const bool dry = stages[rank]->dry;
        outers.push_back({Memory<T>(count, dry), Memory<T>(count, dry), Memory<T>(count, dry)});
    }
    // Of a pipeline, the stage in front would overwrite what the owners behind it still read.
    if (owners && (!shared || stages[0]->microbatches > 1 || grid.pp > 1 || grid.tp > 1))
        throw std::invalid_argument("owners of gradients need weights in common, one microbatch and one stage");
    if (grid.tp > 1 && !shared) throw std::invalid_argument("threads of a group need replicas with weights in common");
    tie();
    divide(owners);
    connect();
}

template <class T>
std::array<size_t, 6> Ensemble<T>::reserved(int rank) const {
    const Stage<T>& own = *stages[rank];
    const Weights<T>& weights = *own.weights;
    size_t state = weights.first.bytes() + weights.second.bytes();
    if (!outers.empty()) {
        const Outer& outer = outers[rank];
        state += outer.snapshot.bytes() + outer.delta.bytes() + outer.momentum.bytes();
    }
    return {weights.params.bytes() + weights.running.bytes(), own.gradients.bytes() + own.collected.bytes(), state,
            own.activation_bytes() + strips[rank].bytes(), own.head ? 0 : own.input_elements() * sizeof(T),
            own.tail ? 0 : own.output_elements() * sizeof(T)};
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
    const int room = stages.front()->microbatches + 1;
    for (int rank = 0; rank < grid.size(); ++rank) links.push_back(std::make_unique<Links>(room, spin, *abort));
}

template <class T>
typename Ensemble<T>::Line Ensemble<T>::line(int rank, Axis axis) const {
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
            meet(rank, Axis::pp);  // a forward alone gives no buffer back: all are given back here
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
    const int behind = hand.rank, before = hand.rank - grid.dp * grid.tp;  // the links of a rank lead to the next stage
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
        // In common memory these are barriers: gradients are summed where they lie, new weights, and what the threads of a
        // group have made of an activation, are where they are read.
        case Op::ReduceScatterWait:
        case Op::AllGatherWait: return meet(hand.rank, i.axis);
        default: return;  // what only begins something that its wait does
    }
}

template <class T>
void Ensemble<T>::meet(int rank, Axis axis) {
    const Line ranks = line(rank, axis);
    ranks.gate.wait(ranks.me);
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

template class Ensemble<float>;
template class Ensemble<double>;

}  // namespace paraxis
