// Maximum and average over windows of positions; what lies in the padding takes no part in a maximum.
#include <algorithm>

#include "layer.h"

namespace paraxis {
namespace {

// Input positions under every output position.
std::vector<std::vector<int>> windows_of(const Spec& s) {
    std::vector<std::vector<int>> found;
    for (int oy = 0; oy < s.out.h; ++oy)
        for (int ox = 0; ox < s.out.w; ++ox) {
            auto& window = found.emplace_back();
            for (int ky = 0; ky < s.kernel_h; ++ky)
                for (int kx = 0; kx < s.kernel_w; ++kx) {
                    int iy = oy * s.stride - s.padding + ky, ix = ox * s.stride - s.padding + kx;
                    if (iy >= 0 && iy < s.in.h && ix >= 0 && ix < s.in.w) window.push_back(iy * s.in.w + ix);
                }
        }
    return found;
}

template <class T>
void clear(const Pass<T>& p, const Shape& shape) {
    each_stretch(p, shape, [&](size_t at, ptrdiff_t n) { std::fill_n(p.dx + at, n, T(0)); });
}

template <class T>
class MaxPool final : public Layer<T> {
  public:
    explicit MaxPool(const Spec& s) : Layer<T>(s), windows(windows_of(s)) {
        this->marks = s.out.size() * LANES;
        size_t places = 0;
        for (const auto& window : windows) places += window.size();
        tiled = s.stride >= s.kernel_h && places == size_t(s.in.positions());
    }

    void forward(const Pass<T>& p) const override {
        const Spec& s = this->spec;
        const int line = s.out.c * LANES;
        const auto [first, last] = p.own(s.out.c);
        std::vector<const T*> from;
        for (int b = 0; b < p.blocks; ++b) {
            const T* x = p.x + (size_t(b) * s.in.size() + first) * LANES;
            T* y = p.y + (size_t(b) * s.out.size() + first) * LANES;
            uint8_t* winner = p.marks + size_t(b) * this->marks + first * LANES;
            for (const auto& window : windows) {
                from.clear();
                for (int position : window) from.push_back(x + position * line);
                p.kernels->window_max(last - first, int(from.size()), from.data(), s.relu, y, winner);
                y += line, winner += line;
            }
        }
    }

    void backward(const Pass<T>& p) const override {
        const Spec& s = this->spec;
        const size_t line = size_t(s.out.c) * LANES;
        const auto [first, last] = p.own(s.out.c);
        if (!p.dx) return;
        if (!p.dx_add && !tiled) clear(p, s.in);
        std::vector<T*> to;
        for (int b = 0; b < p.blocks; ++b) {
            T* dx = p.dx + (size_t(b) * s.in.size() + first) * LANES;
            for (size_t o = 0; o < windows.size(); ++o) {
                const size_t at = (size_t(b) * windows.size() + o) * line + first * LANES;
                to.clear();
                for (int position : windows[o]) to.push_back(dx + position * line);
                p.kernels->window_max_back(last - first, int(to.size()), p.marks + at, p.y + at, s.relu, p.dy + at, to.data(),
                                           p.dx_add || !tiled);
            }
        }
    }

  private:
    std::vector<std::vector<int>> windows;
    bool tiled;  // every input position lies in exactly one window
};

template <class T>
class AveragePool final : public Layer<T> {
  public:
    explicit AveragePool(const Spec& s) : Layer<T>(s), windows(windows_of(s)) {}

    void forward(const Pass<T>& p) const override {
        each(p, p.y, [&](const T* x, T* y, size_t line, const std::vector<int>& window, T share) {
            const auto [from, n] = stretch(p);
            std::fill_n(y + from, n, T(0));
            for (int position : window) p.kernels->fused_add(n, share, x + position * line + from, y + from);
        });
    }

    void backward(const Pass<T>& p) const override {
        if (!p.dx) return;
        if (!p.dx_add) clear(p, this->spec.in);
        each(p, p.dy, [&](const T* x, T* dy, size_t line, const std::vector<int>& window, T share) {
            const auto [from, n] = stretch(p);
            T* dx = p.dx + (x - p.x) + from;
            for (int position : window) p.kernels->fused_add(n, share, dy + from, dx + position * line);
        });
    }

  private:
    std::vector<std::vector<int>> windows;

    // Of a position, where the channels of this thread begin, and their elements.
    std::pair<size_t, ptrdiff_t> stretch(const Pass<T>& p) const {
        const auto [first, last] = p.own(this->spec.out.c);
        return {size_t(first) * LANES, ptrdiff_t(last - first) * LANES};
    }

    template <class F>
    void each(const Pass<T>& p, T* out, F f) const {
        const Spec& s = this->spec;
        const size_t line = size_t(s.out.c) * LANES;
        const T share = T(1) / (s.kernel_h * s.kernel_w);
        for (int b = 0; b < p.blocks; ++b)
            for (size_t o = 0; o < windows.size(); ++o)
                f(p.x + size_t(b) * s.in.size() * LANES, out + (size_t(b) * windows.size() + o) * line, line, windows[o],
                  share);
    }
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_pool(const Spec& spec) {
    if (spec.kind == "max_pool") return std::make_unique<MaxPool<T>>(spec);
    return std::make_unique<AveragePool<T>>(spec);
}
template std::unique_ptr<Layer<float>> make_pool(const Spec&);
template std::unique_ptr<Layer<double>> make_pool(const Spec&);

}  // namespace paraxis
