// Batch normalisation over the samples of a microbatch and all positions; layer normalisation over a sample's features.
#include <algorithm>
#include <cmath>

#include "layer.h"

namespace paraxis {
namespace {

// Of padded lanes: 1 for a real sample, 0 for padding.
template <class T>
double over_lanes(const T* x) {
    double sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += double(x[lane]);
    return sum;
}

template <class T>
void mask_of(const Pass<T>& p, int block, T* mask) {
    for (int lane = 0; lane < LANES; ++lane) mask[lane] = lane < p.valid(block) ? T(1) : T(0);
}

// Running statistics are [mean c][variance c]. Every microbatch adds what it alone would make of them to `collected`.
template <class T>
class BatchNorm final : public Layer<T> {
  public:
    explicit BatchNorm(const Spec& s) : Layer<T>(s) {
        this->parameters = (2 * s.out.c + LANES - 1) / LANES * LANES;
        this->statistics = 2 * s.out.c;
        this->kept = 2 * s.out.c;  // mean and inverse deviation; those of a group's first block hold for all of it
        if (s.across > 1 && s.group) throw std::invalid_argument(s.name + ": groups within a microbatch meet nobody");
        this->moments = s.across > 1 ? 2 * s.out.c : 0;
    }

    void forward(const Pass<T>& p) const override {
        each_group(p, [&](const Pass<T>& group) { forward_group(group); });
    }

    void backward(const Pass<T>& p) const override {
        each_group(p, [&](const Pass<T>& group) { backward_group(group); });
    }

    // Sums about the running mean, which all replicas know, so that they can be added up; in double precision, which
    // bears that this mean is not the batch's.
    void measure(const Pass<T>& p) const override {
        const int c = this->spec.out.c;
        sum_up(p, [&](int f, double count, double mean, double variance) {
            const double apart = mean - double(p.running[f]);
            p.moments[f] = count * apart;
            p.moments[c + f] = count * (variance + apart * apart);
        });
    }

    void measure_back(const Pass<T>& p) const override {
        const int c = this->spec.out.c;
        rectify(p);
        sum_up_back(p, [&](int f, double sum, double product) { p.moments[f] = sum, p.moments[c + f] = product; });
    }

    size_t scratch(int) const override { return 2 * size_t(this->spec.out.c) * LANES; }

    std::vector<std::pair<std::string, int64_t>> parts() const override {
        const int64_t c = this->spec.out.c;
        return {{"weight", c}, {"bias", c}, {"running_mean", c}, {"running_var", c}};
    }

    void pack(const std::string& part, const T* tensor, T* w, T* running) const override {
        std::copy(tensor, tensor + this->spec.out.c, place(part, w, running));
    }

    void unpack(const std::string& part, const T* w, const T* running, T* tensor) const override {
        const T* from = place(part, w, running);
        std::copy(from, from + this->spec.out.c, tensor);
    }

  private:
    // Groups of samples are whole blocks: each is a pass of its own.
    template <class F>
    void each_group(const Pass<T>& p, F f) const {
        const int blocks = this->spec.group && p.training ? this->spec.group / LANES : p.blocks;
        const size_t size = size_t(this->spec.in.size()) * LANES;
        for (int b = 0; b < p.blocks; b += blocks) {
            Pass<T> part = p;
            part.blocks = std::min(blocks, p.blocks - b);
            part.samples = std::clamp(p.samples - b * LANES, 0, part.blocks * LANES);
            part.share = T(1) / T((p.blocks + blocks - 1) / blocks);
            part.add = p.add || b;
            part.kept = p.kept + b * this->kept;
            for (T** pointer : {&part.y, &part.dy, &part.dx, &part.dskip})
                if (*pointer) *pointer += b * size;
            for (const T** pointer : {&part.x, &part.skip})
                if (*pointer) *pointer += b * size;
            f(part);
        }
    }

    // f(first element, positions whose channels are neighbours) until all of a block is done; of channels from `first` on.
    template <class F>
    void each_run(const Pass<T>& p, int block, int first, F f) const {
        const Shape& shape = this->spec.in;
        const int stretch = p.slices == 1 ? shape.positions() : 1;
        for (int position = 0; position < shape.positions(); position += stretch)
            f(((size_t(block) * shape.positions() + position) * shape.c + first) * LANES, stretch);
    }

