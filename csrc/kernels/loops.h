// Loops that the compiler vectorises by itself, for any T. Included inside the namespace of each instruction set, so
// that no linker may merge code of one with that of another; for the same reason nothing of std is a template here.

static inline float exp_(float x) { return __builtin_expf(x); }
static inline double exp_(double x) { return __builtin_exp(x); }
static inline float log_(float x) { return __builtin_logf(x); }
static inline double log_(double x) { return __builtin_log(x); }
static inline float erf_(float x) { return __builtin_erff(x); }
static inline double erf_(double x) { return __builtin_erf(x); }
static inline float sqrt_(float x) { return __builtin_sqrtf(x); }
static inline double sqrt_(double x) { return __builtin_sqrt(x); }
static inline float tanh_(float x) { return __builtin_tanhf(x); }
static inline double tanh_(double x) { return __builtin_tanh(x); }

template <class T>
static void transpose(int outputs, int width, const T* x, T* y) {
    for (int lane = 0; lane < LANES; ++lane) {
        for (int o = 0; o < outputs; ++o) y[lane * width + o] = x[o * LANES + lane];
        for (int o = outputs; o < width; ++o) y[lane * width + o] = 0;
    }
}

template <class T>
static void gather_bytes(int features, int valid, const uint8_t* x, const int64_t* index, T scale, T* y) {
    const uint8_t* row[LANES];
    for (int lane = 0; lane < LANES; ++lane) row[lane] = x + index[lane < valid ? lane : 0] * features;
    for (int f = 0; f < features; ++f, y += LANES) {
        for (int lane = 0; lane < LANES; ++lane) y[lane] = scale * T(row[lane][f]);
        for (int lane = valid; lane < LANES; ++lane) y[lane] = 0;
    }
}

template <class T>
static void gather(int features, int valid, const T* x, const int64_t* index, T* y) {
    for (int f = 0; f < features; ++f, y += LANES) {
        for (int lane = 0; lane < valid; ++lane) y[lane] = x[index[lane] * features + f];
        for (int lane = valid; lane < LANES; ++lane) y[lane] = 0;
    }
}

template <class T>
static void sum_lanes(int positions, int features, const T* x, bool add, T* sums) {
    for (int f = 0; f < features; ++f) {
        T lanes[LANES] = {};
        for (int p = 0; p < positions; ++p)
            for (int lane = 0; lane < LANES; ++lane) lanes[lane] += x[(ptrdiff_t(p) * features + f) * LANES + lane];
        T total = 0;
        for (int lane = 0; lane < LANES; ++lane) total += lanes[lane];
        sums[f] = add ? sums[f] + total : total;
    }
}

template <class T>
static double softmax(int classes, int valid, const int64_t* target, T share, T* y, int* hits) {
    double loss = 0;
    for (int lane = 0; lane < LANES; ++lane) {
        T top = y[lane], sum = 0;
        for (int c = 1; c < classes; ++c) top = y[c * LANES + lane] > top ? y[c * LANES + lane] : top;
        if (lane >= valid) {
            for (int c = 0; c < classes; ++c) y[c * LANES + lane] = 0;
            continue;
        }
        T& own = y[target[lane] * LANES + lane];
        int best = 0;
        while (best + 1 < classes && y[best * LANES + lane] != top) ++best;
        *hits += best == target[lane];
        const T below = top - own;
        for (int c = 0; c < classes; ++c) sum += y[c * LANES + lane] = exp_(y[c * LANES + lane] - top);
        loss += double(log_(sum) + below);
        for (int c = 0; c < classes; ++c) y[c * LANES + lane] = y[c * LANES + lane] / sum * share;
        own -= share;
    }
    return loss;
}

template <class T>
static void relu(ptrdiff_t n, const T* x, T* y) {
    for (ptrdiff_t i = 0; i < n; ++i) y[i] = x[i] < 0 ? T(0) : x[i];
}

template <class T>
static void relu_back(ptrdiff_t n, const T* y, const T* dy, T* dx) {
    for (ptrdiff_t i = 0; i < n; ++i) dx[i] = y[i] > 0 ? dy[i] : T(0);
}

template <class T>
static void put(T& to, T value, bool add) {
    to = add ? to + value : value;
}

