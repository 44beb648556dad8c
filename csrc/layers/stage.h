// A stage: its layers, the activations of every microbatch in flight, and gradients.
#pragma once

#include "layer.h"
#include "memory.h"

namespace paraxis {

// Samples in memory and which of them a run of steps takes: step s has index[s * batch + i], i < batch. Those from number
// `size` on are padding (of an evaluation's last batch). In a network of tokens inputs are symbols, int64.
struct Samples {
    const void* inputs = nullptr;
    const int64_t* targets = nullptr;
    const int64_t* index = nullptr;
    int64_t batch = 0, size = 0;
    bool bytes = false;
    double scale = 1;
};

// What several ranks may share: parameters, running statistics and the optimiser's state of one stage.
template <class T>
struct Weights {
    Weights(size_t parameters, size_t statistics, bool dry)
        : params(parameters, dry), running(statistics, dry), first(parameters, dry), second(parameters, dry) {}
    Memory<T> params, running, first, second;
};

struct Score {
    double loss = 0, weight = 0, hits = 0;
};

template <class T>
class Stage {
  public:
    // `slice`: samples of a microbatch; `head`: takes samples in; `tail`: ends in the loss; `tokens` of a sample, which
    // then lie along the lanes, each with a loss of its own (0: a sample is a lane). `dry`: it reserves no memory and
    // computes nothing, but knows how much that would be. `first`: of a group of `threads` threads, this one being number
    // `thread` of them, whose activations and gradients this stage uses; it must live longer. Throws std::invalid_argument.
    Stage(const std::vector<Spec>& specs, int slice, int microbatches, bool head, bool tail, const Kernels<T>& kernels,
          uint64_t seed, int tokens = 0, bool dry = false, const Stage* first = nullptr, int thread = 0, int threads = 1);

    void load(int microbatch, const Samples& samples, int64_t step, int64_t first);
    // Segments end where a layer meets the other replicas: behind its measuring, before it uses the sums of all; or where
    // the threads of a group wait for each other (some borders stop a forward only, or a backward only).
    void forward(int segment, int microbatch, uint64_t step, int64_t first, bool training);
    // `parted`: but for the gradient of matrices, which `own` computes.
    void backward(int segment, int microbatch, uint64_t step, int64_t first, bool parted = false);
    // Stages of one rank lie in common flat buffers, those of its first; this one's part comes behind what is there.
    void join(Stage& first);
    // I and W apart: a backward leaves the gradient of matrices to `weigh`, and keeps until then what that is made of; one
    // that is not `parted` calls it itself.
    // `most`: microbatches between their I and W at once; `borrowed`: their inputs lie with the stage in front.
    void part(int most, bool borrowed);
    void keep_input(int microbatch);
    void weigh(int segment, int microbatch);
    // The n-th owner's part of the gradient of matrices, over the samples of all replicas of this stage.
    void own(int segment, const std::vector<Stage*>& replicas, int n);
    void own_by(int owners);  // room for that; before the first step
    // Softmax cross-entropy of the output, which it turns into its gradient when training.
    void lose(int microbatch, bool training);

    size_t input_elements() const { return elements.front(); }
    size_t output_elements() const { return elements.back(); }
    T* output(int m) { return slots[m].acts.back().data(); }
    T* input(int m) { return slots[m].given; }
    void give_input(int m, T* x) { slots[m].given = x; }
    void give_gradient(int m, T* dy) { slots[m].gradient = dy; }
    T* input_gradient(int m) { return slots[m].entering.data(); }
    int features_in() const { return layers.front()->spec.in.size(); }
    int symbols() const { return layers.front()->spec.entries; }  // that it takes in, where it is the head of tokens
    std::pair<size_t, size_t> tied(int tie) const;  // where the parameters of that number lie: begin, end
    int segments() const { return int(cuts.size()) + 1; }
    bool starts(bool forward, int segment) const { return !segment || stops(segment - 1, forward); }
    std::vector<std::string> borders() const;  // between its segments, in the words of a program
    size_t activation_bytes() const;  // of all microbatches, with what the layers need while they compute

