// How a matrix of weights lies in memory: panels of PANEL outputs, [panel][entry][width].
#pragma once

#include <algorithm>
#include <vector>

#include "../kernels/kernels.h"

namespace paraxis {

struct Panel {
    int first, outputs, width;
    size_t at;
};

inline std::vector<Panel> panels_of(int outputs, int entries) {
    std::vector<Panel> panels;
    size_t at = 0;
    for (int first = 0; first < outputs; first += PANEL) {
        const int own = std::min(PANEL, outputs - first), width = (own + WIDTH_STEP - 1) / WIDTH_STEP * WIDTH_STEP;
        panels.push_back({first, own, width, at});
        at += size_t(width) * entries;
    }
    return panels;
}

inline size_t elements_of(const std::vector<Panel>& panels, int entries) {
    return panels.empty() ? 0 : panels.back().at + size_t(panels.back().width) * entries;
}

}  // namespace paraxis
