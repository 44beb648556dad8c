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
        const ptrdiff_t n = elements(p);
        const auto& k = *p.kernels;
        const std::string& kind = this->spec.kind;
        if (kind == "gelu_tanh") return k.gelu_tanh(n, p.x, p.y);
        (kind == "relu" ? k.relu : kind == "sigmoid" ? k.sigmoid : kind == "tanh" ? k.tanh : k.gelu)(n, p.x, p.y);
    }

    void backward(const Pass<T>& p) const override {
        if (!p.dx) return;
        const ptrdiff_t n = elements(p);
        const auto& k = *p.kernels;
        const std::string& kind = this->spec.kind;
        if (kind == "sigmoid") return k.sigmoid_back(n, p.y, p.dy, p.dx, p.dx_add);
        if (kind == "tanh") return k.tanh_back(n, p.y, p.dy, p.dx, p.dx_add);
        if (kind == "gelu") return k.gelu_back(n, p.x, p.dy, p.dx, p.dx_add);
        if (kind == "gelu_tanh") return k.gelu_tanh_back(n, p.x, p.dy, p.dx, p.dx_add);
        k.relu_back(n, p.y, p.dy, p.dx_add ? p.dy : p.dx);
        if (p.dx_add) k.add_into(n, p.dy, p.dx);
    }

  private:
    ptrdiff_t elements(const Pass<T>& p) const { return ptrdiff_t(p.blocks) * this->spec.in.size() * LANES; }
};

template <class T>
class Residual final : public Layer<T> {
  public:
    using Layer<T>::Layer;

    void forward(const Pass<T>& p) const override {
        const ptrdiff_t n = ptrdiff_t(p.blocks) * this->spec.in.size() * LANES;
        p.kernels->add(n, p.x, p.skip, p.y);
        if (this->spec.relu) p.kernels->relu(n, p.y, p.y);
    }

    void backward(const Pass<T>& p) const override {
        const ptrdiff_t n = ptrdiff_t(p.blocks) * this->spec.in.size() * LANES;
        if (this->spec.relu) p.kernels->relu_back(n, p.y, p.dy, p.dy);
        for (auto [to, add] : {std::pair{p.dx, p.dx_add}, {p.dskip, p.dskip_add}}) {
            if (!to) continue;
            if (add)
                p.kernels->add_into(n, p.dy, to);
            else
                std::copy(p.dy, p.dy + n, to);
        }
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
            std::copy(p.x, p.x + size_t(p.blocks) * this->spec.in.size() * LANES, p.y);
    }

    void backward(const Pass<T>& p) const override {
        if (p.dx) mask(p, p.dy, p.dx, p.dx_add);
    }

  private:
    std::vector<uint32_t> element;

    void mask(const Pass<T>& p, const T* x, T* y, bool add) const {
        const Masks masks(this->spec.p, p.seed, p.step, this->spec.key);
        const T scale = T(masks.scale);
        const size_t size = size_t(this->spec.in.size()) * LANES;
        for (int b = 0; b < p.blocks; ++b) {
            if (p.tokens) {
                const uint32_t width = uint32_t(this->spec.in.c);
                p.kernels->dropout_tokens(this->spec.in.c, uint32_t(b % p.rise() * LANES) * width, width,
                                          masks.of_sample(p.first + b / p.rise()), masks.threshold, scale, x + b * size,
                                          y + b * size, add);
                continue;
            }
            uint32_t sample[LANES];
            for (int lane = 0; lane < LANES; ++lane) sample[lane] = masks.of_sample(p.first + b * LANES + lane);
            p.kernels->dropout(this->spec.in.size(), element.data(), sample, masks.threshold, scale, x + b * size,
                               y + b * size, add);
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
