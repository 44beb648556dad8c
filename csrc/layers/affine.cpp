// Linear and convolution are one layer: a linear one is a convolution whose kernel covers the whole image.
//
// Weights lie in panels of PANEL outputs, [panel][(ky, kx, channel)][width], the bias behind them. A sum over a window
// is a batch-reduce over its rows that lie inside the image: padding costs nothing, it is not there.
#include <algorithm>

#include "layer.h"

namespace paraxis {
namespace {

// Consecutive entries of a kernel that meet consecutive features of the input.
struct Run {
    int entry, feature, length;
};
// One entry (kernel place, first channel) with the output position that it leads to.
struct Tap {
    int entry, position;
};
// One entry run of the kernel with every (input feature, output position) at which it is used.
struct Use {
    int entry, length;
    std::vector<std::pair<int, int>> at;
};

constexpr int CHUNK = 16;  // positions whose gradients stay in the second cache while a panel's gradient is summed
constexpr int FEW = 8;     // entry runs shorter than this have their gradient summed by dot products

template <class T>
class Affine final : public Layer<T> {
  public:
    explicit Affine(const Spec& s) : Layer<T>(s), entries(s.kernel_h * s.kernel_w * s.in.c) {
        size_t total = 0;
        for (int first = 0; first < s.out.c; first += PANEL) {
            panels.push_back({first, std::min(PANEL, s.out.c - first), 0, total});
            Panel& panel = panels.back();
            panel.width = (panel.outputs + WIDTH_STEP - 1) / WIDTH_STEP * WIDTH_STEP;
            total += size_t(panel.width) * entries;
        }
        bias_at = total;
        this->parameters = (total + (s.bias ? s.out.c : 0) + LANES - 1) / LANES * LANES;
        windows();
        inverse();
        uses();
    }

    void forward(const Pass<T>& p) const override {
        const Spec& s = this->spec;
        auto& terms = *p.terms;
        for (const Panel& panel : panels)
            for (int b = 0; b < p.blocks; ++b) {
                const T* x = p.x + size_t(b) * s.in.size() * LANES;
                T* y = p.y + (size_t(b) * s.out.size() + panel.first) * LANES;
                for (int position = 0; position < s.out.positions(); ++position, y += s.out.c * LANES) {
                    terms.clear();
                    for (const Run& run : window[position])
                        terms.push_back({p.w + panel.at + size_t(run.entry) * panel.width, x + run.feature * LANES,
                                         run.length});
                    Tile<T> tile{s.bias ? p.w + bias_at + panel.first : nullptr, false, s.relu};
                    p.kernels->rows(panel.outputs, int(terms.size()), terms.data(), 1, panel.width, tile, y);
                }
            }
    }

    void backward(const Pass<T>& p) const override {
        const Spec& s = this->spec;
        if (s.relu) p.kernels->relu_back(ptrdiff_t(p.blocks) * s.out.size() * LANES, p.y, p.dy, p.dy);
        for (const Panel& panel : panels) weight_gradient(p, panel);
        if (s.bias)
            for (int b = 0; b < p.blocks; ++b)
                p.kernels->sum_lanes(s.out.positions(), s.out.c, p.dy + size_t(b) * s.out.size() * LANES, p.add || b,
                                     p.dw + bias_at);
        if (p.dx)
            for (int b = 0; b < p.blocks; ++b) input_gradient(p, b);
    }

    size_t scratch(int blocks) const override {
        return size_t(blocks) * this->spec.out.positions() * LANES * PANEL;
    }

    std::vector<std::pair<std::string, int64_t>> parts() const override {
        std::vector<std::pair<std::string, int64_t>> found{{"weight", int64_t(this->spec.out.c) * entries}};
        if (this->spec.bias) found.push_back({"bias", this->spec.out.c});
        return found;
    }

    void pack(const std::string& part, const T* tensor, T* w, T*) const override {
        each(part, [&](size_t flat, size_t torch) { w[flat] = tensor[torch]; });
    }

    void unpack(const std::string& part, const T* w, const T*, T* tensor) const override {
        each(part, [&](size_t flat, size_t torch) { tensor[torch] = w[flat]; });
    }

  private:
    struct Panel {
        int first, outputs, width;
        size_t at;
    };

    int entries;
    size_t bias_at;
    std::vector<Panel> panels;
    std::vector<std::vector<Run>> window;   // of every output position
    std::vector<std::vector<Tap>> sources;  // of every input position
    std::vector<Use> used;

    void windows() {
        const Spec& s = this->spec;
        for (int oy = 0; oy < s.out.h; ++oy)
            for (int ox = 0; ox < s.out.w; ++ox) {
                auto& runs = window.emplace_back();
                int left = ox * s.stride - s.padding;
                int from = std::max(0, -left), to = std::min(s.kernel_w, s.in.w - left);
                for (int ky = 0; ky < s.kernel_h; ++ky) {
                    int iy = oy * s.stride - s.padding + ky;
                    if (iy < 0 || iy >= s.in.h || from >= to) continue;
                    Run run{(ky * s.kernel_w + from) * s.in.c, (iy * s.in.w + left + from) * s.in.c,
                            (to - from) * s.in.c};
                    if (!runs.empty() && runs.back().entry + runs.back().length == run.entry &&
                        runs.back().feature + runs.back().length == run.feature)
                        runs.back().length += run.length;
                    else
                        runs.push_back(run);
                }
            }
    }

    void inverse() {
        const Spec& s = this->spec;
        sources.resize(s.in.positions());
        for (int position = 0; position < s.out.positions(); ++position)
            for (const Run& run : window[position])
                for (int k = 0; k < run.length; k += s.in.c)
                    sources[(run.feature + k) / s.in.c].push_back({run.entry + k, position});
    }

