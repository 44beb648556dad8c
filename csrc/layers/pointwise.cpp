// Layers that treat every element alike: activations, dropout, the residual sum; and the list of all kinds.
#include <algorithm>

#include "layer.h"
#include "masks.h"

namespace paraxis {
namespace {

template <class T>
class Activation final : public Layer<T> {
  public:
    using Layer<T>::Layer;

    void forward(const Pass<T>& p) const override {
        const auto& k = *p.kernels;
        const std::string& kind = this->spec.kind;
        const auto curve = kind == "relu"        ? k.relu
                           : kind == "sigmoid"   ? k.sigmoid
                           : kind == "tanh"      ? k.tanh
                           : kind == "gelu_tanh" ? k.gelu_tanh
                                                 : k.gelu;
        each_stretch(p, this->spec.in, [&](size_t at, ptrdiff_t n) { curve(n, p.x + at, p.y + at); });
    }

    void backward(const Pass<T>& p) const override {
        if (p.dx) each_stretch(p, this->spec.in, [&](size_t at, ptrdiff_t n) { back(p, at, n); });
    }

  private:
    void back(const Pass<T>& p, size_t at, ptrdiff_t n) const {
        const auto& k = *p.kernels;
        const std::string& kind = this->spec.kind;
        const T *x = p.x + at, *y = p.y + at;
        T *dy = p.dy + at, *dx = p.dx + at;
        if (kind == "sigmoid") return k.sigmoid_back(n, y, dy, dx, p.dx_add);
        if (kind == "tanh") return k.tanh_back(n, y, dy, dx, p.dx_add);
        if (kind == "gelu") return k.gelu_back(n, x, dy, dx, p.dx_add);
        if (kind == "gelu_tanh") return k.gelu_tanh_back(n, x, dy, dx, p.dx_add);
        k.relu_back(n, y, dy, p.dx_add ? dy : dx);
        if (p.dx_add) k.add_into(n, dy, dx);
    }
};

template <class T>
class Residual final : public Layer<T> {
  public:
    using Layer<T>::Layer;

    void forward(const Pass<T>& p) const override {
        each_stretch(p, this->spec.in, [&](size_t at, ptrdiff_t n) {
            p.kernels->add(n, p.x + at, p.skip + at, p.y + at);
            if (this->spec.relu) p.kernels->relu(n, p.y + at, p.y + at);
        });
    }

    void backward(const Pass<T>& p) const override {
        each_stretch(p, this->spec.in, [&](size_t at, ptrdiff_t n) {
            T* dy = p.dy + at;
            if (this->spec.relu) p.kernels->relu_back(n, p.y + at, dy, dy);
            for (auto [to, add] : {std::pair{p.dx, p.dx_add}, {p.dskip, p.dskip_add}}) {
                if (!to) continue;
                if (add)
                    p.kernels->add_into(n, dy, to + at);
                else
                    std::copy(dy, dy + n, to + at);
            }
        });
    }
};

// The mask follows from (seed, step, layer, sample, element), as in the Python engines, bit for bit.
template <class T>
class Dropout final : public Layer<T> {
  public:
    explicit Dropout(const Spec& s) : Layer<T>(s) {
        for (int f = 0; f < s.in.size(); ++f) element.push_back(s.in.torch_index(f));
    }

    void forward(const Pass<T>& p) const override {
        if (p.training)
            mask(p, p.x, p.y, false);
        else
            each_stretch(p, this->spec.in, [&](size_t at, ptrdiff_t n) { std::copy(p.x + at, p.x + at + n, p.y + at); });
    }

    void backward(const Pass<T>& p) const override {
        if (p.dx) mask(p, p.dy, p.dx, p.dx_add);
    }

  private:
    std::vector<uint32_t> element;

    void mask(const Pass<T>& p, const T* x, T* y, bool add) const {
        const Masks masks(this->spec.p, p.seed, p.step, this->spec.key);
        const T scale = T(masks.scale);
        const Shape& shape = this->spec.in;
        const auto [first, last] = p.own(shape.c);
        const int stretch = p.slices == 1 ? shape.size() : last - first;  // features that are neighbours
        for (int b = 0; b < p.blocks; ++b) {
            if (p.tokens) {
                const uint32_t width = uint32_t(shape.c), place = uint32_t(b % p.rise() * LANES) * width + uint32_t(first);
                const size_t at = (size_t(b) * width + first) * LANES;
                p.kernels->dropout_tokens(last - first, place, width, masks.of_sample(p.first + b / p.rise()),
                                          masks.threshold, scale, x + at, y + at, add);
                continue;
            }
            uint32_t sample[LANES];
            for (int lane = 0; lane < LANES; ++lane) sample[lane] = masks.of_sample(p.first + b * LANES + lane);
            for (int f = first; stretch && f < shape.size(); f += p.slices == 1 ? shape.size() : shape.c) {
                const size_t at = (size_t(b) * shape.size() + f) * LANES;
                p.kernels->dropout(stretch, element.data() + f, sample, masks.threshold, scale, x + at, y + at, add);
            }
        }
    }
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_pointwise(const Spec& spec) {
    if (spec.kind == "dropout") return std::make_unique<Dropout<T>>(spec);
    if (spec.kind == "residual") return std::make_unique<Residual<T>>(spec);
    return std::make_unique<Activation<T>>(spec);
}

template <class T>
std::unique_ptr<Layer<T>> make_layer(const Spec& spec) {
    const std::string& kind = spec.kind;
    if (kind == "affine") return make_affine<T>(spec);
    if (kind == "batch_norm" || kind == "layer_norm") return make_norm<T>(spec);
    if (kind == "embedding" || kind == "position") return make_table<T>(spec);
    if (kind == "attention") return make_attention<T>(spec);
    if (kind == "max_pool" || kind == "average_pool") return make_pool<T>(spec);
    for (const char* pointwise : {"relu", "sigmoid", "tanh", "gelu", "gelu_tanh", "dropout", "residual"})
        if (kind == pointwise) return make_pointwise<T>(spec);
    throw std::invalid_argument("the native engine has no layer of kind " + kind);
}

template <class T>
void Layer<T>::pack(const std::string& part, const T*, T*, T*) const {
    throw std::invalid_argument(spec.name + " has no tensor " + part);
}
template <class T>
void Layer<T>::unpack(const std::string& part, const T*, const T*, T*) const {
    throw std::invalid_argument(spec.name + " has no tensor " + part);
}

template class Layer<float>;
template class Layer<double>;
template std::unique_ptr<Layer<float>> make_layer(const Spec&);
template std::unique_ptr<Layer<double>> make_layer(const Spec&);

}  // namespace paraxis
