// The ensemble's reductions and updates: gradients are summed where they lie, and every rank steps its own part.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "ensemble.h"

namespace paraxis {

template <class T>
T* Ensemble<T>::buffer(int rank, Buffer which, size_t* size) {
    Stage<T>& stage = *stages[rank];
    const Memory<T>& found = which == Buffer::params    ? stage.weights->params
                             : which == Buffer::delta   ? outers[rank].delta
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
    if (i.buffer == Buffer::tied) return sum_copies(hand, i);
    const auto [parts, me, member, gate] = row(hand.rank, i.axis);
    gate.wait(me);
    if (i.buffer == Buffer::norm) {
        double sum = 0;
        for (int n = 0; n < parts; ++n) sum += norms[member(n)];
        gate.wait(me);
        norms[hand.rank] = sum;
        return gate.wait(me);
    }
    if (i.buffer == Buffer::score || i.buffer == Buffer::totals) return gate.wait(me);  // summed by whoever asks
    if (grid.tp_of(hand.rank)) return gate.wait(me);  // a group has one buffer, of which its first thread takes care
    std::vector<T*> from(parts);
    size_t size = 0;
    for (int n = 0; n < parts; ++n) from[n] = buffer(member(n), i.buffer, &size);
    sum_into_all(hand, from, size, me, parts, i.mean);
    gate.wait(me);
}

template <class T>
void Ensemble<T>::sum_into_all(Hand& hand, const std::vector<T*>& all, size_t size, int me, int parts, bool mean) {
    const auto [begin, end] = part_of(size, me, parts);
    T* strip = strips[hand.rank].data();
    for (size_t at = begin; at < end; at += STRIP) {
        const size_t count = std::min(STRIP, end - at);
        std::fill(strip, strip + count, T(0));
        for (T* own : all) stages[hand.rank]->kernels.add_into(ptrdiff_t(count), own + at, strip);
        if (mean)
            for (size_t k = 0; k < count; ++k) strip[k] /= T(all.size());
        for (T* own : all) std::copy(strip, strip + count, own + at);
    }
}

// The stages of a replica that have a copy of the same parameters add up its gradient, all of their threads a part.
template <class T>
void Ensemble<T>::sum_copies(Hand& hand, const Instruction& i) {
    const std::vector<int>& places = ties[i.bucket];
    const int d = grid.dp_of(hand.rank);
    const int place = int(std::find(places.begin(), places.end(), grid.pp_of(hand.rank)) - places.begin());
    const int me = place * grid.tp + grid.tp_of(hand.rank);
    Barrier& gate = *knots[i.bucket * grid.dp + d];
    std::vector<T*> from;
    for (int place : places) {
        const int rank = grid.rank(d, place);
        from.push_back(stages[rank]->gradients.data() + tied(rank, i.bucket).first);
    }
    const auto [begin, end] = tied(hand.rank, i.bucket);
    gate.wait(me);
    sum_into_all(hand, from, end - begin, me, int(places.size()) * grid.tp, i.mean);
    gate.wait(me);
}

// The same for the sums of one layer that its replicas share, which are few and in double precision.
template <class T>
void Ensemble<T>::sum_moments(Hand& hand, const Instruction& i) {
    const int p = grid.pp_of(hand.rank), me = grid.dp_of(hand.rank), number = place(hand, i) / grid.pp;
    const auto of = [&](int n) -> Memory<double>& { return stage(grid.rank(n, p), number).moments[i.bucket]; };
    Barrier& gate = *replicas[p];
    gate.wait(me);
    const auto [begin, end] = part_of(of(me).size(), me, grid.dp);
    for (size_t k = begin; k < end; ++k) {
        double sum = 0;
        for (int n = 0; n < grid.dp; ++n) sum += of(n)[k];
        for (int n = 0; n < grid.dp; ++n) of(n)[k] = sum;
    }
    gate.wait(me);
}

template <class T>
void Ensemble<T>::update(Hand& hand, const Instruction& i) {
    Stage<T>& stage = *stages[hand.rank];
    if (i.rule == Rule::zero) {
        for (int number = 0; number < each; ++number) {
            Stage<T>& own = *every[hand.rank * each + number];
            own.backwards = own.weighed = 0;
            own.step_score = {};
        }
    } else if (i.rule == Rule::norm) {
        norm(hand);
    } else if (i.rule == Rule::statistics) {
        if (grid.tp_of(hand.rank)) return;  // of a group's statistics its first thread takes care
        const bool writes = !shared || grid.dp_of(hand.rank) == 0;
        for (size_t k = 0; k < stage.collected.size(); ++k) {
            if (writes) stage.weights->running[k] = stage.collected[k] / T(stage.microbatches);
            stage.collected[k] = 0;
        }
    } else if (i.rule == Rule::step) {
        descend(hand);
    } else if (i.rule == Rule::hogwild) {
        hogwild(hand);
    } else {
        outer(hand, i.rule);
    }
}

template <class T>
void Ensemble<T>::tie() {
    for (int n = 0; n < grid.pp * each; ++n)
        for (const auto& layer : stage(grid.rank(0, n / each), n % each).layers) {
            const int number = layer->spec.tie, place = n / each;
            if (number < 0) continue;
            ties.resize(std::max(ties.size(), size_t(number) + 1));
            const auto [begin, end] = tied(grid.rank(0, ties[number].empty() ? place : ties[number][0]), number);
            if (end - begin != layer->parameters || (!ties[number].empty() && ties[number].back() == place))
                throw std::invalid_argument(layer->spec.name + ": it is no copy of what another stage has");
            ties[number].push_back(place);
        }
}

// A rank updates [begin, end), in which copies of what a stage in front has are pieces of their own.
template <class T>
void Ensemble<T>::assign(int rank, size_t begin, size_t end, bool summed) {
    const int place = grid.pp_of(rank);
    for (size_t number = 0; number < ties.size(); ++number) {
        const auto [from, to] = tied(rank, int(number));
        if (from == to || ties[number][0] == place || to <= begin || end <= from) continue;
        if (begin < from) assign(rank, begin, from, summed);
        pieces[rank].push_back({std::max(begin, from), std::min(end, to), summed, false});
        if (to < end) assign(rank, to, end, summed);
        return;
    }
    if (begin < end) pieces[rank].push_back({begin, end, summed});
}

// DiLoCo on a rank's own weights (Douillard et al. 2023): Python's page of it says what each rule is.
template <class T>
void Ensemble<T>::outer(Hand& hand, Rule rule) {
    if (outers.empty()) return;
    constexpr T RATE = T(0.7), MOMENTUM = T(0.9);
    const Memory<T>& params = stages[hand.rank]->weights->params;
    const size_t count = params.size();
    T *w = params.data(), *s = outers[hand.rank].snapshot.data(), *d = outers[hand.rank].delta.data(),
      *m = outers[hand.rank].momentum.data();
    if (rule == Rule::snapshot) std::copy(w, w + count, s);
    if (rule == Rule::copy) std::copy(s, s + count, w);
    if (rule == Rule::delta)
        for (size_t k = 0; k < count; ++k) d[k] = s[k] - w[k];
    if (rule == Rule::nesterov)
        for (size_t k = 0; k < count; ++k) m[k] = MOMENTUM * m[k] + d[k], d[k] += MOMENTUM * m[k];
    if (rule == Rule::outer)
        for (size_t k = 0; k < count; ++k) s[k] -= RATE * d[k];
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
        const int me = grid.dp_of(rank), thread = grid.tp_of(rank);
        if (!thread) kin[grid.pp_of(rank)].push_back(&stage);
        if (!owners) {
            const size_t count = stage.gradients.size();
            const auto [begin, end] = shared ? part_of(count, me * grid.tp + thread, grid.dp * grid.tp) : std::pair<size_t, size_t>{0, count};
            assign(rank, begin, end, shared && grid.dp > 1);
            continue;
        }
        stage.own_by(grid.dp);
        for (size_t n = 0; n < stage.layers.size(); ++n) {
            const Layer<T>& layer = *stage.layers[n];
            if (layer.spec.same >= 0) continue;  // its parameters are another layer's
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
        for (size_t at = piece.begin; piece.counted && at < piece.end; at += STRIP) {
            const size_t count = std::min(STRIP, piece.end - at);
            total += stages[hand.rank]->kernels.square_sum(ptrdiff_t(count), gradient(hand.rank, piece, at, count));
        }
    norms[hand.rank] = total / (hyper.weight * hyper.weight);
}

template class Ensemble<float>;
template class Ensemble<double>;

}  // namespace paraxis
