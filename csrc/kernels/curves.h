// Exponentials of vectors and what is made of them. Included behind fast.h, whose vectors these are.

// x = n ln 2 + r with |r| <= ln 2 / 2, and Taylor's series of exp(r): to two units in the last place. Never infinite.
static inline Vec exp_fast(Vec x) {
    x = x < -87.f ? broadcast(-87.f) : x;
    x = x > 88.f ? broadcast(88.f) : x;
    const Vec n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // 1.5 * 2^23 leaves no room for a fraction
    const Vec r = (x - n * 0.693145751953125f) - n * 1.42860682e-6f;
    Vec p = broadcast(1.f / 5040);
    constexpr float terms[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
#pragma GCC unroll 8
    for (float term : terms) p = p * r + term;
    return p * (Vec)((__builtin_convertvector(n, Int) + 127) << 23);
}

static void sigmoid_fast(ptrdiff_t n, const float* x, float* y) {
    for (ptrdiff_t i = 0; i < n; i += W) store(y + i, 1.f / (1.f + exp_fast(-load(x + i))));
}

static double softmax_fast(int classes, int valid, const int64_t* target, float share, float* y, int* hits) {
    float own[LANES], top[LANES], total[LANES];
    int best[LANES];
    for (int lane = 0; lane < valid; ++lane) own[lane] = y[target[lane] * LANES + lane];
    for (int v = 0; v < V; ++v) {
        Vec most = load(y + v * W), sum{};
        Int who{};
        for (int c = 1; c < classes; ++c) {
            const Vec other = load(y + c * LANES + v * W);
            const Int more = other > most;
            most = more ? other : most;
            who = more ? Int{} + c : who;
        }
        for (int c = 0; c < classes; ++c) {
            const Vec e = exp_fast(load(y + c * LANES + v * W) - most);
            store(y + c * LANES + v * W, e);
            sum += e;
        }
        const Vec part = share / sum;
        for (int c = 0; c < classes; ++c) store(y + c * LANES + v * W, load(y + c * LANES + v * W) * part);
        store(top + v * W, most), store(total + v * W, sum);
        for (int i = 0; i < W; ++i) best[v * W + i] = who[i];
    }
    double loss = 0;
    for (int lane = 0; lane < valid; ++lane) {
        loss += double(log_(total[lane]) + (top[lane] - own[lane]));
        *hits += best[lane] == target[lane];
        y[target[lane] * LANES + lane] -= share;
    }
    for (int lane = valid; lane < LANES; ++lane)
        for (int c = 0; c < classes; ++c) y[c * LANES + lane] = 0;
    return loss;
}

static inline Vec absolute(Vec x) { return x < 0 ? -x : x; }

// What x's normal distribution has below it, and its density: erf after Abramowitz and Stegun 1964, 7.1.26, wrong by at
// most 1.5e-7, which shares its exponential with the density.
static inline Vec below(Vec x, Vec* density) {
    const Vec z = absolute(x) * 0.70710678f, t = 1.f / (1.f + 0.3275911f * z), bell = exp_fast(-z * z);
    const Vec tail = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const Vec half = 0.5f * tail * bell;
    *density = bell * 0.39894228f;
    return x < 0 ? half : 1.f - half;
}

static void gelu_fast(ptrdiff_t n, const float* x, float* y) {
    Vec density;
    for (ptrdiff_t i = 0; i < n; i += W) store(y + i, load(x + i) * below(load(x + i), &density));
}

static void gelu_back_fast(ptrdiff_t n, const float* x, const float* dy, float* dx, bool add) {
    for (ptrdiff_t i = 0; i < n; i += W) {
        Vec own = load(x + i), density, share = below(own, &density), g = load(dy + i) * (share + own * density);
        store(dx + i, add ? load(dx + i) + g : g);
    }
}

// 0.5 (1 + tanh u) is the logistic function of 2 u.
static inline Vec logistic_of(Vec x) {
    return 1.f / (1.f + exp_fast(float(-2 * STEEP) * (x + float(BENT) * x * x * x)));
}

static void gelu_tanh_fast(ptrdiff_t n, const float* x, float* y) {
    for (ptrdiff_t i = 0; i < n; i += W) store(y + i, load(x + i) * logistic_of(load(x + i)));
}

static void gelu_tanh_back_fast(ptrdiff_t n, const float* x, const float* dy, float* dx, bool add) {
    for (ptrdiff_t i = 0; i < n; i += W) {
        const Vec own = load(x + i), share = logistic_of(own);
        const Vec slope = float(2 * STEEP) + float(6 * STEEP * BENT) * own * own;
        const Vec g = load(dy + i) * share * (1.f + own * (1.f - share) * slope);
        store(dx + i, add ? load(dx + i) + g : g);
    }
}

// Numbers of the lanes of a vector that begins at `first`.
static inline Int lanes_from(int first) {
    Int found;
    for (int i = 0; i < W; ++i) found[i] = first + i;
    return found;
}

static void causal_fast(int keys, float scale, float* y, float* level) {
    for (int v = 0; v < V; ++v) {
        const Int seen = lanes_from(keys - LANES + v * W);  // the last key of every lane
        Vec top = load(y + v * W), sum{};
        for (int k = 1; k < keys; ++k) {
            const Vec other = load(y + k * LANES + v * W);
            top = ((other > top) & (seen >= k)) ? other : top;
        }
        for (int k = 0; k < keys; ++k) {
            const Vec e = exp_fast(scale * (load(y + k * LANES + v * W) - top));
            const Vec own = seen >= k ? e : Vec{};
            store(y + k * LANES + v * W, own);
            sum += own;
        }
        const Vec part = 1.f / sum;
        for (int k = 0; k < keys; ++k) store(y + k * LANES + v * W, load(y + k * LANES + v * W) * part);
        for (int i = 0; i < W; ++i) level[v * W + i] = scale * top[i] + log_(sum[i]);
    }
}

static void causal_again_fast(int keys, float scale, const float* level, float* y) {
    for (int v = 0; v < V; ++v) {
        const Int seen = lanes_from(keys - LANES + v * W);
        const Vec own = load(level + v * W);
        for (int k = 0; k < keys; ++k) {
            const Vec e = exp_fast(scale * load(y + k * LANES + v * W) - own);
            store(y + k * LANES + v * W, seen >= k ? e : Vec{});
        }
    }
}