    // Rows of the kernel that meet the same stretch of input at every output position are summed as one, so that they
    // make tall tiles; where padding cuts some of them short, every kernel place is taken alone.
    void uses() {
        const Spec& s = this->spec;
        int length = s.padding ? s.in.c : s.kernel_w == s.in.w ? entries : s.kernel_w * s.in.c;
        for (int entry = 0; entry < entries; entry += length) {
            Use use{entry, length, {}};
            for (int position = 0; position < s.out.positions(); ++position)
                for (const Run& run : window[position])
                    if (run.entry <= entry && entry + length <= run.entry + run.length)
                        use.at.push_back({run.feature + entry - run.entry, position});
            used.push_back(std::move(use));
        }
    }

    void weight_gradient(const Pass<T>& p, const Panel& panel) const {
        const Spec& s = this->spec;
        const int positions = s.out.positions();
        const bool few = used[0].length < FEW && positions * p.blocks >= 4 * CHUNK;
        if (!few)
            for (int i = 0; i < p.blocks * positions; ++i)
                p.kernels->transpose(panel.outputs, panel.width, p.dy + (size_t(i) * s.out.c + panel.first) * LANES,
                                     p.scratch + size_t(i) * LANES * panel.width);
        auto& terms = *p.terms;
        const int chunk = few ? positions * p.blocks : std::max(CHUNK, p.blocks);
        for (const Use& use : used) {
            T* dw = p.dw + panel.at + size_t(use.entry) * panel.width;
            if (use.at.empty() && !p.add) std::fill(dw, dw + size_t(use.length) * panel.width, T(0));
        }
        for (int begin = 0; begin < positions; begin += std::max(1, chunk / p.blocks)) {
            const int end = begin + std::max(1, chunk / p.blocks);
            for (const Use& use : used) {
                terms.clear();
                bool before = false;  // whether an earlier chunk has begun the sum
                for (auto [feature, position] : use.at) {
                    before |= position < begin;
                    if (position < begin || position >= end) continue;
                    for (int b = 0; b < p.blocks; ++b) {
                        const T* x = p.x + (size_t(b) * s.in.size() + feature) * LANES;
                        const size_t at = size_t(b) * positions + position;
                        terms.push_back({x, few ? p.dy + (at * s.out.c + panel.first) * LANES
                                                : p.scratch + at * LANES * panel.width, LANES});
                    }
                }
                if (terms.empty()) continue;
                T* dw = p.dw + panel.at + size_t(use.entry) * panel.width;
                if (few)
                    p.kernels->dots(use.length, panel.outputs, panel.width, int(terms.size()), terms.data(),
                                    p.add || before, dw);
                else
                    p.kernels->outer(use.length, panel.width, int(terms.size()), terms.data(), p.add || before, dw);
            }
        }
        if (few && !p.add) clear_margin(p, panel);
    }

    // Dot products leave what is beyond the outputs alone.
    void clear_margin(const Pass<T>& p, const Panel& panel) const {
        for (int entry = 0; entry < entries; ++entry)
            for (int o = panel.outputs; o < panel.width; ++o) p.dw[panel.at + size_t(entry) * panel.width + o] = 0;
    }

    void input_gradient(const Pass<T>& p, int block) const {
        const Spec& s = this->spec;
        auto& terms = *p.terms;
        terms.clear();
        const T* dy = p.dy + size_t(block) * s.out.size() * LANES;
        T* dx = p.dx + size_t(block) * s.in.size() * LANES;
        for (int position = 0; position < s.in.positions(); ++position, dx += s.in.c * LANES)
            for (int c = 0; c < s.in.c; c += PANEL)  // a stretch of channels at a time: its weights stay near
            {
                const int rows = std::min(PANEL, s.in.c - c);
                bool add = p.dx_add;
                for (const Panel& panel : panels) {
                    if (terms.size() && panel.width != panels[0].width) {
                        flush(p, rows, panels[0].width, add, dx + c * LANES);
                        add = true;
                    }
                    for (const Tap& tap : sources[position])
                        terms.push_back({p.w + panel.at + size_t(tap.entry + c) * panel.width,
                                         dy + (tap.position * s.out.c + panel.first) * LANES, panel.outputs});
                    if (&panel == &panels.back()) flush(p, rows, panel.width, add, dx + c * LANES);
                }
            }
    }

    // Terms of one kernel call share the distance between rows, which is their panel's width.
    void flush(const Pass<T>& p, int rows, int width, bool add, T* dx) const {
        p.kernels->rows(rows, int(p.terms->size()), p.terms->data(), width, 1, {nullptr, add, false}, dx);
        p.terms->clear();
    }

    template <class F>
    void each(const std::string& part, F f) const {
        const Spec& s = this->spec;
        if (part == "bias") {
            for (int o = 0; o < s.out.c; ++o) f(bias_at + o, o);
            return;
        }
        for (const Panel& panel : panels)
            for (int o = 0; o < panel.outputs; ++o)
                for (int entry = 0; entry < entries; ++entry)
                    f(panel.at + size_t(entry) * panel.width + o,
                      size_t(panel.first + o) * entries + torch_entry(entry));
    }

    // PyTorch has [channel][ky][kx], and behind a flatten [channel][y][x].
    int torch_entry(int entry) const {
        return Shape{this->spec.kernel_h, this->spec.kernel_w, this->spec.in.c}.torch_index(entry);
    }
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_affine(const Spec& spec) {
    return std::make_unique<Affine<T>>(spec);
}
template std::unique_ptr<Layer<float>> make_affine(const Spec&);
template std::unique_ptr<Layer<double>> make_affine(const Spec&);

}  // namespace paraxis
