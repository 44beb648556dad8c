// The whole runtime under a sanitizer, layers and fast kernels included: ensemble [--seed-fault missing-barrier|missing-wait]
//
// Two small networks, of images and of tokens, are trained alone, by two replicas with weights in common, by replicas with
// weights of their own, by two stages or two ranks of two stages each, by both at once, with I and W apart, and by groups of
// threads that share every layer. All must end with the same weights up to rounding.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "../runtime/ensemble.h"
#include "networks.h"

namespace {

using namespace paraxis;
using Weight = std::pair<std::string, std::vector<float>>;

constexpr int BATCH = 40, STEPS = 3, MICROBATCHES = 4;  // slices are no multiple of LANES
constexpr float ROUNDING = 1e-4f, APART = 1e-2f;
bool seeded = false, impatient = false;  // replicas, or the threads of a group, do not wait for each other

struct Plan {
    Grid grid;
    int microbatches;
    bool shared;
    const Kernels<float>* kernels;
    bool owners = false;
    bool whole = false;  // statistics over all replicas
    bool of_tokens = false;
    int each = 1;         // stages of a rank
    bool halved = false;  // I and W apart
    bool clipped = true;  // which has the stages wait for each other in every step
    int stages() const { return grid.pp * each; }
    Network network() const { return of_tokens ? tokens() : images(); }
    bool meets() const { return whole && grid.dp > 1; }
};

// Lists of instructions as Python's lowering makes them, for 1F1B; where a rank has several stages, for GPipe.
struct Lister {
    const Plan& plan;
    int rank;
    const Stage<float>& own;
    std::vector<Instruction> list = {};

    int stage = plan.grid.pp_of(rank);  // that is being listed
    bool first() const { return stage == 0; }
    bool last() const { return stage == plan.stages() - 1; }

    void add(Op op, int microbatch = 0, Axis axis = Axis::none, Buffer buffer = Buffer::none, Rule rule = Rule::none,
             bool mean = false) {
        const int slice = plan.grid.dp_of(rank) * plan.microbatches + microbatch;
        list.push_back({op, microbatch, slice, -1, axis, buffer, rule, mean, 0, -1, stage});
    }
    void update(Rule rule) { add(Op::Update, 0, Axis::none, Buffer::none, rule); }

    // The replicas of the first stage add up the sums of its batch norm.
    void meet(Buffer buffer) {
        if (seeded) return;
        add(Op::AllReduceWait, 0, Axis::dp, buffer);
        list.back().bucket = 0;
    }

    // All segments with which a forward or a backward begins; between them the threads of a group wait.
    void shared(Op op, int m, Rule rule = Rule::none) {
        const bool forward = op == Op::F;
        for (int n = 0, begun = 0; n < own.segments(); ++n) {
            const int segment = forward ? n : own.segments() - 1 - n;
            if (!own.starts(forward, segment)) continue;
            if (begun++ && !impatient) add(Op::AllGatherWait, m, Axis::tp, forward ? Buffer::acts : Buffer::act_grads);
            add(op, m, Axis::none, Buffer::none, rule);
            list.back().segment = segment;
        }
    }

    void forward(int m, Rule rule) {
        if (first() || last()) add(Op::Load, m);
        if (!first()) add(Op::RecvActWait, m);
        if (plan.grid.tp > 1)
            shared(Op::F, m, rule);
        else
            add(Op::F, m, Axis::none, Buffer::none, rule);
        if (plan.meets() && first()) {
            if (rule == Rule::none) meet(Buffer::moments);
            add(Op::F, m, Axis::none, Buffer::none, rule);
            list.back().segment = 1;
        }
        if (!last()) add(Op::SendActStart, m);
    }

    void backward(int m) {
        if (!last()) add(Op::RecvGradWait, m);
        const Op op = plan.owners || plan.halved ? Op::I : Op::B;
        if (plan.grid.tp > 1) shared(op, m);
        if (plan.meets() && first()) {
            add(op, m);
            list.back().segment = 1;
            meet(Buffer::moment_grads);
        }
        if (plan.grid.tp == 1) add(op, m);
        if (!first()) add(Op::SendGradStart, m);
    }