template <class T>
static void sigmoid(ptrdiff_t n, const T* x, T* y) {
    for (ptrdiff_t i = 0; i < n; ++i) y[i] = T(1) / (T(1) + exp_(-x[i]));
}

template <class T>
static void sigmoid_back(ptrdiff_t n, const T* y, const T* dy, T* dx, bool add) {
    for (ptrdiff_t i = 0; i < n; ++i) put(dx[i], dy[i] * y[i] * (1 - y[i]), add);
}

template <class T>
static void tanh(ptrdiff_t n, const T* x, T* y) {
    for (ptrdiff_t i = 0; i < n; ++i) y[i] = tanh_(x[i]);
}

template <class T>
static void tanh_back(ptrdiff_t n, const T* y, const T* dy, T* dx, bool add) {
    for (ptrdiff_t i = 0; i < n; ++i) put(dx[i], dy[i] * (1 - y[i] * y[i]), add);
}

template <class T>
static void gelu(ptrdiff_t n, const T* x, T* y) {
    for (ptrdiff_t i = 0; i < n; ++i) y[i] = T(0.5) * x[i] * (1 + erf_(x[i] * T(0.70710678118654752)));
}

template <class T>
static void gelu_back(ptrdiff_t n, const T* x, const T* dy, T* dx, bool add) {
    for (ptrdiff_t i = 0; i < n; ++i) {
        T below = T(0.5) * (1 + erf_(x[i] * T(0.70710678118654752)));
        T density = exp_(T(-0.5) * x[i] * x[i]) * T(0.39894228040143268);
        put(dx[i], dy[i] * (below + x[i] * density), add);
    }
}

constexpr double STEEP = 0.79788456080286536, BENT = 0.044715;  // sqrt(2 / pi); Hendrycks and Gimpel 2016

template <class T>
static void gelu_tanh(ptrdiff_t n, const T* x, T* y) {
    for (ptrdiff_t i = 0; i < n; ++i)
        y[i] = T(0.5) * x[i] * (1 + tanh_(T(STEEP) * (x[i] + T(BENT) * x[i] * x[i] * x[i])));
}

template <class T>
static void gelu_tanh_back(ptrdiff_t n, const T* x, const T* dy, T* dx, bool add) {
    for (ptrdiff_t i = 0; i < n; ++i) {
        const T bend = tanh_(T(STEEP) * (x[i] + T(BENT) * x[i] * x[i] * x[i]));
        const T slope = T(STEEP) * (1 + 3 * T(BENT) * x[i] * x[i]);
        put(dx[i], dy[i] * T(0.5) * (1 + bend + x[i] * (1 - bend * bend) * slope), add);
    }
}

template <class T>
static void add(ptrdiff_t n, const T* a, const T* b, T* c) {
    for (ptrdiff_t i = 0; i < n; ++i) c[i] = a[i] + b[i];
}

template <class T>
static void add_into(ptrdiff_t n, const T* a, T* c) {
    for (ptrdiff_t i = 0; i < n; ++i) c[i] += a[i];
}

template <class T>
static void fused_add(ptrdiff_t n, T scale, const T* a, T* c) {
    for (ptrdiff_t i = 0; i < n; ++i) c[i] += scale * a[i];
}

template <class T>
static void sum_parts(ptrdiff_t n, int parts, const T* const* part, T* out) {
    constexpr ptrdiff_t STRIP = 1024;  // of each part in turn, so that the sum stays in the first cache
    for (ptrdiff_t begin = 0; begin < n; begin += STRIP) {
        ptrdiff_t end = begin + STRIP < n ? begin + STRIP : n;
        T sum[STRIP];
        for (ptrdiff_t i = begin; i < end; ++i) sum[i - begin] = part[0][i];
        for (int p = 1; p < parts; ++p)
            for (ptrdiff_t i = begin; i < end; ++i) sum[i - begin] += part[p][i];
        for (ptrdiff_t i = begin; i < end; ++i) out[i] = sum[i - begin];
    }
}