    void forward_group(const Pass<T>& p) const {
        const int c = this->spec.out.c;
        const auto [first, last] = p.own(c);
        T *mean = p.kept, *inverse = p.kept + c;
        if (p.training) {
            settle(p, mean, inverse);
        } else {
            for (int f = first; f < last; ++f) {
                mean[f] = p.running[f];
                inverse[f] = T(1 / std::sqrt(double(p.running[c + f]) + this->spec.epsilon));
            }
        }
        std::vector<T> scale(c), shift(c);
        for (int f = first; f < last; ++f) {
            scale[f] = p.w[f] * inverse[f];
            shift[f] = p.w[c + f] - mean[f] * scale[f];
        }
        for (int b = 0; b < p.blocks; ++b)
            each_run(p, b, first, [&](size_t at, int positions) {
                p.kernels->normalise(positions, last - first, scale.data() + first, shift.data() + first,
                                     p.skip ? p.skip + at : nullptr, this->spec.relu, p.x + at, p.y + at);
            });
    }

    void backward_group(const Pass<T>& p) const {
        const int c = this->spec.out.c;
        const auto [first, last] = p.own(c);
        const T *mean = p.kept, *inverse = p.kept + c;
        const double count = double(p.samples) * this->spec.in.positions() * this->spec.across;
        std::vector<T> factor(c), slope(c), shift(c);
        auto derive = [&](int f, double sum, double scaled) {
            factor[f] = p.w[f] * inverse[f];
            slope[f] = T(-double(factor[f]) * scaled / count * double(inverse[f]));
            shift[f] = T(-double(factor[f]) * sum / count - double(slope[f]) * double(mean[f]));
        };
        if (this->moments) {
            for (int f = 0; f < c; ++f) derive(f, p.moments[f], p.moments[c + f]);
        } else {
            rectify(p);
            sum_up_back(p, derive);
        }
        if (p.skip && p.dskip) pass_on(p);
        if (!p.dx) return;
        for (int b = 0; b < p.blocks; ++b) {
            T mask[LANES];
            mask_of(p, b, mask);
            each_run(p, b, first, [&](size_t at, int positions) {
                p.kernels->norm_back(positions, last - first, factor.data() + first, slope.data() + first,
                                     shift.data() + first, mask, p.x + at, p.dy + at, p.dx + at, p.dx_add);
            });
        }
    }

    void rectify(const Pass<T>& p) const {
        if (!this->spec.relu) return;
        each_stretch(p, this->spec.in, [&](size_t at, ptrdiff_t n) { p.kernels->relu_back(n, p.y + at, p.dy + at, p.dy + at); });
    }

    // f(feature, sum of dy, sum of dy times the normalised x), which are also the gradients of bias and weight.
    template <class F>
    void sum_up_back(const Pass<T>& p, F f) const {
        const int c = this->spec.out.c;
        const auto [first, last] = p.own(c);
        const T *mean = p.kept, *inverse = p.kept + c;
        T *sums = p.scratch, *products = sums + c * LANES;
        std::fill_n(sums, 2 * c * LANES, T(0));
        for (int b = 0; b < p.blocks; ++b)
            each_run(p, b, first, [&](size_t at, int positions) {
                p.kernels->norm_sums(positions, last - first, p.x + at, p.dy + at, mean + first, sums + first * LANES,
                                     products + first * LANES);
            });
        for (int k = first; k < last; ++k) {
            const double sum = over_lanes(sums + k * LANES), product = over_lanes(products + k * LANES);
            const double scaled = product * double(inverse[k]);
            p.dw[k] = (p.add ? p.dw[k] : T(0)) + T(scaled);
            p.dw[c + k] = (p.add ? p.dw[c + k] : T(0)) + T(sum);
            f(k, sum, scaled);
        }
    }

    template <class P>
    P place(const std::string& part, P w, P running) const {
        const int c = this->spec.out.c;
        return part == "weight" ? w : part == "bias" ? w + c : part == "running_mean" ? running : running + c;
    }

    // Mean and inverse deviation, and what they make of the running statistics.
    void settle(const Pass<T>& p, T* mean, T* inverse) const {
        const int c = this->spec.out.c;
        const double momentum = this->spec.momentum;
        auto keep = [&](int f, double count, double centre, double variance) {
            mean[f] = T(centre);
            inverse[f] = T(1 / std::sqrt(variance + this->spec.epsilon));
            const double unbiased = variance * count / std::max(1.0, count - 1);
            p.collected[f] += p.share * T((1 - momentum) * double(p.running[f]) + momentum * centre);
            p.collected[c + f] += p.share * T((1 - momentum) * double(p.running[c + f]) + momentum * unbiased);
        };
        if (!this->moments) return sum_up(p, keep);
        const double count = double(p.samples) * this->spec.in.positions() * this->spec.across;
        for (int f = 0; f < c; ++f) {
            const double apart = p.moments[f] / count;
            keep(f, count, double(p.running[f]) + apart, std::max(0.0, p.moments[c + f] / count - apart * apart));
        }
    }

