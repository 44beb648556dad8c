#include "stage.h"

#include <algorithm>
#include <cmath>

namespace paraxis {

template <class T>
Stage<T>::Stage(const std::vector<Spec>& specs, int slice, int microbatches, bool head, bool tail,
                const Kernels<T>& kernels, uint64_t seed, int tokens, bool dry, const Stage* first, int thread, int threads)
    : slice(slice), microbatches(microbatches), tokens(tokens), thread(thread), threads(threads), head(head), tail(tail),
      dry(dry), kernels(kernels), seed(seed), blocks(tokens ? slice * blocks_of(tokens) : blocks_of(slice)) {
    if (specs.empty() || slice < 1 || microbatches < 1) throw std::invalid_argument("a stage needs layers and samples");
    elements.push_back(size_t(blocks) * specs[0].in.size() * LANES);
    size_t most = 0;
    for (const Spec& spec : specs) {
        check(spec);
        auto layer = make_layer<T>(spec);
        settle(spec, *layer);
        layers.push_back(std::move(layer));
        most = std::max(most, layers.back()->scratch(blocks));
        if (layers.back()->moments) {
            if (microbatches > 1) throw std::invalid_argument(spec.name + ": replicas meet in one microbatch a step");
            if (threads > 1) throw std::invalid_argument(spec.name + ": replicas of several threads cannot meet in it");
            meeting.push_back(layers.size() - 1);
            cuts.push_back({layers.size() - 1, true, true});
            moments.emplace_back(layers.back()->moments);
        }
        elements.push_back(size_t(blocks) * spec.out.size() * LANES);
    }
    if (tail && specs.back().out.positions() != 1) throw std::invalid_argument("the last layer must give one row a sample");
    gradients = first ? first->gradients.lend() : Memory<T>(parameters, dry);
    collected = first ? first->collected.lend() : Memory<T>(statistics, dry);
    scratch = Memory<T>(most, dry);
    for (int m = 0; m < microbatches; ++m) house(first ? &first->slots[m] : nullptr);
    share();
    plan_gradients();
    shelved.assign(elements.size(), false);
    house_gradients(false, first);
}

// Room for one more microbatch, or what another thread of the group has.
template <class T>
void Stage<T>::house(const Slot* theirs) {
    Slot& slot = slots.emplace_back();
    for (size_t id = 0; id < elements.size(); ++id)
        slot.acts.push_back(theirs ? theirs->acts[id].lend() : Memory<T>(id || head ? elements[id] : 0, dry));
    for (size_t n = 0; n < layers.size(); ++n) {
        slot.kept.push_back(theirs ? theirs->kept[n].lend() : Memory<T>(blocks * layers[n]->kept, dry));
        slot.marks.push_back(theirs ? theirs->marks[n].lend() : Memory<uint8_t>(blocks * layers[n]->marks, dry));
    }
    slot.entering = theirs ? theirs->entering.lend() : Memory<T>(head ? 0 : elements[0], dry);
    slot.given = slot.acts[0].data();
    slot.targets.resize(size_t(blocks) * LANES);
    slot.valid = slice;
}

// Where the threads of a group wait for each other. A layer that reads other threads' channels waits in a forward until
// all are written, the one behind it in a backward until all of its gradient is; one whose threads make other parts than
// channels has both neighbours wait. What comes in and what goes out belongs to nobody in particular.
template <class T>
void Stage<T>::share() {
    if (threads == 1) return;
    cuts.push_back({0, true, true});
    for (size_t n = 1; n < layers.size(); ++n) {
        const Sharing before = layers[n - 1]->sharing, behind = layers[n]->sharing;
        const bool forward = behind != Sharing::alike || before == Sharing::apart;
        const bool backward = before != Sharing::alike || behind == Sharing::apart;
        if (forward || backward) cuts.push_back({n, forward, backward});
    }
    cuts.push_back({layers.size(), true, true});
}

template <class T>
std::vector<std::string> Stage<T>::borders() const {
    std::vector<std::string> words;
    for (const Cut& cut : cuts)
        words.push_back(threads == 1 ? "norm" : !cut.backward ? "acts" : !cut.forward ? "act_grads" : "shared");
    return words;
}

// The last segment that a forward or a backward covers which begins with this one.
template <class T>
int Stage<T>::reach(int segment, bool forward) const {
    while (segment + 1 < segments() && !stops(segment, forward)) ++segment;
    return segment;
}

// Whether the threads of a group wait in a backward between this layer and the next one.
template <class T>
bool Stage<T>::open(size_t layer) const {
    return std::any_of(cuts.begin(), cuts.end(), [&](const Cut& cut) { return cut.layer == layer + 1 && cut.backward; });
}

template <class T>
size_t Stage<T>::activation_bytes() const {
    size_t total = scratch.bytes();
    for (const auto& own : grads) total += own.bytes();
    for (const auto& own : moments) total += own.bytes();
    for (const auto& shelf : shelves) {
        total += shelf->input.bytes();
        for (const auto& own : shelf->gradients) total += own.bytes();
    }
    for (const Slot& slot : slots) {
        total += slot.entering.bytes();
        for (const auto& own : slot.acts) total += own.bytes();
        for (const auto& own : slot.kept) total += own.bytes();
        for (const auto& own : slot.marks) total += own.bytes();
    }
    return total;
}

template <class T>
void Stage<T>::check(const Spec& spec) const {
    const auto need = [&](bool holds, const char* what) {
        if (!holds) throw std::invalid_argument(spec.name + ": " + what);
    };
    need(spec.y == int(elements.size()) && spec.x >= 0 && spec.x < spec.y && spec.skip < spec.y,
         "its activations are not numbered in order");
    need(elements[spec.x] == size_t(blocks) * spec.in.size() * LANES,
         "its input has another shape than what is in front of it");
    const bool takes = spec.kind == "embedding" || spec.kind == "position" || spec.kind == "attention";
    const bool bare = spec.in.positions() == 1 && spec.kind != "batch_norm";
    need(tokens ? bare && (layers.empty() && head) == (spec.kind == "embedding") : !takes, "it is no layer of such samples");
    need(spec.kind != "position" || spec.entries >= tokens, "it has fewer tokens");
    need(spec.kind != "attention" || spec.entries == tokens, "it has another number of tokens");
}

// Where a layer's parameters lie: behind those of the layers in front, or where those of another one are.
template <class T>
void Stage<T>::settle(const Spec& spec, const Layer<T>& layer) {
    const int number = int(layers.size());
    dw_add.push_back(false);
    if (spec.same < 0) {
        places.push_back({parameters, statistics});
        parameters += layer.parameters;
        statistics += layer.statistics;
        return;
    }
    // Of a matrix with owners the gradient would come from two places.
    if (spec.same >= number || layers[spec.same]->spec.same >= 0 || layers[spec.same]->matrix ||
        layers[spec.same]->parameters != layer.parameters)
        throw std::invalid_argument(spec.name + ": it cannot use the parameters of that layer");
    for (int n = number - 1; n >= spec.same; --n)
        if (n == spec.same || layers[n]->spec.same == spec.same) {
            dw_add[n] = true;
            break;
        }
    places.push_back(places[spec.same]);
}

template <class T>
std::pair<size_t, size_t> Stage<T>::tied(int tie) const {
    for (size_t n = 0; n < layers.size(); ++n)
        if (tie >= 0 && layers[n]->spec.tie == tie) return {places[n].weights, places[n].weights + layers[n]->parameters};
    return {0, 0};
}

// An activation that several layers read has a sum for its gradient: the one that comes first in the backward writes it,
// the others add.
template <class T>
void Stage<T>::plan_gradients() {
    std::vector<bool> written(elements.size(), false);
    dx_add.resize(layers.size());
    dskip_add.resize(layers.size());
    for (size_t n = layers.size(); n-- > 0;) {
        const Spec& spec = layers[n]->spec;
        // A residual sum hands its gradient on before its main input: the order is that of the calls in a backward.
        if (spec.kind == "batch_norm" && spec.skip >= 0) {
            dskip_add[n] = written[spec.skip];
            written[spec.skip] = true;
        }
        dx_add[n] = written[spec.x];
        written[spec.x] = true;
        if (spec.kind != "batch_norm" && spec.skip >= 0) {
            dskip_add[n] = written[spec.skip];
            written[spec.skip] = true;
        }
    }
}

template <class T>
void Stage<T>::house_gradients(bool apart, const Stage* theirs) {
    std::vector<size_t> sizes;
    std::vector<int> empty, used;  // rooms: free, and free once no thread of the group can still be reading there
    rooms.assign(elements.size(), -1);
    const auto house = [&](int id) {
        if (id <= 0 || id + 1 == int(elements.size()) || rooms[id] >= 0) return;
        if (shelved[id]) {
            rooms[id] = id;  // of its shelf
            return;
        }
        if (empty.empty()) {
            empty.push_back(int(sizes.size()));
            sizes.push_back(0);
        }
        // The least of those that are large enough; if none is, the largest, which grows.
        const auto best = std::min_element(empty.begin(), empty.end(), [&](int a, int b) {
            const bool fits = sizes[a] >= elements[id], other = sizes[b] >= elements[id];
            return fits != other ? fits : fits ? sizes[a] < sizes[b] : sizes[a] > sizes[b];
        });
        rooms[id] = *best;
        sizes[*best] = std::max(sizes[*best], elements[id]);
        empty.erase(best);
    };
    for (size_t n = layers.size(); n-- > 0;) {
        const Spec& spec = layers[n]->spec;
        if (threads == 1 || open(n)) empty.insert(empty.end(), used.begin(), used.end()), used.clear();
        if (rooms[spec.y] < 0 && spec.y + 1 < int(elements.size()))
            throw std::invalid_argument(spec.name + ": nobody reads what it makes");
        house(spec.x);
        house(spec.skip);
        if (!apart && rooms[spec.y] >= 0 && !shelved[spec.y]) used.push_back(rooms[spec.y]);
    }
    grads.clear();
    for (size_t n = 0; n < sizes.size(); ++n) grads.push_back(theirs ? theirs->grads[n].lend() : Memory<T>(sizes[n], dry));
}

template <class T>
T* Stage<T>::grad(int m, int id) {
    if (!id) return slots[m].entering.data();
    if (id + 1 == int(elements.size())) return tail ? slots[m].acts.back().data() : slots[m].gradient;
    if (!shelved[id]) return grads[rooms[id]].data();
    return slots[m].shelf ? slots[m].shelf->gradients[rooms[id]].data() : nullptr;  // a forward has none
}

template <class T>
Pass<T> Stage<T>::pass(size_t n, int m, uint64_t step, int64_t first, bool training) {
    const Spec& spec = layers[n]->spec;
    Slot& slot = slots[m];
    const bool first_layer = head && spec.x == 0;
    const auto place = std::find(meeting.begin(), meeting.end(), n);
    return {
        .kernels = &kernels, .blocks = blocks, .samples = slot.valid, .tokens = tokens, .seed = seed, .step = step, .first = first,
        .training = training, .add = backwards > 0 || dw_add[n], .parted = false, .w = flat->weights->params.data() + places[n].weights,
        .running = flat->weights->running.data() + places[n].statistics, .collected = flat->collected.data() + places[n].statistics,
        .dw = flat->gradients.data() + places[n].weights, .x = act(m, spec.x),
        .skip = spec.skip >= 0 ? act(m, spec.skip) : nullptr, .y = act(m, spec.y), .dy = grad(m, spec.y),
        .dx = first_layer ? nullptr : grad(m, spec.x),
        .dskip = spec.skip > 0 || (spec.skip == 0 && !head) ? grad(m, spec.skip) : nullptr,
        .dx_add = dx_add[n], .dskip_add = dskip_add[n], .kept = slot.kept[n].data(), .marks = slot.marks[n].data(),
        .scratch = scratch.data(), .terms = &terms, .share = 1,
        .moments = place == meeting.end() ? nullptr : moments[place - meeting.begin()].data(), .slice = thread,
        .slices = threads,
    };
}

template <class T>
void Stage<T>::load(int m, const Samples& samples, int64_t step, int64_t first) {
    Slot& slot = slots[m];
    const int64_t* index = samples.index + step * samples.batch + first;
    slot.valid = int(std::clamp<int64_t>(samples.size - (step * samples.batch + first), 0, slice));
    if (tokens) return load_tokens(slot, samples, index);
    if (tail)
        for (int i = 0; i < slot.valid; ++i) slot.targets[i] = samples.targets[index[i]];
    if (!head) return;
    const int features = features_in();
    const auto [from, to] = own_of(blocks, thread, threads);
    for (int b = from; b < to; ++b) {
        T* x = slot.acts[0].data() + size_t(b) * features * LANES;
        const int valid = std::clamp(slot.valid - b * LANES, 0, LANES);
        if (!valid)
            std::fill(x, x + features * LANES, T(0));
        else if (samples.bytes)
            kernels.gather_bytes(features, valid, static_cast<const uint8_t*>(samples.inputs), index + b * LANES,
                                 T(samples.scale), x);
        else
            kernels.gather(features, valid, static_cast<const T*>(samples.inputs), index + b * LANES, x);
    }
}

template <class T>
void Stage<T>::load_tokens(Slot& slot, const Samples& samples, const int64_t* index) {
    const int64_t* symbols = static_cast<const int64_t*>(samples.inputs);
    const int rise = blocks_of(tokens) * LANES;
    const auto [own, others] = own_of(slice, thread, threads);
    for (int i = 0; i < slice; ++i)
        for (int t = 0; t < rise; ++t) {
            const bool real = i < slot.valid && t < tokens;
            const int64_t from = real ? index[i] * tokens + t : 0;
            if (head && own <= i && i < others) slot.acts[0][size_t(i) * rise + t] = real ? T(symbols[from]) : T(0);
            if (tail) slot.targets[size_t(i) * rise + t] = real ? samples.targets[from] : 0;
        }
}

template <class T>
void Stage<T>::forward(int segment, int m, uint64_t step, int64_t first, bool training) {
    const int last = reach(segment, true);
    for (size_t n = begin(segment); n < end(last); ++n) layers[n]->forward(pass(n, m, step, first, training));
    if (last + 1 < segments()) {
        if (training && threads == 1) layers[end(last)]->measure(pass(end(last), m, step, first, training));
    } else if (tail) {
        lose(m, training);
    }
}

template <class T>
void Stage<T>::backward(int segment, int m, uint64_t step, int64_t first, bool parted) {
    if (halved) shelve(slots[m]);
    const auto passed = [&](size_t n) {
        Pass<T> p = pass(n, m, step, first, true);
        p.parted = parted || halved;
        return p;
    };
    const int last = reach(segment, false);
    const size_t front = begin(segment);
    if (threads == 1 && last + 1 < segments()) layers[end(last)]->backward(passed(end(last)));
    for (size_t n = end(last); n-- > front + (threads == 1 && segment > 0);) layers[n]->backward(passed(n));
    if (!segment)
        ++backwards;
    else if (threads == 1)
        layers[front]->measure_back(passed(front));
    else if (front)
        layers[front - 1]->open_back(passed(front - 1));
    if (!parted && halved)
        weigh(segment, m);
    else if (!parted && !segment)
        ++weighed;
}

template <class T>
void Stage<T>::own_by(int owners) {
    scratch = Memory<T>(scratch.size() * owners, dry);
    house_gradients(true);  // they read all gradients when the backward is over
}

template <class T>
void Stage<T>::own(int segment, const std::vector<Stage*>& replicas, int number) {
    for (size_t n = end(segment); n-- > begin(segment);) {
        if (!layers[n]->matrix) continue;
        passes.clear();
        for (Stage* stage : replicas) passes.push_back(stage->pass(n, 0, 0, 0, true));
        passes[number].add = false;
        layers[n]->own_gradient(passes, number);
    }
}

template <class T>
void Stage<T>::lose(int m, bool training) {
    Slot& slot = slots[m];
    const int classes = layers.back()->spec.out.size();
    Score& score = training ? step_score : evaluation;
    const double share = tokens ? 1.0 / tokens : 1;  // a sample's loss is the mean over its tokens
    const int rise = tokens ? blocks_of(tokens) : 1;
    const auto [from, to] = own_of(blocks, thread, threads);
    double loss = 0;
    int hits = 0;
    for (int b = from; b < to; ++b) {
        const int left = tokens ? (b / rise < slot.valid ? tokens - b % rise * LANES : 0) : slot.valid - b * LANES;
        loss += kernels.softmax(classes, std::clamp(left, 0, LANES), slot.targets.data() + b * LANES, T(share),
                                slot.acts.back().data() + size_t(b) * classes * LANES, &hits);
    }
    score.loss += loss * share;
    if (!thread) score.weight += slot.valid;
    score.hits += hits * share;
}

template class Stage<float>;
template class Stage<double>;

}  // namespace paraxis
