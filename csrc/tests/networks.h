// The networks that the runtime's test trains: one of images, one of tokens, each in one, two or four stages.
#pragma once

#include <utility>
#include <vector>

#include "../layers/layer.h"

namespace {

using namespace paraxis;

constexpr int SIDE = 8, CLASSES = 3, SYMBOLS = 29, TOKENS = 21;

struct Network {
    std::vector<Spec> front, back;  // a stage has its own activations, numbered from 0
    int tokens = 0;
    int seams[2] = {1, 2};  // where these are cut once more
};

Spec layer(const char* kind, const char* name, Shape in, Shape out) {
    Spec spec;
    spec.kind = kind, spec.name = name, spec.in = in, spec.out = out;
    return spec;
}

Spec convolution(const char* name, Shape in, Shape out, int kernel, int stride, int padding) {
    Spec spec = layer("affine", name, in, out);
    spec.kernel_h = spec.kernel_w = kernel, spec.stride = stride, spec.padding = padding;
    return spec;
}

// conv bn relu pool | conv dropout linear
Network images() {
    const Shape image{SIDE, SIDE, 2}, wide{SIDE, SIDE, 5}, half{SIDE / 2, SIDE / 2, 5}, small{2, 2, 7}, scores{1, 1, CLASSES};
    std::vector<Spec> front{convolution("conv", image, wide, 3, 1, 1), layer("batch_norm", "norm", wide, wide),
                            layer("max_pool", "pool", wide, half)};
    front[1].relu = true;
    front[2].kernel_h = front[2].kernel_w = front[2].stride = 2;
    std::vector<Spec> back{convolution("second", half, small, 3, 2, 1), layer("dropout", "drop", small, small),
                           convolution("linear", small, scores, 2, 1, 0)};
    back[0].relu = true;
    back[1].p = 0.25, back[1].key = 7;
    return {front, back};
}

// symbols places norm qkv attention dropout sum | norm linear gelu linear gelu sum symbols
Network tokens() {
    const Shape one{1, 1, 1}, row{1, 1, 6}, three{1, 1, 18}, wide{1, 1, 11};
    std::vector<Spec> front{layer("embedding", "words", one, row),  layer("position", "places", row, row),
                            layer("layer_norm", "norm", row, row),  convolution("query", row, three, 1, 1, 0),
                            layer("attention", "mix", three, row),  layer("dropout", "drop", row, row),
                            layer("residual", "sum", row, row)};
    front[0].entries = SYMBOLS, front[1].entries = TOKENS + 2;
    front[4].entries = TOKENS, front[4].heads = 2, front[4].p = 0.2, front[4].key = 3;
    front[5].p = 0.25, front[5].key = 7;
    front[6].skip = 2;
    std::vector<Spec> back{layer("layer_norm", "after", row, row), convolution("up", row, wide, 1, 1, 0),
                           layer("gelu_tanh", "bend", wide, wide), convolution("down", wide, row, 1, 1, 0),
                           layer("gelu", "curve", row, row),       layer("residual", "total", row, row),
                           convolution("words again", row, {1, 1, SYMBOLS}, 1, 1, 0)};
    back[5].skip = 0;
    back[6].bias = false;
    front[0].tie = back[6].tie = 0;
    return {front, back, TOKENS, {2, 6}};
}

std::vector<Spec> numbered(std::vector<Spec> specs) {
    for (size_t n = 0; n < specs.size(); ++n) specs[n].x = int(n), specs[n].y = int(n) + 1;
    return specs;
}

// Both in one stage, where the last layer uses the table that it has a copy of otherwise.
std::vector<Spec> joined(const Network& network) {
    std::vector<Spec> specs = network.front;
    for (Spec spec : network.back) {
        if (spec.skip >= 0) spec.skip += int(network.front.size());
        if (spec.tie >= 0) spec.same = spec.tie;
        specs.push_back(spec);
    }
    for (Spec& spec : specs) spec.tie = -1;
    return numbered(specs);
}

std::vector<std::vector<Spec>> staged(const Network& network, int stages) {
    if (stages == 1) return {joined(network)};
    if (stages == 2) return {numbered(network.front), numbered(network.back)};
    std::vector<std::vector<Spec>> quarters;
    for (const auto& [half, seam] : {std::pair{network.front, network.seams[0]}, {network.back, network.seams[1]}}) {
        quarters.push_back(numbered({half.begin(), half.begin() + seam}));
        std::vector<Spec> rest(half.begin() + seam, half.end());
        for (Spec& spec : rest)
            if (spec.skip >= 0) spec.skip -= seam;
        quarters.push_back(numbered(rest));
    }
    return quarters;
}

}  // namespace
