// The extension module: nanobind only, no arithmetic. What Python hands over is checked here, before the GIL is let go.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <type_traits>

#include "runtime/ensemble.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace paraxis;

namespace {

template <class T>
using Array = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <class T>
using Numpy = nb::ndarray<nb::numpy, T, nb::c_contig, nb::device::cpu>;
// (op, microbatch, slice, peer, axis, buffer, rule, mean, segment, bucket, stage)
using Words = std::tuple<std::string, int, int, int, std::string, std::string, std::string, bool, int, int, int>;

template <class List>
int number_of(const List& list, const std::string& word, const char* what) {
    for (size_t n = 0; n < list.size(); ++n)
        if (word == list[n]) return int(n);
    throw nb::value_error((std::string(what) + " " + word + " is not known to the native runtime").c_str());
}

Instruction instruction(nb::handle h, int microbatches) {
    auto t = nb::cast<nb::tuple>(h);
    auto text = [&](size_t n) { return nb::cast<std::string>(t[n]); };
    Instruction i{Op(number_of(OPS, text(0), "operation")), nb::cast<int>(t[1]), nb::cast<int>(t[2]), nb::cast<int>(t[3]),
                  Axis(number_of(AXES, text(4), "axis")), Buffer(number_of(BUFFERS, text(5), "buffer")),
                  Rule(number_of(RULES, text(6), "rule")), nb::cast<bool>(t[7]), nb::cast<int>(t[8]), nb::cast<int>(t[9]), nb::cast<int>(t[10])};
    if (i.microbatch >= microbatches) throw nb::value_error("an instruction names a microbatch that there is not");
    return i;
}

std::vector<Body> bodies_of(const std::vector<std::pair<std::string, nb::list>>& given, int microbatches) {
    std::vector<Body> bodies;
    for (const auto& [name, ranks] : given) {
        Body body{name, {}};
        for (nb::handle rank : ranks) {
            auto& list = body.ranks.emplace_back();
            for (nb::handle i : rank) list.push_back(instruction(i, microbatches));
        }
        bodies.push_back(std::move(body));
    }
    return bodies;
}

// Numbers that must lie below a limit, `each` of them for every sample that the index names.
void check_below(const int64_t* numbers, const Array<int64_t>& index, int64_t each, int64_t limit, const char* what,
                 const char* which) {
    for (size_t n = 0; n < index.size(); ++n)
        for (int64_t k = index.data()[n] * each; k < (index.data()[n] + 1) * each; ++k)
            if (numbers[k] < 0 || numbers[k] >= limit)
                throw nb::value_error((what + (" " + std::to_string(numbers[k])) + " is none of " + std::to_string(limit) + which).c_str());
}

// Samples and the numbers of those that a run takes; raises ValueError for what would be read outside of them.
template <class T>
struct Fed {
    Samples samples;
    int64_t steps;
};

template <class T>
Fed<T> feed(Ensemble<T>& e, nb::object inputs, Array<int64_t> targets, Array<int64_t> index, int64_t batch, int64_t size,
            double scale) {
    Fed<T> fed;
    const int64_t each = e.stage(0).tokens ? e.stage(0).tokens : 1, count = int64_t(targets.size()) / each;
    Array<uint8_t> bytes;
    Array<T> values;
    Array<int64_t> symbols;
    const bool of_tokens = e.stage(0).tokens && nb::try_cast(inputs, symbols, false);
    if (e.stage(0).tokens && !of_tokens) throw nb::value_error("tokens must be a contiguous array of int64");
    fed.samples.bytes = !of_tokens && nb::try_cast(inputs, bytes, false);
    if (!of_tokens && !fed.samples.bytes && !nb::try_cast(inputs, values, false))
        throw nb::value_error("inputs must be a contiguous array of bytes or of the network's own type");
    const size_t elements = of_tokens ? symbols.size() : fed.samples.bytes ? bytes.size() : values.size();
    if (e.stage(0).head && elements != size_t(count * each) * e.stage(0).features_in())
        throw nb::value_error("inputs have another shape than the network takes");
    if (batch < 1 || index.size() % size_t(batch)) throw nb::value_error("the index is no whole number of batches");
    for (size_t n = 0; n < index.size(); ++n)
        if (index.data()[n] < 0 || index.data()[n] >= count) throw nb::value_error("a sample number is out of range");
    fed.samples.inputs = fed.samples.bytes ? static_cast<const void*>(bytes.data()) : values.data();
    if (of_tokens) fed.samples.inputs = symbols.data();
    if (of_tokens && e.stage(0).head) check_below(symbols.data(), index, each, e.stage(0).symbols(), "token", " symbols");
    fed.samples.targets = targets.data();
    fed.samples.index = index.data();
    fed.samples.batch = batch, fed.samples.size = size, fed.samples.scale = scale;
    fed.steps = int64_t(index.size()) / batch;
    Stage<T>& last = e.stage(e.grid.size() - 1, e.each - 1);
    const int64_t classes = last.tail ? last.layers.back()->spec.out.size() : 0;
    if (classes) check_below(targets.data(), index, each, classes, "label", " classes");
    return fed;
}

template <class T>
int checked(Ensemble<T>& e, int microbatch) {
    if (microbatch < 0 || microbatch >= e.stage(0).microbatches) throw std::out_of_range("no such microbatch");
    return microbatch;
}

// One of the stages of a rank.
template <class T>
Stage<T>& stage_of(Ensemble<T>& e, int rank, int number) {
    if (rank < 0 || rank >= e.grid.size() || number < 0 || number >= e.each) throw std::out_of_range("no such stage");
    return e.stage(rank, number);
}

template <class T>
int checked_segment(Ensemble<T>& e, int number, int segment) {
    if (segment < 0 || segment >= stage_of(e, 0, number).segments()) throw std::out_of_range("no such segment");
    return segment;
}

template <class T>
Numpy<T> view(nb::handle owner, T* data, size_t count) {
    return Numpy<T>(data, {count}, owner);
}

template <class T>
std::pair<Layer<T>*, typename Stage<T>::Place> layer_of(Ensemble<T>& e, int rank, const std::string& name) {
    for (int number = 0; number < e.each; ++number) {
        Stage<T>& stage = e.stage(rank, number);
        for (size_t n = 0; n < stage.layers.size(); ++n)
            if (stage.layers[n]->spec.name == name && stage.layers[n]->parameters) return {stage.layers[n].get(), stage.places[n]};
    }
    throw nb::key_error(name.c_str());
}

template <class T>
std::unique_ptr<Ensemble<T>> make(int dp, int pp, const std::vector<std::vector<Spec>>& specs, int slice,
                                  int microbatches, const std::vector<std::pair<std::string, nb::list>>& bodies,
                                  Hyper hyper, bool shared, int usable_cores, uint64_t seed, bool naively,
                                  std::pair<bool, bool> ends, const std::vector<int>& kept, int tokens, bool dry, int tp) {
    const Grid grid{dp, pp, tp};
    if (specs.size() % size_t(pp)) throw nb::value_error("there must be stages for every rank");
    const Kernels<T>* kernels;
    if constexpr (std::is_same_v<T, float>)
        kernels = naively ? &naive() : &fastest();
    else
        kernels = &twin();
    std::vector<std::unique_ptr<Stage<T>>> stages;
    for (int rank = 0; rank < grid.size(); ++rank)
        for (size_t n = grid.pp_of(rank); n < specs.size(); n += pp) {
            // `ends`: whether samples come into the first stage here, and the last one ends in the loss.
            const bool head = ends.first && n == 0, tail = ends.second && n + 1 == specs.size();
            const size_t thread = grid.tp_of(rank), each = specs.size() / pp;
            const Stage<T>* first = thread ? stages[stages.size() - thread * each].get() : nullptr;
            stages.push_back(std::make_unique<Stage<T>>(specs[n], slice, microbatches, head, tail, *kernels, seed, tokens, dry,
                                                        first, int(thread), tp));
            // `kept`: of every stage, for how many microbatches at once an I keeps what their W needs (0: never).
            if (kept.at(n)) stages.back()->part(kept[n], pp > 1);
        }
    return std::make_unique<Ensemble<T>>(grid, std::move(stages), bodies_of(bodies, microbatches), hyper, shared,
                                         usable_cores);
}

template <class T>
void bind(nb::module_& m, const char* name) {
    using E = Ensemble<T>;
    nb::class_<E> c(m, name);
    c.def(nb::new_(&make<T>), "dp"_a, "pp"_a, "stages"_a, "slice"_a, "microbatches"_a, "bodies"_a, "hyper"_a, "shared"_a,
          "usable_cores"_a, "seed"_a, "naive"_a, "ends"_a, "kept"_a, "tokens"_a = 0, "dry"_a = false, "tp"_a = 1);
    c.def("reserved", &E::reserved, "rank"_a);
    // Bytes of what comes into a stage from another one, and of what goes out.
    c.def("edges", [](E& e, int number, int rank) {
        Stage<T>& stage = stage_of(e, rank, number);
        const size_t entering = stage.head ? 0 : stage.input_elements(), leaving = stage.tail ? 0 : stage.output_elements();
        return std::pair{entering * sizeof(T), leaving * sizeof(T)};
    }, "stage"_a, "rank"_a);
    c.def(
        "run",
        [](E& e, int64_t first, const std::vector<int>& body, const std::vector<double>& rates, nb::object inputs,
           Array<int64_t> targets, Array<int64_t> index, int64_t batch, double scale) {
            Fed<T> fed = feed(e, inputs, targets, index, batch, int64_t(index.size()), scale);
            if (int64_t(body.size()) > fed.steps || rates.size() < body.size())
                throw nb::value_error("fewer batches or rates than steps");
            std::vector<Score> scores;
            {
                nb::gil_scoped_release release;
                scores = e.run(first, body, rates, fed.samples);
            }
            std::vector<std::pair<double, double>> out;
            for (const Score& s : scores) out.push_back({s.loss, s.weight});
            return out;
        },
        "first"_a, "body"_a, "rates"_a, "inputs"_a, "targets"_a.noconvert(), "index"_a.noconvert(), "batch"_a, "scale"_a);
    c.def(
        "evaluate",
        [](E& e, int body, nb::object inputs, Array<int64_t> targets, Array<int64_t> index, int64_t batch, int64_t size,
           double scale) {
            Fed<T> fed = feed(e, inputs, targets, index, batch, size, scale);
            nb::gil_scoped_release release;
            Score s = e.evaluate(body, int(fed.steps), fed.samples);
            return std::vector<double>{s.loss, s.weight, s.hits};
        },
        "body"_a, "inputs"_a, "targets"_a.noconvert(), "index"_a.noconvert(), "batch"_a, "size"_a, "scale"_a);
    c.def("settle", &E::settle, nb::call_guard<nb::gil_scoped_release>(), "body"_a);
    c.def("stamps", &E::stamps, "step"_a);
    c.def("begin", &E::begin);
    c.def(
        "load",
        [](E& e, int number, int microbatch, nb::object inputs, Array<int64_t> targets, Array<int64_t> index, int64_t size,
           double scale, int64_t first) {
            Fed<T> fed = feed(e, inputs, targets, index, int64_t(index.size()), size, scale);
            stage_of(e, 0, number);
            if (first < 0 || first + int64_t(e.stage(0).slice) * e.grid.size() > int64_t(index.size()))
                throw nb::value_error("a slice lies outside of the batch");
            nb::gil_scoped_release release;
            e.load(number, checked(e, microbatch), fed.samples, first);
        },
        "stage"_a, "microbatch"_a, "inputs"_a, "targets"_a.noconvert(), "index"_a.noconvert(), "size"_a, "scale"_a, "first"_a);
    c.def(
        "forward",
        [](E& e, int number, int segment, int microbatch, int64_t step, int64_t first, bool training) {
            nb::gil_scoped_release release;
            e.forward(number, checked_segment(e, number, segment), checked(e, microbatch), step, first, training);
        },
        "stage"_a, "segment"_a, "microbatch"_a, "step"_a, "first"_a, "training"_a);
    c.def(
        "backward",
        [](E& e, int number, int segment, int microbatch, int64_t step, int64_t first, bool parted) {
            nb::gil_scoped_release release;
            e.backward(number, checked_segment(e, number, segment), checked(e, microbatch), step, first, parted);
        },
        "stage"_a, "segment"_a, "microbatch"_a, "step"_a, "first"_a, "parted"_a);
    c.def(
        "weigh",
        [](E& e, int number, int segment, int microbatch) {
            nb::gil_scoped_release release;
            e.weigh(number, checked_segment(e, number, segment), checked(e, microbatch));
        },
        "stage"_a, "segment"_a, "microbatch"_a);
    c.def("finish", &E::finish, nb::call_guard<nb::gil_scoped_release>(), "step"_a, "rate"_a, "scale"_a);
    // Of one thread's samples: what a microbatch hands on, and where it takes in what others hand on.
    c.def("output", [](nb::handle self, int number, int rank, int m) {
        Stage<T>& stage = stage_of(nb::cast<E&>(self), rank, number);
        return view<T>(self, stage.output(m), stage.output_elements());
    });
    c.def("input_gradient", [](nb::handle self, int number, int rank, int m) {
        Stage<T>& stage = stage_of(nb::cast<E&>(self), rank, number);
        return view<T>(self, stage.input_gradient(m), stage.head ? 0 : stage.input_elements());
    });
    c.def("give_input", [](E& e, int number, int rank, int m, nb::ndarray<T, nb::c_contig, nb::device::cpu> x) {
        Stage<T>& stage = stage_of(e, rank, number);
        if (x.size() != stage.input_elements()) throw nb::value_error("an input of another size");
        stage.give_input(checked(e, m), x.data());
    });
    c.def("give_gradient", [](E& e, int number, int rank, int m, nb::ndarray<T, nb::c_contig, nb::device::cpu> dy) {
        Stage<T>& stage = stage_of(e, rank, number);
        if (dy.size() != stage.output_elements()) throw nb::value_error("a gradient of another size");
        stage.give_gradient(checked(e, m), dy.data());
    });
    // (loss, weight, hits) of this step, or of the evaluation in progress, which `clear` begins anew.
    c.def("score", [](E& e, bool training, bool clear) {
        std::vector<double> total(3);
        for (int rank = 0; rank < e.grid.size(); ++rank) {
            Stage<T>& last = e.stage(rank, e.each - 1);
            Score& s = training ? last.step_score : last.evaluation;
            total[0] += s.loss, total[1] += s.weight, total[2] += s.hits;
            if (clear) s = {};
        }
        return total;
    }, "training"_a, "clear"_a);
    c.def("parts", [](E& e, int rank) {
        std::vector<std::tuple<std::string, std::string, int64_t>> found;
        for (int number = 0; number < e.each; ++number)
            for (const auto& layer : e.stage(rank, number).layers)
                for (const auto& [part, count] : layer->parts()) found.push_back({layer->spec.name, part, count});
        nb::list out;
        for (const auto& [a, b, n] : found) out.append(nb::make_tuple(a, b, n));
        return out;
    });
    c.def("put", [](E& e, int rank, const std::string& name, const std::string& part, Array<T> tensor) {
        Stage<T>& stage = e.stage(rank);
        auto [layer, place] = layer_of(e, rank, name);
        for (const auto& [known, count] : layer->parts())
            if (known == part && size_t(count) == tensor.size())
                return layer->pack(part, tensor.data(), stage.weights->params.data() + place.weights,
                                   stage.weights->running.data() + place.statistics);
        throw nb::value_error((name + "." + part + " has another size or is not there").c_str());
    });
    c.def("get", [](E& e, int rank, const std::string& name, const std::string& part,
                    nb::ndarray<T, nb::c_contig, nb::device::cpu> tensor) {
        Stage<T>& stage = e.stage(rank);
        auto [layer, place] = layer_of(e, rank, name);
        for (const auto& [known, count] : layer->parts())
            if (known == part && size_t(count) == tensor.size())
                return layer->unpack(part, stage.weights->params.data() + place.weights,
                                     stage.weights->running.data() + place.statistics, tensor.data());
        throw nb::value_error((name + "." + part + " has another size or is not there").c_str());
    });
    c.def("tied", [](E& e, int rank, int tie) { return e.tied(rank, tie); });
    // Where a stage's parameters lie in the flat buffers of its rank: begin, end.
    c.def("part_of", [](E& e, int number) {
        Stage<T>& stage = stage_of(e, 0, number);
        return std::pair{stage.begins, stage.begins + stage.parameters};
    }, "stage"_a);
    c.def("segments", [](E& e, int number) { return stage_of(e, 0, number).segments(); }, "stage"_a);
    c.def("borders", [](E& e, int rank) { return e.stage(rank).borders(); });
    // What a layer's replicas add up in the middle of a pass: the n-th such layer of a stage.
    c.def("moments", [](nb::handle self, int number, int n) {
        Stage<T>& stage = stage_of(nb::cast<E&>(self), 0, number);
        if (n < 0 || n >= int(stage.moments.size())) throw std::out_of_range("no such layer");
        return view<double>(self, stage.moments[n].data(), stage.moments[n].size());
    });
    // The flat buffers of a rank, as they lie in memory.
    c.def("buffer", [](nb::handle self, int rank, const std::string& name) {
        Stage<T>& stage = nb::cast<E&>(self).stage(rank);
        const Memory<T>* memory = name == "params"       ? &stage.weights->params
                                  : name == "grads"      ? &stage.gradients
                                  : name == "running"    ? &stage.weights->running
                                  : name == "statistics" ? &stage.collected
                                                         : nullptr;
        if (!memory) throw nb::key_error(name.c_str());
        return view<T>(self, memory->data(), memory->size());
    });
}

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);
    m.attr("OPS") = nb::cast(std::vector<std::string>(OPS.begin(), OPS.end()));
    m.attr("RULES") = nb::cast(std::vector<std::string>(RULES.begin(), RULES.end()));
    m.attr("BUFFERS") = nb::cast(std::vector<std::string>(BUFFERS.begin(), BUFFERS.end()));
    m.attr("RING") = RING;
    m.def("choose", [](const std::string& name) { return choose(name.c_str()); }, "name"_a);
    m.def("reserved", [] { return reserved_bytes.load(); });
    m.def("kernels", [] { return std::string(fastest().name); });
    nb::class_<Shape>(m, "Shape").def(nb::init<int, int, int>()).def_rw("h", &Shape::h).def_rw("w", &Shape::w).def_rw(
        "c", &Shape::c);
    nb::class_<Spec>(m, "Spec")
        .def(nb::init<>())
        .def_rw("kind", &Spec::kind)
        .def_rw("name", &Spec::name)
        .def_rw("x", &Spec::x)
        .def_rw("skip", &Spec::skip)
        .def_rw("y", &Spec::y)
        .def_rw("in_", &Spec::in)
        .def_rw("out", &Spec::out)
        .def_rw("kernel_h", &Spec::kernel_h)
        .def_rw("kernel_w", &Spec::kernel_w)
        .def_rw("stride", &Spec::stride)
        .def_rw("padding", &Spec::padding)
        .def_rw("bias", &Spec::bias)
        .def_rw("relu", &Spec::relu)
        .def_rw("p", &Spec::p)
        .def_rw("epsilon", &Spec::epsilon)
        .def_rw("momentum", &Spec::momentum)
        .def_rw("group", &Spec::group)
        .def_rw("across", &Spec::across)
        .def_rw("heads", &Spec::heads)
        .def_rw("entries", &Spec::entries)
        .def_rw("same", &Spec::same)
        .def_rw("tie", &Spec::tie)
        .def_rw("key", &Spec::key);
    nb::class_<Hyper>(m, "Hyper")
        .def(nb::init<>())
        .def_rw("adam", &Hyper::adam)
        .def_rw("nesterov", &Hyper::nesterov)
        .def_rw("decoupled", &Hyper::decoupled)
        .def_rw("momentum", &Hyper::momentum)
        .def_rw("decay", &Hyper::decay)
        .def_rw("beta1", &Hyper::beta1)
        .def_rw("beta2", &Hyper::beta2)
        .def_rw("epsilon", &Hyper::epsilon)
        .def_rw("clip", &Hyper::clip)
        .def_rw("weight", &Hyper::weight);
    bind<float>(m, "Float");
    bind<double>(m, "Double");
}
