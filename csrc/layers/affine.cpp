// Linear and convolution are one layer: a linear one is a convolution whose kernel covers the whole image.
//
// Weights lie in panels of PANEL outputs, [panel][(ky, kx, channel)][width], the bias behind them. A sum over a window
// is a batch-reduce over its rows that lie inside the image: padding costs nothing, it is not there.
#include <algorithm>
#include <span>

#include "layer.h"
#include "panels.h"

namespace paraxis {
namespace {

// Consecutive entries of a kernel that meet consecutive features of the input.
struct Run {
    int entry, feature, length;
};
// What a slab of entries adds to an output position; the first adds to the bias, the last ends in the activation.
struct Cell {
    int position;
    bool first, last;
    std::vector<Run> runs;
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

// The part of such a stretch that one owner takes: its first entry, those of the stretch before it, and how many.
struct Part {
    int entry, skipped, length;
};

// Sizes for which weights and samples of a kernel call stay in the first cache.
constexpr int SLAB = 96;    // entries, or outputs
constexpr int WHOLE = 320;  // entries up to which a panel is not cut into slabs
constexpr int CHUNK = 4;    // output positions times blocks of a weight gradient
constexpr int FEW = 8;      // shorter stretches of entries have their gradient summed by dot products

template <class T>
class Affine final : public Layer<T> {
  public:
    explicit Affine(const Spec& s) : Layer<T>(s), entries(s.kernel_h * s.kernel_w * s.in.c) {
        panels = panels_of(s.out.c, entries);
        bias_at = elements_of(panels, entries);
        this->sharing = Sharing::mixing;
        this->matrix = s.same < 0 ? bias_at : 0;  // owners take a matrix in common for what it is first
        this->parameters = (bias_at + (s.bias ? s.out.c : 0) + LANES - 1) / LANES * LANES;
        windows();
        cut();
        inverse();
        uses();
    }

    void forward(const Pass<T>& p) const override {
        const auto [first, last] = p.own(this->spec.out.c);
        for (const Panel& panel : panels) {
            const int from = std::max(first - panel.first, 0), to = std::min(last - panel.first, panel.outputs);
            if (from >= to) continue;
            for (const auto& slab : slabs)
                for (int b = 0; b < p.blocks; ++b)
                    for (const Cell& cell : slab) add_cell(p, panel, b, cell, from, to);
        }
    }

    void open_back(const Pass<T>& p) const override {
        if (!this->spec.relu) return;
        each_stretch(p, this->spec.out, [&](size_t at, ptrdiff_t n) { p.kernels->relu_back(n, p.y + at, p.dy + at, p.dy + at); });
    }

    void backward(const Pass<T>& p) const override {
        const Spec& s = this->spec;
        if (p.slices == 1) open_back(p);
        if (!p.parted || !this->matrix) own_gradient({&p, 1}, p, p.slice, p.slices);
        if (s.bias) bias_gradient(p);
        if (!p.dx) return;
        const auto [first, last] = p.own(s.in.c);
        for (int position = 0; position < s.in.positions(); ++position)
            for (int c = first; c < last; c += PANEL) input_gradient(p, position, c, std::min(PANEL, last - c));
    }

    // Rows of the panels, in tiles, as if the panels stood one above the other.
    std::pair<size_t, size_t> owned(int n, int parts) const override { return {flat(bound(n, parts)), flat(bound(n + 1, parts))}; }

