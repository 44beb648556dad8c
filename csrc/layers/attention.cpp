// Causal attention (Vaswani et al. 2017) of the tokens of a sample to themselves and those before them.
//
// Tokens are lanes, so a block of queries by a block of keys is a small matrix [key][query], and every product here is
// one of tiles that `rows` has anyway. Blocks of keys behind a block of queries are never touched. The forward keeps one
// number a query and head, from which the backward makes the probabilities again (as Dao et al. 2022 do).
#include <algorithm>
#include <cmath>

#include "layer.h"
#include "masks.h"

namespace paraxis {
namespace {

constexpr int SQUARE = LANES * LANES;  // of one block of keys and one of queries

// The input is [query, key, value] x [head] x [size], as one linear layer makes it.
template <class T>
class Attention final : public Layer<T> {
  public:
    explicit Attention(const Spec& s) : Layer<T>(s), width(s.out.c), size(s.heads > 0 ? s.out.c / s.heads : 0) {
        if (s.heads < 1 || s.out.c % s.heads || s.in.c != 3 * s.out.c)
            throw std::invalid_argument(s.name + ": attention takes queries, keys and values of equal heads");
        scale = T(1 / std::sqrt(double(size)));
        this->kept = size_t(s.heads) * LANES;
        this->sharing = Sharing::apart;
        rise = blocks_of(s.entries);
    }

    void forward(const Pass<T>& p) const override {
        each_head(p, [&](int first, int head) {
            for (int i = 0; i < rise; ++i) {
                products(p, part(p.x, first + i, QUERY, head), first, i, KEY, head, p.scratch);
                p.kernels->causal((i + 1) * LANES, scale, p.scratch, level(p, first + i, head));
                if (p.training) drop(p, first, i, head, p.scratch, p.scratch);
                p.terms->clear();
                for (int j = 0; j <= i; ++j) p.terms->push_back({part(p.x, first + j, VALUE, head), p.scratch + j * SQUARE, LANES});
                gather(p, p.y + at(width, first + i, head * size), false);
            }
        });
    }

    void backward(const Pass<T>& p) const override {
        if (!p.dx) return;
        each_head(p, [&](int first, int head) {
            for (int i = 0; i < rise; ++i) of_queries(p, first, i, head);
            for (int j = 0; j < rise; ++j) of_keys(p, first, j, head);
        });
    }

    // Probabilities and their gradient of a block of queries; both, of all blocks, turned; what dropout leaves.
    size_t scratch(int) const override { return size_t(2 * rise + rise * (rise + 1) + (this->spec.p > 0 ? rise : 0)) * SQUARE; }

  private:
    enum Role { QUERY, KEY, VALUE };

    int width, size, rise;
    T scale;

    static size_t at(int features, int block, int feature) { return (size_t(block) * features + feature) * LANES; }
    template <class P>
    P part(P x, int block, Role role, int head) const { return x + at(3 * width, block, role * width + head * size); }
    T* level(const Pass<T>& p, int block, int head) const { return p.kept + size_t(block) * this->kept + head * LANES; }
    T* turned(const Pass<T>& p, int i, int j) const { return p.scratch + size_t(2 * rise + i * (i + 1) + 2 * j) * SQUARE; }

    template <class F>
    void each_head(const Pass<T>& p, F f) const {
        const auto [from, to] = p.own(this->spec.heads);
        for (int first = 0; first < p.blocks; first += rise)
            for (int head = from; head < to; ++head) f(first, head);
    }

    // y[key][query]: of what block i has of its own, with the keys, or values, of all that it sees.
    void products(const Pass<T>& p, const T* own, int first, int i, Role with, int head, T* y) const {
        for (int j = 0; j <= i; ++j) {
            const Term<T> term{part(p.x, first + j, with, head), own, size};
            p.kernels->rows(LANES, 1, &term, 1, LANES, {nullptr, false, false}, y + j * SQUARE);
        }
    }

    // Features of a head: the sum of the terms, whose rows are features of tokens and whose columns are tokens.
    void gather(const Pass<T>& p, T* y, bool add) const {
        p.kernels->rows(size, int(p.terms->size()), p.terms->data(), LANES, 1, {nullptr, add, false}, y);
    }

    // Of [key][query] of block i; an element's number is that of (head, query, key).
    void drop(const Pass<T>& p, int first, int i, int head, const T* x, T* y) const {
        if (!(this->spec.p > 0)) return;
        const Masks masks(this->spec.p, p.seed, p.step, this->spec.key);
        const uint32_t tokens = uint32_t(p.tokens), row = uint32_t(head) * tokens + uint32_t(i * LANES);
        p.kernels->dropout_tokens((i + 1) * LANES, row * tokens, tokens, masks.of_sample(p.first + first / rise),
                                  masks.threshold, T(masks.scale), x, y, false);
    }

    void of_queries(const Pass<T>& p, int first, int i, int head) const {
        T *own = p.scratch, *slope = own + size_t(rise) * SQUARE;
        products(p, part(p.x, first + i, QUERY, head), first, i, KEY, head, own);
        p.kernels->causal_again((i + 1) * LANES, scale, level(p, first + i, head), own);
        products(p, p.dy + at(width, first + i, head * size), first, i, VALUE, head, slope);
        const T* left = own;  // by dropout
        if (this->spec.p > 0) {
            T* room = turned(p, rise, 0);
            drop(p, first, i, head, own, room);
            drop(p, first, i, head, slope, slope);
            left = room;
        }
        p.kernels->causal_back((i + 1) * LANES, scale, own, slope);
        p.terms->clear();
        for (int j = 0; j <= i; ++j) {
            p.terms->push_back({part(p.x, first + j, KEY, head), slope + j * SQUARE, LANES});
            p.kernels->transpose(LANES, LANES, left + j * SQUARE, turned(p, i, j));
            p.kernels->transpose(LANES, LANES, slope + j * SQUARE, turned(p, i, j) + SQUARE);
        }
        gather(p, part(p.dx, first + i, QUERY, head), p.dx_add);
    }

    void of_keys(const Pass<T>& p, int first, int j, int head) const {
        p.terms->clear();
        for (int i = j; i < rise; ++i) p.terms->push_back({part(p.x, first + i, QUERY, head), turned(p, i, j) + SQUARE, LANES});
        gather(p, part(p.dx, first + j, KEY, head), p.dx_add);
        p.terms->clear();
        for (int i = j; i < rise; ++i) p.terms->push_back({p.dy + at(width, first + i, head * size), turned(p, i, j), LANES});
        gather(p, part(p.dx, first + j, VALUE, head), p.dx_add);
    }
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_attention(const Spec& spec) {
    return std::make_unique<Attention<T>>(spec);
}
template std::unique_ptr<Layer<float>> make_attention(const Spec&);
template std::unique_ptr<Layer<double>> make_attention(const Spec&);

}  // namespace paraxis
