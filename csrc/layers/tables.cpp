// Tables whose rows are looked up: a vector for each symbol, a vector for each place within a sample.
#include <algorithm>

#include "layer.h"
#include "panels.h"

namespace paraxis {
namespace {

// Rows lie in panels as the outputs of a linear layer do, so that one may use the same matrix.
template <class T>
class Embedding final : public Layer<T> {
  public:
    explicit Embedding(const Spec& s) : Layer<T>(s), panels(panels_of(s.entries, s.out.c)) {
        if (s.entries < 1 || s.in.size() != 1) throw std::invalid_argument(s.name + ": symbols come one by one");
        this->parameters = (elements_of(panels, s.out.c) + LANES - 1) / LANES * LANES;
    }

    void forward(const Pass<T>& p) const override {
        const int width = this->spec.out.c;
        const auto [first, last] = p.own(width);
        for (int b = 0; b < p.blocks; ++b) {
            T* y = p.y + size_t(b) * width * LANES;
            each_lane(p, b, [&](int lane, size_t at, int step) {
                for (int c = first; c < last; ++c) y[c * LANES + lane] = p.w[at + size_t(c) * step];
            });
            for (int lane = p.valid(b); lane < LANES; ++lane)
                for (int c = first; c < last; ++c) y[c * LANES + lane] = 0;
        }
    }

    void backward(const Pass<T>& p) const override {
        const int width = this->spec.out.c;
        const auto [first, last] = p.own(width);
        for (const Panel& panel : panels)
            if (!p.add) std::fill(p.dw + panel.at + size_t(first) * panel.width, p.dw + panel.at + size_t(last) * panel.width, T(0));
        for (int b = 0; b < p.blocks; ++b) {
            const T* dy = p.dy + size_t(b) * width * LANES;
            each_lane(p, b, [&](int lane, size_t at, int step) {
                for (int c = first; c < last; ++c) p.dw[at + size_t(c) * step] += dy[c * LANES + lane];
            });
        }
    }

    std::vector<std::pair<std::string, int64_t>> parts() const override {
        return {{"weight", int64_t(this->spec.entries) * this->spec.out.c}};
    }

    void pack(const std::string&, const T* tensor, T* w, T*) const override {
        each_row([&](size_t flat, size_t torch) { w[flat] = tensor[torch]; });
    }

    void unpack(const std::string&, const T* w, const T*, T* tensor) const override {
        each_row([&](size_t flat, size_t torch) { tensor[torch] = w[flat]; });
    }

  private:
    std::vector<Panel> panels;

    // f(lane, start of its symbol's row, distance of the row's elements)
    template <class F>
    void each_lane(const Pass<T>& p, int block, F f) const {
        for (int lane = 0; lane < p.valid(block); ++lane) {
            const int symbol = int(p.x[size_t(block) * LANES + lane]);
            const Panel& panel = panels[symbol / PANEL];
            f(lane, panel.at + symbol % PANEL, panel.width);
        }
    }

    template <class F>
    void each_row(F f) const {
        const int width = this->spec.out.c;
        for (const Panel& panel : panels)
            for (int o = 0; o < panel.outputs; ++o)
                for (int c = 0; c < width; ++c)
                    f(panel.at + size_t(c) * panel.width + o, size_t(panel.first + o) * width + c);
    }
};

// y = x + the row of its place. Rows lie in lanes as activations do: [block of places][feature][LANES].
template <class T>
class Position final : public Layer<T> {
  public:
    explicit Position(const Spec& s) : Layer<T>(s) {
        this->parameters = size_t(blocks_of(s.entries)) * s.out.c * LANES;
    }

    void forward(const Pass<T>& p) const override {
        each_place(p, [&](size_t at, size_t row, ptrdiff_t n) { p.kernels->add(n, p.x + at, p.w + row, p.y + at); });
    }

    void backward(const Pass<T>& p) const override {
        Pass<T> rows = p;
        rows.blocks = blocks_of(this->spec.entries);
        if (!p.add) each_stretch(rows, this->spec.out, [&](size_t at, ptrdiff_t n) { std::fill_n(p.dw + at, n, T(0)); });
        each_place(p, [&](size_t at, size_t row, ptrdiff_t n) {
            p.kernels->add_into(n, p.dy + at, p.dw + row);
            if (p.dx && p.dx_add)
                p.kernels->add_into(n, p.dy + at, p.dx + at);
            else if (p.dx)
                std::copy(p.dy + at, p.dy + at + n, p.dx + at);
        });
    }

    std::vector<std::pair<std::string, int64_t>> parts() const override {
        return {{"weight", int64_t(this->spec.entries) * this->spec.out.c}};
    }

    void pack(const std::string&, const T* tensor, T* w, T*) const override {
        each_row([&](size_t flat, size_t torch) { w[flat] = tensor[torch]; });
    }

    void unpack(const std::string&, const T* w, const T*, T* tensor) const override {
        each_row([&](size_t flat, size_t torch) { tensor[torch] = w[flat]; });
    }

  private:
    // f(elements of activations from, of the table from, how many) for a sample, or for this thread's channels of a block.
    template <class F>
    void each_place(const Pass<T>& p, F f) const {
        const int width = this->spec.out.c, step = p.slices == 1 ? p.rise() : 1;
        const auto [first, last] = p.own(width);
        for (int b = 0; b < p.blocks; b += step)
            f((size_t(b) * width + first) * LANES, (size_t(b % p.rise()) * width + first) * LANES,
              ptrdiff_t(step * (last - first)) * LANES);
    }

    template <class F>
    void each_row(F f) const {
        const int width = this->spec.out.c;
        for (int place = 0; place < this->spec.entries; ++place)
            for (int c = 0; c < width; ++c)
                f((size_t(place / LANES) * width + c) * LANES + place % LANES, size_t(place) * width + c);
    }
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_table(const Spec& spec) {
    if (spec.kind == "embedding") return std::make_unique<Embedding<T>>(spec);
    return std::make_unique<Position<T>>(spec);
}
template std::unique_ptr<Layer<float>> make_table(const Spec&);
template std::unique_ptr<Layer<double>> make_table(const Spec&);

}  // namespace paraxis