    struct Place {
        size_t weights, statistics;
    };
    std::vector<std::unique_ptr<Layer<T>>> layers;
    std::vector<Place> places;  // of each layer's parameters and statistics in the flat buffers
    size_t parameters = 0, statistics = 0;
    size_t begins = 0;  // its parameters in the flat buffers
    // Of the first stage of a rank, with room for all of them.
    std::shared_ptr<Weights<T>> weights;
    Memory<T> gradients, collected;
    std::vector<Memory<double>> moments;  // of every layer that meets the other replicas, in order
    Score step_score, evaluation;
    int backwards = 0;  // of this step; the first one overwrites the gradients
    int weighed = 0;    // microbatches whose gradients are complete; the first one overwrites those of matrices
    const int slice, microbatches, tokens, thread, threads;
    const bool head, tail, dry;
    const Kernels<T>& kernels;

  private:
    struct Shelf {  // what an I keeps for its W: gradients of what layers with a matrix have made, a borrowed input
        std::vector<Memory<T>> gradients;
        Memory<T> input;
    };
    struct Slot {
        std::vector<Memory<T>> acts;  // acts[0] only where samples come in
        std::vector<Memory<T>> kept;
        std::vector<Memory<uint8_t>> marks;
        Memory<T> entering;  // gradient of the input
        T* given = nullptr;
        T* gradient = nullptr;
        std::vector<int64_t> targets;
        int valid = 0;
        Shelf* shelf = nullptr;
    };
    std::vector<Slot> slots;
    std::vector<std::unique_ptr<Shelf>> shelves;
    std::vector<Shelf*> idle;
    std::vector<bool> shelved;  // activations whose gradient is kept for a W; none where I and W are not apart
    bool halved = false, borrows = false;
    Stage* flat = this;         // the first stage of the rank
    // Of every activation but the input and, in the tail, the output; no two microbatches are in a backward at once. One
    // that has been used up leaves its room to another.
    std::vector<Memory<T>> grads;
    std::vector<int> rooms;         // of each activation, among `grads` or those on a shelf; -1: none
    std::vector<size_t> elements;   // of every activation
    std::vector<bool> dx_add, dskip_add;
    std::vector<bool> dw_add;       // somebody behind it, who uses the same parameters, has written their gradient
    std::vector<size_t> meeting;    // layers that meet the other replicas in their middle
    struct Cut {
        size_t layer;            // that comes next, or in whose middle it is
        bool forward, backward;  // what stops there
    };
    std::vector<Cut> cuts;
    Memory<T> scratch;
    std::vector<Term<T>> terms;
    std::vector<Pass<T>> passes;
    uint64_t seed;
    int blocks;

    void check(const Spec& spec) const;
    void settle(const Spec& spec, const Layer<T>& layer);
    void house(const Slot* theirs);
    void plan_gradients();
    void add_shelf();
    void shelve(Slot& slot);
    void house_gradients(bool apart, const Stage* theirs = nullptr);
    void share();
    bool stops(int border, bool forward) const { return forward ? cuts[border].forward : cuts[border].backward; }
    int reach(int segment, bool forward) const;
    bool open(size_t layer) const;
    void load_tokens(Slot& slot, const Samples& samples, const int64_t* index);
    size_t begin(int segment) const { return segment ? cuts[segment - 1].layer : 0; }
    size_t end(int segment) const { return segment < int(cuts.size()) ? cuts[segment].layer : layers.size(); }
    Pass<T> pass(size_t layer, int m, uint64_t step, int64_t first, bool training);
    T* act(int m, int id) { return id ? slots[m].acts[id].data() : slots[m].given; }
    T* grad(int m, int id);
};

}  // namespace paraxis