    void own_gradient(const std::vector<Pass<T>>& all, int n) const override {
        own_gradient(all, all[n], n, int(all.size()));
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
    int entries;
    size_t bias_at;
    std::vector<Panel> panels;
    std::vector<std::vector<Run>> window;   // of every output position
    std::vector<std::vector<Cell>> slabs;   // the same, cut by entries
    std::vector<std::vector<Tap>> sources;  // of every input position
    std::vector<Use> used;
    bool twice = false;  // whether entries belong to several uses

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

    void cut() {
        const int size = entries <= WHOLE ? entries : SLAB;
        for (int begin = 0; begin < entries; begin += size) {
            auto& slab = slabs.emplace_back();
            for (int position = 0; position < this->spec.out.positions(); ++position) {
                const auto& runs = window[position];
                Cell cell{position, false, false, {}};
                for (const Run& run : runs) {
                    const int from = std::max(begin, run.entry), to = std::min(begin + size, run.entry + run.length);
                    if (from < to) cell.runs.push_back({from, run.feature + from - run.entry, to - from});
                }
                // A window that lies in the padding altogether has a value, too: its bias.
                cell.first = runs.empty() ? begin == 0 : begin <= runs[0].entry && runs[0].entry < begin + size;
                const int end = runs.empty() ? 0 : runs.back().entry + runs.back().length;
                cell.last = runs.empty() ? begin == 0 : begin < end && end <= begin + size;
                if (!cell.runs.empty() || cell.first) slab.push_back(std::move(cell));
            }
        }
    }

    // Outputs [from, to) of a panel.
    void add_cell(const Pass<T>& p, const Panel& panel, int block, const Cell& cell, int from, int to) const {
        const Spec& s = this->spec;
        const T* x = p.x + size_t(block) * s.in.size() * LANES;
        T* y = p.y + ((size_t(block) * s.out.positions() + cell.position) * s.out.c + panel.first + from) * LANES;
        p.terms->clear();
        for (const Run& run : cell.runs)
            p.terms->push_back({p.w + panel.at + size_t(run.entry) * panel.width + from, x + run.feature * LANES, run.length});
        const T* bias = s.bias && cell.first ? p.w + bias_at + panel.first + from : nullptr;
        p.kernels->rows(to - from, int(p.terms->size()), p.terms->data(), 1, panel.width,
                        {bias, !cell.first, s.relu && cell.last}, y);
    }

    void inverse() {
        const Spec& s = this->spec;
        sources.resize(s.in.positions());
        for (int position = 0; position < s.out.positions(); ++position)
            for (const Run& run : window[position])
                for (int k = 0; k < run.length; k += s.in.c)
                    sources[(run.feature + k) / s.in.c].push_back({run.entry + k, position});
    }

    // Where it is met in full, a row of the kernel is summed as one, for tall tiles. In a padded image some positions meet
    // a part of it: with many channels every kernel place is taken alone then, with few ones only at those positions.
    void uses() {
        const Spec& s = this->spec;
        const int row = s.kernel_w == s.in.w && !s.padding ? entries : s.kernel_w * s.in.c;
        const bool alone = s.padding && s.in.c >= FEW;
        for (int length : alone ? std::vector{s.in.c} : s.padding ? std::vector{row, s.in.c} : std::vector{row})
            for (int entry = 0; entry < entries; entry += length) {
                Use use{entry, length, {}};
                for (int position = 0; position < s.out.positions(); ++position)
                    for (const Run& run : window[position]) {
                        const bool inside = run.entry <= entry && entry + length <= run.entry + run.length;
                        const bool full = covers(position, entry / row * row, row);
                        if (inside && (alone || length == row || !full))
                            use.at.push_back({run.feature + entry - run.entry, position});
                    }
                if (!use.at.empty()) used.push_back(std::move(use));
            }
        twice = !alone && s.padding;
    }

    bool covers(int position, int entry, int length) const {
        for (const Run& run : window[position])
            if (run.entry <= entry && entry + length <= run.entry + run.length) return true;
        return false;
    }

    int bound(int n, int parts) const {
        const int grain = std::min(used[0].length, 16), rows = int(panels.size()) * entries;
        return std::min(rows, (rows / grain * n / parts + (n == parts)) * grain);
    }

    size_t flat(int row) const {
        if (row == int(panels.size()) * entries) return bias_at;
        const Panel& panel = panels[row / entries];
        return panel.at + size_t(row % entries) * panel.width;
    }

    // Block `n` of `parts` of the matrix's gradient, over the samples of all passes, into mine.
    void own_gradient(std::span<const Pass<T>> all, const Pass<T>& mine, int n, int parts) const {
        const int from = bound(n, parts), to = bound(n + 1, parts);
        for (int k = from / entries; k * entries < to; ++k)
            weight_gradient(all, panels[k], std::max(0, from - k * entries), std::min(entries, to - k * entries), mine);
    }

    void bias_gradient(const Pass<T>& p) const {
        const Spec& s = this->spec;
        const auto [first, last] = p.own(s.out.c);
        const int stretch = p.slices == 1 ? s.out.positions() : 1;  // positions whose channels are neighbours
        for (int place = 0; place < p.blocks * s.out.positions(); place += stretch)
            p.kernels->sum_lanes(stretch, last - first, p.dy + (size_t(place) * s.out.c + first) * LANES, p.add || place,
                                 p.dw + bias_at + first);
    }

    // Of entries [from, to), over the samples of all passes, into mine. Entries that no position meets keep the zero they
    // were born with.
    void weight_gradient(std::span<const Pass<T>> all, const Panel& panel, int from, int to, const Pass<T>& mine) const {
        const Spec& s = this->spec;
        const int positions = s.out.positions(), blocks = int(all.size()) * mine.blocks, most = positions * blocks;
        T* dw = mine.dw + panel.at;
        if (twice && !mine.add) std::fill_n(dw + size_t(from) * panel.width, size_t(to - from) * panel.width, T(0));
        if (used[0].length < FEW && most >= 64) {
            for (int b = 0; b < blocks; ++b)
                for (const Use& use : used) sum_dots(all[b / mine.blocks], panel, use, clipped(use, from, to), b, mine);
            if (!mine.add && !twice) clear_margin(dw, panel, from, to);
            return;
        }
        for (int i = 0; i < most; ++i) {
            const T* dy = all[i / (mine.blocks * positions)].dy;
            const int place = i % (mine.blocks * positions);
            mine.kernels->transpose(panel.outputs, panel.width, dy + (size_t(place) * s.out.c + panel.first) * LANES,
                                    mine.scratch + size_t(i) * LANES * panel.width);
        }
        for (int begin = 0; begin < most; begin += CHUNK)
            for (const Use& use : used) sum_outer(all, panel, use, clipped(use, from, to), begin, begin + CHUNK, mine);
    }

    // The part of a stretch of entries that lies in [from, to).
    static Part clipped(const Use& use, int from, int to) {
        const int begin = std::max(use.entry, from), end = std::min(use.entry + use.length, to);
        return {begin, begin - use.entry, std::max(0, end - begin)};
    }

    // The terms of a stretch of entries at (position, block) number begin .. end - 1, blocks fastest.
    void sum_outer(std::span<const Pass<T>> all, const Panel& panel, const Use& use, Part part, int begin, int end,
                   const Pass<T>& mine) const {
        if (!part.length) return;
        const Spec& s = this->spec;
        const int blocks = int(all.size()) * mine.blocks;
        mine.terms->clear();
        const int from = begin / blocks, to = (end - 1) / blocks;
        auto at = std::lower_bound(use.at.begin(), use.at.end(), from,
                                   [](const auto& pair, int position) { return pair.second < position; });
        bool before = at != use.at.begin();
        for (; at != use.at.end() && at->second <= to; ++at) {
            const int number = at->second * blocks, low = std::max(0, begin - number);
            before |= low > 0;
            for (int b = low; b < std::min(blocks, end - number); ++b) {
                const T* x = all[b / mine.blocks].x + size_t(b % mine.blocks) * s.in.size() * LANES;
                const size_t place = size_t(b) * s.out.positions() + at->second;
                mine.terms->push_back({x + (at->first + part.skipped) * LANES,
                                       mine.scratch + place * LANES * panel.width, LANES});
            }
        }
        if (!mine.terms->empty())
            mine.kernels->outer(part.length, panel.width, int(mine.terms->size()), mine.terms->data(),
                                mine.add || twice || before, mine.dw + panel.at + size_t(part.entry) * panel.width);
    }

    void sum_dots(const Pass<T>& p, const Panel& panel, const Use& use, Part part, int block, const Pass<T>& mine) const {
        if (!part.length) return;
        const Spec& s = this->spec;
        const T* x = p.x + size_t(block % p.blocks) * s.in.size() * LANES;
        const T* dy = p.dy + (size_t(block % p.blocks) * s.out.size() + panel.first) * LANES;
        mine.terms->clear();
        for (auto [feature, position] : use.at)
            mine.terms->push_back({x + (feature + part.skipped) * LANES, dy + position * s.out.c * LANES, LANES});
        mine.kernels->dots(part.length, panel.outputs, panel.width, int(mine.terms->size()), mine.terms->data(),
                           mine.add || twice || block, mine.dw + panel.at + size_t(part.entry) * panel.width);
    }

    // Dot products leave what is beyond the outputs alone.
    static void clear_margin(T* dw, const Panel& panel, int from, int to) {
        for (int entry = from; entry < to; ++entry)
            for (int o = panel.outputs; o < panel.width; ++o) dw[size_t(entry) * panel.width + o] = 0;
    }

    // Of a stretch of channels of one position: slab by slab of outputs, whose weights serve all blocks.
    void input_gradient(const Pass<T>& p, int position, int c, int rows) const {
        const Spec& s = this->spec;
        T* dx = p.dx + (position * s.in.c + c) * LANES;
        bool add = p.dx_add;
        std::vector<Term<T>>& terms = *p.terms;
        auto flush = [&](int width) {
            for (int b = 0; b < p.blocks; ++b) {
                p.kernels->rows(rows, int(terms.size()), terms.data(), width, 1, {nullptr, add, false},
                                dx + size_t(b) * s.in.size() * LANES);
                for (Term<T>& term : terms) term.b += size_t(s.out.size()) * LANES;
            }
            terms.clear();
            add = true;
        };
        terms.clear();
        int deep = 0;
        for (const Panel& panel : panels) {
            for (const Tap& tap : sources[position]) {
                terms.push_back({p.w + panel.at + size_t(tap.entry + c) * panel.width,
                                 p.dy + (tap.position * s.out.c + panel.first) * LANES, panel.outputs});
                if ((deep += panel.outputs) >= SLAB) flush(panel.width), deep = 0;
            }
            const bool alike = &panel != &panels.back() && (&panel)[1].width == panel.width;
            if (!alike && !terms.empty()) flush(panel.width), deep = 0;  // terms of a call share the distance of rows
        }
        if (!add) flush(panels[0].width);  // nothing leads here: zero
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