    // Both stages have the table of symbols.
    void add_copies() {
        add(Op::AllReduceWait, 0, Axis::pp, Buffer::tied);
        list.back().bucket = 0;
    }

    void weights(int m) {
        if (plan.halved) add(Op::W, m);
    }

    // Weights come late: then the stage in front may be a step ahead.
    void one_by_one() {
        const int ahead = std::min(plan.microbatches, plan.grid.pp - stage);
        for (int m = 0; m < ahead; ++m) forward(m, Rule::none);
        for (int m = 0; m < plan.microbatches; ++m) {
            backward(m);
            if (m + ahead < plan.microbatches) forward(m + ahead, Rule::none);
        }
        for (int m = 0; m < plan.microbatches; ++m) weights(m);
    }

    void all_forward() {
        for (; stage < plan.stages(); stage += plan.grid.pp)
            for (int m = 0; m < plan.microbatches; ++m) forward(m, Rule::none);
        while ((stage -= plan.grid.pp) >= 0)
            for (int m = 0; m < plan.microbatches; ++m) {
                backward(m);
                weights(m);
            }
    }

    std::vector<Instruction> training() {
        update(Rule::zero);
        if (plan.each > 1)
            all_forward();
        else
            one_by_one();
        stage = plan.grid.pp_of(rank);
        const bool tied = plan.of_tokens && plan.grid.pp > 1;
        if (tied && plan.shared) add_copies();
        if (plan.shared && !seeded) add(plan.owners ? Op::AllGatherWait : Op::ReduceScatterWait, 0, Axis::dp, Buffer::grads);
        for (int segment = plan.meets() && first(); plan.owners && segment >= 0; --segment) {
            add(Op::W, 0, Axis::none, Buffer::none, Rule::owner);
            list.back().segment = segment;
        }
        if (!plan.shared) add(Op::AllReduceWait, 0, Axis::dp, Buffer::grads);
        if (tied && !plan.shared) add_copies();
        if (plan.clipped) {
            update(Rule::norm);
            if (plan.shared) add(Op::AllReduceWait, 0, Axis::dp, Buffer::norm);
            add(Op::AllReduceWait, 0, Axis::pp, Buffer::norm);
            add(Op::AllReduceWait, 0, Axis::tp, Buffer::norm);
        }
        add(Op::AllReduceWait, 0, Axis::dp, Buffer::statistics, Rule::none, true);
        update(Rule::statistics);
        update(Rule::step);
        if (plan.shared) add(Op::AllGatherWait, 0, Axis::dp, Buffer::params);
        add(Op::AllGatherWait, 0, Axis::tp, Buffer::params);
        return list;
    }

    std::vector<Instruction> evaluation() {
        for (; stage < plan.stages(); stage += plan.grid.pp)
            for (int m = 0; m < plan.microbatches; ++m) forward(m, Rule::evaluate);
        return list;
    }
};

using Stages = std::vector<std::unique_ptr<Stage<float>>>;

std::vector<Body> bodies_of(const Plan& plan, const Stages& stages) {
    std::vector<Body> bodies{{"step", {}}, {"evaluate", {}}, {"settle", {}}};
    for (int rank = 0; rank < plan.grid.size(); ++rank) {
        const Stage<float>& own = *stages[rank * plan.each];
        bodies[0].ranks.push_back(Lister{plan, rank, own}.training());
        bodies[1].ranks.push_back(Lister{plan, rank, own}.evaluation());
        Lister settle{plan, rank, own};
        settle.add(Op::AllReduceWait, 0, Axis::dp, Buffer::params, Rule::none, true);
        bodies[2].ranks.push_back(settle.list);
    }
    return bodies;
}

void for_each_part(Ensemble<float>& e, int rank, int number,
                   const std::function<void(Layer<float>&, const std::string&, int64_t, float*, float*)>& f) {
    Stage<float>& stage = e.stage(rank, number);
    const auto& weights = *e.stage(rank).weights;
    for (size_t n = 0; n < stage.layers.size(); ++n)
        for (const auto& [part, count] : stage.layers[n]->parts())
            f(*stage.layers[n], part, count, weights.params.data() + stage.places[n].weights,
              weights.running.data() + stage.places[n].statistics);
}

// Weights that depend on the layer's name alone, so that all plans start alike.
void initialise(Ensemble<float>& e, int rank, int number) {
    for_each_part(e, rank, number, [](Layer<float>& own, const std::string& part, int64_t count, float* w, float* running) {
        std::vector<float> values(count);
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t mixed = (uint32_t(i) * 2654435761u + own.spec.name[0] * 97u + part[0]) >> 8;
            values[i] = float(mixed % 1000) / 2000 - 0.25f;
        }
        if (own.spec.kind == "batch_norm" && part != "bias" && part != "running_mean")
            for (float& value : values) value += 1;
        own.pack(part, values.data(), w, running);
    });
}