    // f(feature, values, mean, variance) of the samples here.
    template <class F>
    void sum_up(const Pass<T>& p, F f) const {
        const int c = this->spec.out.c;
        const auto [first, last] = p.own(c);
        const double count = double(p.samples) * this->spec.in.positions();
        std::vector<T> pivot(c);
        for (int k = first; k < last; ++k) pivot[k] = p.x[k * LANES];
        T *sums = p.scratch, *squares = sums + c * LANES;
        std::fill_n(sums, 2 * c * LANES, T(0));
        for (int b = 0; b < p.blocks; ++b) {
            T mask[LANES];
            mask_of(p, b, mask);
            each_run(p, b, first, [&](size_t at, int positions) {
                p.kernels->moments(positions, last - first, p.x + at, pivot.data() + first, mask, sums + first * LANES,
                                   squares + first * LANES);
            });
        }
        for (int k = first; k < last; ++k) {
            const double centre = over_lanes(sums + k * LANES) / count, second = over_lanes(squares + k * LANES);
            f(k, count, double(pivot[k]) + centre, std::max(0.0, second / count - centre * centre));
        }
    }

    void pass_on(const Pass<T>& p) const {
        each_stretch(p, this->spec.in, [&](size_t at, ptrdiff_t n) {
            if (p.dskip_add)
                p.kernels->add_into(n, p.dy + at, p.dskip + at);
            else
                std::copy(p.dy + at, p.dy + at + n, p.dskip + at);
        });
    }
};

template <class T>
class LayerNorm final : public Layer<T> {
  public:
    explicit LayerNorm(const Spec& s) : Layer<T>(s) {
        this->parameters = (2 * s.in.size() + LANES - 1) / LANES * LANES;
        this->kept = 2 * LANES;
        this->sharing = Sharing::apart;
    }

    size_t scratch(int) const override { return 2 * size_t(this->spec.in.size()) * LANES; }

    void forward(const Pass<T>& p) const override {
        const int n = this->spec.in.size();
        const auto [first, last] = p.own(p.blocks);
        for (int b = first; b < last; ++b) {
            const size_t at = size_t(b) * n * LANES;
            T* kept = p.kept + size_t(b) * this->kept;
            p.kernels->layer_norm(n, T(this->spec.epsilon), p.w, p.w + n, p.x + at, p.y + at, kept, kept + LANES);
        }
    }

    // Every thread sums up all blocks, for its own features of the weights' gradient.
    void backward(const Pass<T>& p) const override {
        const int n = this->spec.in.size();
        const auto [first, last] = p.own(p.blocks);
        const auto [from, to] = p.own(n);
        T *sums = p.scratch, *products = sums + size_t(n) * LANES;
        std::fill_n(sums, 2 * size_t(n) * LANES, T(0));
        for (int b = 0; b < p.blocks; ++b) {
            const size_t at = size_t(b) * n * LANES;
            const T* kept = p.kept + size_t(b) * this->kept;
            p.kernels->layer_norm_back(n, p.w, p.x + at, p.dy + at, kept, kept + LANES, sums, products,
                                       p.dx && first <= b && b < last ? p.dx + at : nullptr, p.dx_add);
        }
        p.kernels->sum_lanes(1, to - from, products + from * LANES, p.add, p.dw + from);
        p.kernels->sum_lanes(1, to - from, sums + from * LANES, p.add, p.dw + n + from);
    }

    std::vector<std::pair<std::string, int64_t>> parts() const override {
        return {{"weight", this->spec.in.size()}, {"bias", this->spec.in.size()}};
    }

    void pack(const std::string& part, const T* tensor, T* w, T*) const override {
        each(part, [&](size_t flat, size_t torch) { w[flat] = tensor[torch]; });
    }

    void unpack(const std::string& part, const T* w, const T*, T* tensor) const override {
        each(part, [&](size_t flat, size_t torch) { tensor[torch] = w[flat]; });
    }

  private:
    template <class F>
    void each(const std::string& part, F f) const {
        const int n = this->spec.in.size();
        for (int i = 0; i < n; ++i) f((part == "bias" ? n : 0) + i, this->spec.in.torch_index(i));
    }
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_norm(const Spec& spec) {
    if (spec.kind == "batch_norm") return std::make_unique<BatchNorm<T>>(spec);
    return std::make_unique<LayerNorm<T>>(spec);
}
template std::unique_ptr<Layer<float>> make_norm(const Spec&);
template std::unique_ptr<Layer<double>> make_norm(const Spec&);

}  // namespace paraxis