template <class T>
static void sgd(ptrdiff_t n, Sgd<T> rule, T* w, const T* g, T* velocity) {
    if (rule.momentum == 0) {
        for (ptrdiff_t i = 0; i < n; ++i) w[i] -= rule.rate * (rule.scale * g[i] + rule.decay * w[i]);
        return;
    }
    T keep = rule.first ? T(0) : rule.momentum, ahead = rule.nesterov ? rule.momentum : T(0);
    T own = rule.nesterov ? T(1) : T(0), of_velocity = rule.nesterov ? ahead : T(1);
    for (ptrdiff_t i = 0; i < n; ++i) {
        T gradient = rule.scale * g[i] + rule.decay * w[i];
        T moved = keep * velocity[i] + gradient;
        velocity[i] = moved;
        w[i] -= rule.rate * (own * gradient + of_velocity * moved);
    }
}

template <class T>
static void adam(ptrdiff_t n, Adam<T> rule, T* w, const T* g, T* first, T* second) {
    T coupled = rule.decoupled ? T(0) : rule.decay, shrink = rule.decoupled ? 1 - rule.rate * rule.decay : T(1);
    T rate = rule.rate / rule.correction1, root = 1 / sqrt_(rule.correction2);
    for (ptrdiff_t i = 0; i < n; ++i) {
        T gradient = rule.scale * g[i] + coupled * w[i];
        T m = first[i] + (gradient - first[i]) * rule.rest1;
        T v = rule.beta2 * second[i] + rule.rest2 * gradient * gradient;
        first[i] = m;
        second[i] = v;
        w[i] = shrink * w[i] - rate * m / (sqrt_(v) * root + rule.epsilon);
    }
}

template <class T>
static double square_sum(ptrdiff_t n, const T* x) {
    double total = 0;
    for (ptrdiff_t i = 0; i < n; ++i) total += double(x[i]) * double(x[i]);
    return total;
}