std::vector<Weight> weights_of(Ensemble<float>& e, int dp) {
    std::vector<Weight> found;
    for (int stage = 0; stage < e.grid.pp * e.each; ++stage)
        for_each_part(e, e.grid.rank(dp, stage % e.grid.pp), stage / e.grid.pp,
                      [&](Layer<float>& own, const std::string& part, int64_t count, float* w, float* running) {
                          found.push_back({own.spec.name + "." + part, std::vector<float>(count)});
                          own.unpack(part, w, running, found.back().second.data());
                      });
    return found;
}

struct Data {
    std::vector<uint8_t> inputs = {};
    std::vector<int64_t> symbols = {}, targets = {}, index = {};
    Samples samples(int64_t size) const {
        const void* from = symbols.empty() ? static_cast<const void*>(inputs.data()) : symbols.data();
        return {from, targets.data(), index.data(), BATCH, size, symbols.empty(), 1.0 / 255};
    }
};

Data made(int shift, bool of_tokens = false) {
    Data data;
    for (int n = 0; of_tokens && n < BATCH * 2 * TOKENS; ++n) {
        data.symbols.push_back((n * 7 + n / 11 * (3 + shift)) % SYMBOLS);
        data.targets.push_back((data.symbols.back() * (5 + 3 * shift) + 1) % SYMBOLS);
    }
    for (int n = 0; !of_tokens && n < BATCH * 2; ++n) {
        data.targets.push_back(n % CLASSES);
        for (int i = 0; i < SIDE * SIDE * 2; ++i)
            data.inputs.push_back(uint8_t((n * 31 + i * (7 + 5 * (n % CLASSES)) + shift * n * i) % 256));
    }
    for (int64_t n = 0; n < STEPS * BATCH; ++n) data.index.push_back(n * 37 % (BATCH * 2));
    return data;
}

struct Result {
    std::vector<std::vector<Weight>> weights;  // of every replica
    std::vector<Score> scores;                 // of every step, then of an evaluation
};

