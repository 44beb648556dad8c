// Which table a machine runs, and the naive tables.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace paraxis {

namespace naively {
#include "loops.h"

#include "naive.h"

template <class T>
constexpr Kernels<T> table = {
    "naive", naive_rows<T>, naive_outer<T>, naive_dots<T>, transpose<T>, gather_bytes<T>, gather<T>, sum_lanes<T>,
    softmax<T>, relu<T>, relu_back<T>, sigmoid<T>, sigmoid_back<T>, tanh<T>, tanh_back<T>, gelu<T>,
    gelu_back<T>, gelu_tanh<T>, gelu_tanh_back<T>, add<T>, add_into<T>, fused_add<T>, sum_parts<T>, sgd<T>, adam<T>,
    square_sum<T>, naive_window_max<T>, naive_window_max_back<T>, dropout<T>,
    moments<T>, normalise<T>, norm_sums<T>, norm_back<T>,
    dropout_tokens<T>, layer_norm<T>, layer_norm_back<T>, naive_causal<T>, naive_causal_again<T>, causal_back<T>,
};
}  // namespace naively

#if defined(__x86_64__)
namespace baseline { extern const Kernels<float> table; }
namespace v3 { extern const Kernels<float> table; }
namespace v4 { extern const Kernels<float> table; }

static bool runs(const char* name) {
    if (!std::strcmp(name, "v4")) return __builtin_cpu_supports("x86-64-v4");
    if (!std::strcmp(name, "v3")) return __builtin_cpu_supports("x86-64-v3");
    return true;
}
static const Kernels<float>* const tables[] = {&v4::table, &v3::table, &baseline::table, &naively::table<float>};
#elif defined(__aarch64__)
namespace neon { extern const Kernels<float> table; }
static bool runs(const char*) { return true; }
static const Kernels<float>* const tables[] = {&neon::table, &naively::table<float>};
#else
static bool runs(const char*) { return true; }
static const Kernels<float>* const tables[] = {&naively::table<float>};
#endif

static std::atomic<const Kernels<float>*> chosen{nullptr};

bool choose(const char* name) {
    for (const Kernels<float>* table : tables)
        if ((!*name || !std::strcmp(table->name, name)) && runs(table->name)) {
            chosen = table;
            return true;
        }
    return false;
}

const Kernels<float>& fastest() {
    if (!chosen) choose("");
    return *chosen.load();
}

const Kernels<double>& twin() { return naively::table<double>; }
const Kernels<float>& naive() { return naively::table<float>; }

}  // namespace paraxis
