// A stage's backward in two halves: I makes the gradient of its input, W later those of its matrices. What is cheap beside
// them, gradients of biases, norms and tables, I makes as well.
#include <algorithm>
#include <stdexcept>

#include "stage.h"

namespace paraxis {

template <class T>
void Stage<T>::join(Stage& first) {
    begins = first.gradients.size();
    for (Place& place : places) {
        place.weights += begins;
        place.statistics += first.collected.size();
    }
    first.gradients = Memory<T>(begins + parameters, dry);
    first.collected = Memory<T>(first.collected.size() + statistics, dry);
    gradients = Memory<T>();
    collected = Memory<T>();
    flat = &first;
}

template <class T>
void Stage<T>::part(int most, bool borrowed) {
    const auto reads = [](const auto& layer) { return layer->matrix && layer->spec.x == 0; };
    if (threads > 1) throw std::invalid_argument("threads of a group have no I and W apart");
    halved = true;
    borrows = borrowed && !head && std::any_of(layers.begin(), layers.end(), reads);
    for (const auto& layer : layers)
        if (layer->matrix && layer->spec.y + 1 < int(elements.size())) shelved[layer->spec.y] = true;
    house_gradients(false);
    for (int n = 0; n < most; ++n) add_shelf();
}

template <class T>
void Stage<T>::add_shelf() {
    Shelf& shelf = *shelves.emplace_back(std::make_unique<Shelf>());
    for (size_t id = 0; id < shelved.size(); ++id) shelf.gradients.emplace_back(shelved[id] ? elements[id] : 0, dry);
    if (borrows) shelf.input = Memory<T>(elements[0], dry);
    idle.push_back(&shelf);
}

// The rest of what W needs stays where it is until the next forward of the microbatch.
template <class T>
void Stage<T>::shelve(Slot& slot) {
    if (slot.shelf) return;
    if (idle.empty()) add_shelf();  // a program that forgets a W needs more
    slot.shelf = idle.back();
    idle.pop_back();
}

// An input that lies with the stage in front is overwritten once that has its gradient, which may be before W.
template <class T>
void Stage<T>::keep_input(int m) {
    if (!borrows) return;
    Memory<T>& kept = slots[m].shelf->input;
    std::copy(slots[m].given, slots[m].given + elements[0], kept.data());
    slots[m].given = kept.data();
}

template <class T>
void Stage<T>::weigh(int segment, int m) {
    if (!slots[m].shelf) throw std::logic_error("a gradient of weights is wanted before that of the input");
    for (size_t n = end(segment); n-- > begin(segment);) {
        if (!layers[n]->matrix) continue;
        passes.assign(1, pass(n, m, 0, 0, true));
        passes[0].add = weighed > 0;
        layers[n]->own_gradient(passes, 0);
    }
    if (segment) return;
    ++weighed;
    idle.push_back(slots[m].shelf);
    slots[m].shelf = nullptr;
}

template class Stage<float>;
template class Stage<double>;

}  // namespace paraxis
