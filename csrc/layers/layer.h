// What a layer is: shapes, parameters in a flat buffer, a forward and a backward on blocks of LANES samples.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/kernels.h"

namespace paraxis {

// One sample at a place of the network, channels fastest: feature (y * w + x) * c + channel.
struct Shape {
    int h = 1, w = 1, c = 1;
    int positions() const { return h * w; }
    int size() const { return h * w * c; }
    // The number of a feature as PyTorch counts, channels slowest.
    int torch_index(int feature) const { return feature % c * positions() + feature / c; }
    bool operator==(const Shape&) const = default;
};

// A layer as Python describes it; x, skip and y are numbers of activation buffers (skip -1: none).
struct Spec {
    std::string kind, name;  // name: of the module, as in the state_dict
    int x = 0, skip = -1, y = 0;
    Shape in, out;
    int kernel_h = 1, kernel_w = 1, stride = 1, padding = 0;
    bool bias = true, relu = false;
    double p = 0, epsilon = 1e-5, momentum = 0.1;
    int group = 0;  // samples of a batch norm's group, whole blocks (0: all of a microbatch)
    int heads = 1;    // of attention
    int entries = 0;  // of a table: of symbols (embedding), of places (position)
    int same = -1;    // number of the layer whose parameters it uses, in the same layout (-1: it has its own)
    int tie = -1;     // number of the parameters of which another stage has a copy (-1: none has)
    int across = 1;  // replicas over whose microbatches a batch norm's statistics go; then `group` is 0
    uint32_t key = 0;  // of a dropout layer
};

inline int blocks_of(int lanes) { return (lanes + LANES - 1) / LANES; }

inline std::pair<int, int> own_of(int count, int slice, int slices) {
    return {int(int64_t(count) * slice / slices), int(int64_t(count) * (slice + 1) / slices)};
}

// What a layer works on. Activations are [block][feature][LANES]. Lanes are samples; in a network of tokens they are
// consecutive tokens, a sample being some whole blocks, the last of which may be padded.
template <class T>
struct Pass {
    const Kernels<T>* kernels;
    int blocks, samples;           // the last block may have fewer than LANES samples
    int tokens;                    // of a sample (0: lanes are samples)
    uint64_t seed, step;
    int64_t first;                 // place of the first sample in the global batch
    bool training;                 // false: evaluate
    bool add;                      // parameter gradients add to what is there (all microbatches but the first)
    bool parted;                   // somebody else computes the gradient of the matrices, later
    const T* w;
    const T* running;              // statistics of evaluation
    T* collected;                  // sum over microbatches of what they would make of the statistics
    T* dw;
    const T* x;
    const T* skip;
    T* y;
    T* dy;                         // may be altered by a backward
    T* dx;                         // null: nobody needs it
    T* dskip;
    bool dx_add, dskip_add;        // somebody else has written there before
    T* kept;                       // what the forward keeps for the backward, `kept` elements a block
    uint8_t* marks;                // the same in bytes, `marks` a block
    T* scratch;
    std::vector<Term<T>>* terms;
    T share = 1;  // of a group among those of a microbatch
    double* moments = nullptr;  // of a layer that meets other replicas in its middle: this one's, then those of all
    int slice = 0, slices = 1;  // which of so many threads this one is, that share all that is here but the scratch

    // Of so many channels, heads or blocks, those that this thread takes care of: [first, last).
    std::pair<int, int> own(int count) const { return own_of(count, slice, slices); }
    int rise() const { return blocks_of(tokens); }  // blocks of a sample of tokens
    int valid(int block) const {
        const int left = tokens ? tokens - block % rise() * LANES : samples - block * LANES;
        return left < LANES ? left : LANES;
    }
};

// How the threads of a group share a layer. Alike: each has its own channels of all that the layer reads and writes, so
// that nobody waits in front of it or behind it. Mixing: each makes its own channels, of all input in a forward, of all of
// the output's gradient in a backward. Apart: the same, but what each makes
// are blocks or heads, which its neighbours read as channels.
enum class Sharing { alike, mixing, apart };

template <class T>
class Layer {
  public:
    explicit Layer(const Spec& spec) : spec(spec) {}
    virtual ~Layer() = default;
    virtual void forward(const Pass<T>& p) const = 0;
    virtual void backward(const Pass<T>& p) const = 0;
    // Of a layer with `moments`: the halves of a forward and a backward before its replicas' moments are summed.
    virtual void measure(const Pass<T>&) const {}
    virtual void measure_back(const Pass<T>&) const {}
    // Of a mixing layer: what its threads do with their own channels of dy before all of it is read.
    virtual void open_back(const Pass<T>&) const {}
    // Move a tensor of the state_dict ("weight", "bias", "running_mean" ...) into or out of the flat buffers.
    virtual void pack(const std::string& part, const T* tensor, T* w, T* running) const;
    virtual void unpack(const std::string& part, const T* w, const T* running, T* tensor) const;
    // (part, elements) of every tensor it has in a state_dict.
    virtual std::vector<std::pair<std::string, int64_t>> parts() const { return {}; }

    Spec spec;
    // Of its first `matrix` parameters, what the n-th of `parts` owners takes care of; and the gradient of that, over
    // the samples of all passes, into the first one's.
    virtual std::pair<size_t, size_t> owned(int, int) const { return {0, 0}; }
    virtual void own_gradient(const std::vector<Pass<T>>&, int) const {}

    Sharing sharing = Sharing::alike;
    size_t parameters = 0, statistics = 0;  // elements of the flat buffers
    size_t matrix = 0;                      // elements whose gradient can be computed apart, by several owners
    size_t kept = 0, marks = 0;             // elements and bytes a block
    size_t moments = 0;                     // sums that replicas add up in the middle of a pass; 0: it needs none
    // Elements of scratch for so many blocks.
    virtual size_t scratch(int) const { return 0; }
};

// One layer after its description; throws std::invalid_argument for a kind that is not known.
template <class T>
std::unique_ptr<Layer<T>> make_layer(const Spec& spec);

// f(first element, elements) for every stretch of neighbours among this thread's channels of activations of a shape.
template <class T, class F>
void each_stretch(const Pass<T>& p, const Shape& shape, F f) {
    const size_t size = size_t(shape.size()) * LANES;
    if (p.slices == 1) return f(size_t(0), ptrdiff_t(p.blocks * size));
    const auto [first, last] = p.own(shape.c);
    if (first == last) return;
    for (size_t place = 0; place < size_t(p.blocks) * shape.positions(); ++place)
        f((place * shape.c + first) * LANES, ptrdiff_t(last - first) * LANES);
}

template <class T>
std::unique_ptr<Layer<T>> make_affine(const Spec& spec);
template <class T>
std::unique_ptr<Layer<T>> make_norm(const Spec& spec);
template <class T>
std::unique_ptr<Layer<T>> make_pool(const Spec& spec);
template <class T>
std::unique_ptr<Layer<T>> make_pointwise(const Spec& spec);
template <class T>
std::unique_ptr<Layer<T>> make_table(const Spec& spec);
template <class T>
std::unique_ptr<Layer<T>> make_attention(const Spec& spec);

}  // namespace paraxis
