// The table of kernels: what a layer computes with. One table per instruction set, chosen at run time, and a naive one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace paraxis {

// Activations are stored [block][feature][LANES]: a feature of 16 samples is one cache line of float32, whatever the
// layer. Weights are stored in panels [outputs / PANEL][input][width]: both the forward (one panel row per input) and
// the input gradient (a short row of outputs per input) read them in long runs, so that nothing is ever packed.
constexpr int LANES = 16;
constexpr int PANEL = 48;
constexpr int WIDTH_STEP = 8;  // a panel's width is rounded up to it; what is beyond the outputs stays zero

// One term of a batch-reduce: k columns of a meet k rows of b.
template <class T>
struct Term {
    const T* a;
    const T* b;
    int k;
};

// What happens to a tile of C beside the sum: its start (bias, what is there, or zero) and its end.
template <class T>
struct Tile {
    const T* bias;  // [rows], or null
    bool add;       // start from what C holds
    bool relu;
};

template <class T>
struct Adam {  // rest1 and rest2 are 1 - beta: in single precision it would lose what matters
    T rate, rest1, beta2, rest2, epsilon, decay, scale, correction1, correction2;
    bool decoupled;
};

template <class T>
struct Sgd {
    T rate, momentum, decay, scale;
    bool nesterov, first;
};

// Lanes of a block are samples; `valid` of them are real, the others are padding.
template <class T>
struct Kernels {
    const char* name;
    // c[r][lane] = start + sum over terms, k of a[r * row + k * col] * b[k][lane]; one of row and col is 1.
    void (*rows)(int rows, int terms, const Term<T>* term, ptrdiff_t row, ptrdiff_t col, Tile<T> tile, T* c);
    // c[r][o] (+)= sum over terms, k < LANES of a[r][k] * b[k][o]; o < width; rows of b and c have that width.
    void (*outer)(int rows, int width, int terms, const Term<T>* term, bool add, T* c);
    // c[o][i] (+)= sum over terms, lanes of b[o][lane] * a[i][lane]: few results, many terms; c[i * width + o].
    void (*dots)(int rows, int outputs, int width, int terms, const Term<T>* term, bool add, T* c);
    // y[lane][o] = x[o][lane] for o < outputs, zero up to width.
    void (*transpose)(int outputs, int width, const T* x, T* y);
    // y[feature][lane] = scale * x[index[lane]][feature]; lanes from valid on are zero.
    void (*gather_bytes)(int features, int valid, const uint8_t* x, const int64_t* index, T scale, T* y);
    void (*gather)(int features, int valid, const T* x, const int64_t* index, T* y);
    // sums[o] (+)= sum over positions and lanes of x[position][o][lane].
    void (*sum_lanes)(int positions, int features, const T* x, bool add, T* sums);
    // Softmax cross-entropy of y[class][lane], which becomes `share` times its gradient (zero in padding); returns the
    // sum of losses.
    double (*softmax)(int classes, int valid, const int64_t* target, T share, T* y, int* hits);
    void (*relu)(ptrdiff_t n, const T* x, T* y);
    void (*relu_back)(ptrdiff_t n, const T* y, const T* dy, T* dx);  // dx may be dy
    void (*sigmoid)(ptrdiff_t n, const T* x, T* y);
    void (*sigmoid_back)(ptrdiff_t n, const T* y, const T* dy, T* dx, bool add);
    void (*tanh)(ptrdiff_t n, const T* x, T* y);
    void (*tanh_back)(ptrdiff_t n, const T* y, const T* dy, T* dx, bool add);
    void (*gelu)(ptrdiff_t n, const T* x, T* y);
    void (*gelu_back)(ptrdiff_t n, const T* x, const T* dy, T* dx, bool add);
    void (*gelu_tanh)(ptrdiff_t n, const T* x, T* y);  // tanh in the place of erf
    void (*gelu_tanh_back)(ptrdiff_t n, const T* x, const T* dy, T* dx, bool add);
    void (*add)(ptrdiff_t n, const T* a, const T* b, T* c);
    void (*add_into)(ptrdiff_t n, const T* a, T* c);
    void (*fused_add)(ptrdiff_t n, T scale, const T* a, T* c);  // c += scale * a
    // Sum of `parts` gradients over a range, into out.
    void (*sum_parts)(ptrdiff_t n, int parts, const T* const* part, T* out);
    void (*sgd)(ptrdiff_t n, Sgd<T> rule, T* w, const T* g, T* velocity);
    void (*adam)(ptrdiff_t n, Adam<T> rule, T* w, const T* g, T* first, T* second);
    double (*square_sum)(ptrdiff_t n, const T* x);
    // Maximum over a window of positions: y and the winner's number in the window, one per feature and lane.
    void (*window_max)(int features, int window, const T* const* x, bool relu, T* y, uint8_t* winner);
    void (*window_max_back)(int features, int window, const uint8_t* winner, const T* y, bool relu, const T* dy,
                            T* const* dx, bool add);
    // Keyed dropout: element[f] is a feature's number within the sample as PyTorch counts, sample[lane] its mixed key.
    void (*dropout)(int features, const uint32_t* element, const uint32_t* sample, uint32_t threshold, T scale,
                    const T* x, T* y, bool add);
    // Normalisation over positions and lanes; sums are [feature][LANES] and added to. Of x - pivot, so that a large mean
    // does not swallow the variance; mask is 1 for real lanes and 0 for padding.
    void (*moments)(int positions, int features, const T* x, const T* pivot, const T* mask, T* sum, T* square);
    void (*normalise)(int positions, int features, const T* scale, const T* shift, const T* skip, bool relu, const T* x,
                      T* y);
    void (*norm_sums)(int positions, int features, const T* x, const T* dy, const T* mean, T* sum, T* product);
    // dx = (factor * dy + slope * x + shift) * mask.
    void (*norm_back)(int positions, int features, const T* factor, const T* slope, const T* shift, const T* mask,
                      const T* x, const T* dy, T* dx, bool add);
    // The same where lanes are tokens of one sample, `key` its mixed key: elements are first + lane * stride + f.
    void (*dropout_tokens)(int features, uint32_t first, uint32_t stride, uint32_t key, uint32_t threshold, T scale,
                           const T* x, T* y, bool add);
    // Every lane normalised over its features. Backward: adds dy, and dy times the normalised x, to sums [feature][LANES];
    // dx may be null.
    void (*layer_norm)(int features, T epsilon, const T* w, const T* bias, const T* x, T* y, T* mean, T* inverse);
    void (*layer_norm_back)(int features, const T* w, const T* x, const T* dy, const T* mean, const T* inverse, T* sums,
                            T* products, T* dx, bool add);
    // Softmax over keys of scale * y[key][lane], lanes being the last LANES of the keys: each sees no key behind itself.
    // level[lane] is the logarithm of its sum, from which `causal_again` finds the same.
    void (*causal)(int keys, T scale, T* y, T* level);
    void (*causal_again)(int keys, T scale, const T* level, T* y);
    void (*causal_back)(int keys, T scale, const T* y, T* dy);  // dy becomes the gradient of what came in
};

// The fastest table that this machine can run; `choose` overrides it by name ("baseline", "v3", "v4", "neon",
// "naive"; "" for the fastest) and returns false if that one cannot run here.
const Kernels<float>& fastest();
const Kernels<double>& twin();  // naive, in double precision
const Kernels<float>& naive();
bool choose(const char* name);

}  // namespace paraxis