Result trained(const Plan& plan, const Data& data) {
    const int slice = BATCH / (plan.grid.dp * plan.microbatches);
    const Network network = plan.network();
    auto every = staged(network, plan.stages());
    for (auto& specs : every)
        for (Spec& spec : specs)
            if (spec.kind == "batch_norm" && plan.whole) spec.across = plan.grid.dp;
    Stages stages;
    for (int rank = 0; rank < plan.grid.size(); ++rank)
        for (int s = plan.grid.pp_of(rank); s < plan.stages(); s += plan.grid.pp) {
            const int thread = plan.grid.tp_of(rank);
            const Stage<float>* first = thread ? stages[stages.size() - thread * plan.each].get() : nullptr;
            stages.push_back(std::make_unique<Stage<float>>(every[s], slice, plan.microbatches, s == 0, s == plan.stages() - 1,
                                                            *plan.kernels, 5, network.tokens, false, first, thread, plan.grid.tp));
            if (plan.halved) stages.back()->part(plan.microbatches, true);
        }
    Hyper hyper;
    hyper.momentum = 0.9, hyper.decay = 0.01, hyper.clip = plan.clipped ? 0.5 : 0, hyper.weight = BATCH;
    const std::vector<Body> bodies = bodies_of(plan, stages);
    Ensemble<float> e(plan.grid, std::move(stages), bodies, hyper, plan.shared, 2);
    for (int rank = 0; rank < plan.grid.size(); ++rank)
        for (int number = 0; number < plan.each; ++number) initialise(e, rank, number);
    Result result;
    result.scores = e.run(0, {0, 0}, {0.1, 0.05}, data.samples(1 << 30));
    Data rest = data;  // a run of its own for the last step: a team begins and ends between them
    rest.index.erase(rest.index.begin(), rest.index.begin() + 2 * BATCH);
    for (Score score : e.run(2, {0}, {0.05}, rest.samples(1 << 30))) result.scores.push_back(score);
    result.scores.push_back(e.evaluate(1, STEPS, data.samples(STEPS * BATCH - 11)));  // the last batch is padded
    if (!plan.shared) e.settle(2);
    for (int dp = 0; dp < plan.grid.dp; ++dp) result.weights.push_back(weights_of(e, dp));
    return result;
}

// The largest difference, of any replica from the first of `b`; infinite where one is no number.
float difference(const Result& a, const Result& b) {
    float worst = 0;
    const auto see = [&](double apart) { worst = apart <= worst ? worst : std::isnan(apart) ? INFINITY : float(apart); };
    for (const auto& replica : a.weights)
        for (size_t n = 0; n < replica.size(); ++n)
            for (size_t i = 0; i < replica[n].second.size(); ++i)
                see(std::fabs(replica[n].second[i] - b.weights[0][n].second[i]));
    for (size_t s = 0; s < a.scores.size(); ++s) {
        see(std::fabs(a.scores[s].loss / a.scores[s].weight - b.scores[s].loss / b.scores[s].weight));
        see(std::fabs(a.scores[s].weight - b.scores[s].weight));
    }
    return worst;
}

void expect(bool holds, const std::string& what) {
    if (!holds) throw std::logic_error(what);
}

void all() {
    // Statistics are a microbatch's own: every plan has four slices of ten samples.
    const Data data = made(0);
    const Plan alone{{1, 1}, MICROBATCHES, false, &naive()};
    const Result wanted = trained(alone, data);
    expect(wanted.scores[0].weight == BATCH && wanted.scores.back().weight == STEPS * BATCH - 11, "weights of scores");
    expect(difference(trained(alone, made(1)), wanted) > APART, "other samples give the same result");
    const std::vector<std::pair<const char*, Plan>> plans = {
        {"fast kernels", {{1, 1}, 4, false, &fastest()}},
        {"two replicas, weights in common", {{2, 1}, 2, true, &fastest()}},
        {"four replicas, weights in common", {{4, 1}, 1, true, &fastest()}},
        {"four owners of gradients", {{4, 1}, 1, true, &fastest(), true}},
        {"two replicas, weights of their own", {{2, 1}, 2, false, &fastest()}},
        {"two stages", {{1, 2}, 4, false, &fastest()}},
        {"two replicas of two stages, weights in common", {{2, 2}, 2, true, &fastest()}},
        {"four replicas, statistics of all", {{4, 1}, 1, true, &fastest(), false, true}},
        {"four owners of gradients, statistics of all", {{4, 1}, 1, true, &fastest(), true, true}},
        {"two replicas of two stages, statistics of all", {{2, 2}, 1, true, &fastest(), false, true}},
        {"two replicas, weights of their own, statistics of all", {{2, 1}, 1, false, &fastest(), false, true}},
        {"three threads", {{1, 1, 3}, 4, true, &fastest()}},
        {"two groups of two threads", {{2, 1, 2}, 2, true, &fastest()}},
        {"two stages of two threads", {{1, 2, 2}, 4, true, &fastest()}},
    };
    const Result whole = trained({{1, 1}, 1, false, &naive(), false, true}, data);
    expect(difference(whole, wanted) > 10 * ROUNDING, "statistics of the whole batch are those of slices");
    for (const auto& [name, plan] : plans) {
        const float apart = difference(trained(plan, data), plan.whole ? whole : wanted);
        expect(apart < ROUNDING, std::string(name) + ": differs by " + std::to_string(apart));
    }
}