static inline uint32_t mix32(uint32_t x) {  // lowbias32 (Wellons 2018)
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

template <class T>
static void dropout(int features, const uint32_t* column, const uint32_t* sample, uint32_t threshold, T scale,
                    const T* x, T* y, bool add) {
    for (int f = 0; f < features; ++f, x += LANES, y += LANES) {
        uint32_t half = mix32((column[f] >> 1) * 0x9E3779B9u + 1), shift = (column[f] & 1) * 16;
        for (int lane = 0; lane < LANES; ++lane) {
            bool kept = ((mix32(sample[lane] + half) >> shift) & 0xFFFF) >= threshold;
            put(y[lane], kept ? x[lane] * scale : T(0), add);
        }
    }
}

template <class T>
static void dropout_tokens(int features, uint32_t first, uint32_t stride, uint32_t key, uint32_t threshold, T scale,
                           const T* x, T* y, bool add) {
    for (int f = 0; f < features; ++f, x += LANES, y += LANES)
        for (int lane = 0; lane < LANES; ++lane) {
            const uint32_t element = first + uint32_t(lane) * stride + uint32_t(f);
            const uint32_t half = mix32((element >> 1) * 0x9E3779B9u + 1), shift = (element & 1) * 16;
            put(y[lane], ((mix32(key + half) >> shift) & 0xFFFF) >= threshold ? x[lane] * scale : T(0), add);
        }
}

// A feature at a time, so that its sums stay in registers.
template <class T>
static void moments(int positions, int features, const T* x, const T* pivot, const T* mask, T* sum, T* square) {
    for (int f = 0; f < features; ++f) {
        T s[LANES] = {}, q[LANES] = {}, centre = pivot[f];
        for (int p = 0; p < positions; ++p) {
            const T* v = x + (ptrdiff_t(p) * features + f) * LANES;
            for (int lane = 0; lane < LANES; ++lane) {
                T d = (v[lane] - centre) * mask[lane];
                s[lane] += d;
                q[lane] += d * d;
            }
        }
        for (int lane = 0; lane < LANES; ++lane) sum[f * LANES + lane] += s[lane], square[f * LANES + lane] += q[lane];
    }
}

template <class T>
static void normalise(int positions, int features, const T* scale, const T* shift, const T* skip, bool relu, const T* x,
                      T* y) {
    for (int p = 0; p < positions; ++p)
        for (int f = 0; f < features; ++f, x += LANES, y += LANES) {
            T a = scale[f], b = shift[f];
            if (skip) {
                for (int lane = 0; lane < LANES; ++lane) y[lane] = a * x[lane] + b + skip[lane];
                skip += LANES;
            } else {
                for (int lane = 0; lane < LANES; ++lane) y[lane] = a * x[lane] + b;
            }
            if (relu)
                for (int lane = 0; lane < LANES; ++lane) y[lane] = y[lane] < 0 ? T(0) : y[lane];
        }
}

template <class T>
static void norm_sums(int positions, int features, const T* x, const T* dy, const T* mean, T* sum, T* product) {
    for (int f = 0; f < features; ++f) {
        T s[LANES] = {}, q[LANES] = {}, centre = mean[f];
        for (int p = 0; p < positions; ++p) {
            const ptrdiff_t at = (ptrdiff_t(p) * features + f) * LANES;
            for (int lane = 0; lane < LANES; ++lane) {
                s[lane] += dy[at + lane];
                q[lane] += dy[at + lane] * (x[at + lane] - centre);
            }
        }
        for (int lane = 0; lane < LANES; ++lane) sum[f * LANES + lane] += s[lane], product[f * LANES + lane] += q[lane];
    }
}

template <class T>
static void norm_back(int positions, int features, const T* factor, const T* slope, const T* shift, const T* mask,
                      const T* x, const T* dy, T* dx, bool add) {
    for (int p = 0; p < positions; ++p)
        for (int f = 0; f < features; ++f, x += LANES, dy += LANES, dx += LANES)
            for (int lane = 0; lane < LANES; ++lane)
                put(dx[lane], (factor[f] * dy[lane] + slope[f] * x[lane] + shift[f]) * mask[lane], add);
}

template <class T>
static void layer_norm(int features, T epsilon, const T* w, const T* bias, const T* x, T* y, T* mean, T* inverse) {
    T sum[LANES] = {}, square[LANES] = {};
    for (int f = 0; f < features; ++f)
        for (int lane = 0; lane < LANES; ++lane) sum[lane] += x[f * LANES + lane];
    for (int lane = 0; lane < LANES; ++lane) mean[lane] = sum[lane] / features;
    for (int f = 0; f < features; ++f)
        for (int lane = 0; lane < LANES; ++lane) {
            const T d = x[f * LANES + lane] - mean[lane];
            square[lane] += d * d;
        }
    for (int lane = 0; lane < LANES; ++lane) inverse[lane] = 1 / sqrt_(square[lane] / features + epsilon);
    for (int f = 0; f < features; ++f)
        for (int lane = 0; lane < LANES; ++lane)
            y[f * LANES + lane] = (x[f * LANES + lane] - mean[lane]) * inverse[lane] * w[f] + bias[f];
}

template <class T>
static void layer_norm_back(int features, const T* w, const T* x, const T* dy, const T* mean, const T* inverse, T* sums,
                            T* products, T* dx, bool add) {
    T sum[LANES] = {}, product[LANES] = {};
    for (int f = 0; f < features; ++f)
        for (int lane = 0; lane < LANES; ++lane) {
            const int i = f * LANES + lane;
            const T unit = (x[i] - mean[lane]) * inverse[lane], own = dy[i] * unit;
            sums[i] += dy[i];
            products[i] += own;
            sum[lane] += w[f] * dy[i];
            product[lane] += w[f] * own;
        }
    if (!dx) return;
    for (int lane = 0; lane < LANES; ++lane) sum[lane] /= features, product[lane] /= features;
    for (int f = 0; f < features; ++f)
        for (int lane = 0; lane < LANES; ++lane) {
            const int i = f * LANES + lane;
            const T unit = (x[i] - mean[lane]) * inverse[lane];
            put(dx[i], (w[f] * dy[i] - sum[lane] - unit * product[lane]) * inverse[lane], add);
        }
}

template <class T>
static void causal_back(int keys, T scale, const T* y, T* dy) {
    T sum[LANES] = {};
    for (int k = 0; k < keys; ++k)
        for (int lane = 0; lane < LANES; ++lane) sum[lane] += y[k * LANES + lane] * dy[k * LANES + lane];
    for (int k = 0; k < keys; ++k)
        for (int lane = 0; lane < LANES; ++lane) {
            const int i = k * LANES + lane;
            dy[i] = scale * y[i] * (dy[i] - sum[lane]);
        }
}