void all_of_tokens() {
    const Data data = made(0, true);
    const auto of = [](Grid grid, int microbatches, bool shared, const Kernels<float>& kernels, bool owners = false) {
        return Plan{grid, microbatches, shared, &kernels, owners, false, true};
    };
    const Result wanted = trained(of({1, 1}, 1, false, naive()), data);
    expect(wanted.scores[0].weight == BATCH, "a sample of tokens weighs 1");
    expect(difference(trained(of({1, 1}, 1, false, naive()), made(1, true)), wanted) > APART, "other tokens give the same result");
    const std::vector<std::pair<const char*, Plan>> plans = {
        {"fast kernels", of({1, 1}, 4, false, fastest())},
        {"four replicas, weights in common", of({4, 1}, 1, true, fastest())},
        {"two owners of gradients", of({2, 1}, 1, true, fastest(), true)},
        {"two stages", of({1, 2}, 4, false, fastest())},
        {"two replicas of two stages, weights in common", of({2, 2}, 2, true, fastest())},
        {"two replicas of two stages, weights of their own", of({2, 2}, 1, false, fastest())},
        {"three threads", of({1, 1, 3}, 2, true, fastest())},
        {"two stages of two groups of two threads", of({2, 2, 2}, 1, true, fastest())},
    };
    for (const auto& [name, plan] : plans) {
        const float apart = difference(trained(plan, data), wanted);
        expect(apart < ROUNDING, std::string("tokens, ") + name + ": differs by " + std::to_string(apart));
    }
}

// Several stages of a rank, and I and W apart; nothing but transfers keeps two stages together here.
void all_orders() {
    for (const bool of_tokens : {false, true}) {
        const Data data = made(0, of_tokens);
        const auto of = [&](Grid grid, int microbatches, bool shared, int each, bool halved) {
            return Plan{grid, microbatches, shared, &fastest(), false, false, of_tokens, each, halved, of_tokens};
        };
        const Result wanted = trained(of({1, 1}, MICROBATCHES, false, 1, false), data);
        const std::vector<std::pair<const char*, Plan>> plans = {
            {"two ranks of two stages", of({1, 2}, 4, false, 2, false)},
            {"two replicas on two ranks of two stages", of({2, 2}, 2, true, 2, false)},
            {"two stages, I and W apart", of({1, 2}, 4, false, 1, true)},
            {"two replicas of two stages, I and W apart", of({2, 2}, 2, true, 1, true)},
            {"two ranks of two stages, I and W apart", of({1, 2}, 4, false, 2, true)},
        };
        for (const auto& [name, plan] : plans) {
            const float apart = difference(trained(plan, data), wanted);
            expect(apart < ROUNDING, (of_tokens ? "tokens, " : "") + std::string(name) + ": differs by " + std::to_string(apart));
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    const bool fault = argc == 3 && !std::strcmp(argv[1], "--seed-fault");
    seeded = fault && !std::strcmp(argv[2], "missing-barrier");
    impatient = fault && !std::strcmp(argv[2], "missing-wait");
    if (argc != 1 && !seeded && !impatient) {
        std::fprintf(stderr, "usage: ensemble [--seed-fault missing-barrier|missing-wait]\n");
        return 2;
    }
    try {
        all();
        all_of_tokens();
        all_orders();
    } catch (const std::exception& error) {
        std::fprintf(stderr, "ensemble: %s\n", error.what());
        return 1;
    }
    std::puts("ensemble: all plans equal the serial run");
}
