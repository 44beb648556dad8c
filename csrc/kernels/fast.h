// The fast kernels, in vector extensions: the register tiles of one instruction set. Included inside its namespace,
// after BYTES (of a vector register) and TILE_ROWS (accumulators: TILE_ROWS x LANES / vector) are defined.

using Vec = float __attribute__((vector_size(BYTES), aligned(4), may_alias));
constexpr int W = BYTES / 4;
constexpr int V = LANES / W;

using Int = int __attribute__((vector_size(BYTES), aligned(4), may_alias));

static inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
static inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
static inline Vec broadcast(float x) { return x - Vec{}; }

// R rows of `rows`. ALONG: the rows of a are neighbours (row == 1), otherwise its columns are (col == 1).
template <int R, bool ALONG>
static void tile_rows(int terms, const Term<float>* term, ptrdiff_t first, ptrdiff_t step, Tile<float> tile, float* c) {
    Vec sum[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            sum[r][v] = tile.add ? load(c + r * LANES + v * W) : Vec{};
            if (tile.bias) sum[r][v] += tile.bias[r];
        }
    for (int t = 0; t < terms; ++t) {
        const float* b = term[t].b;
        const float* a = term[t].a + first;
        const float* last = b + ptrdiff_t(term[t].k) * LANES;
        for (; b != last; b += LANES) {
            Vec x[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) x[v] = load(b + v * W);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                Vec w = broadcast(a[ALONG ? r : r * step]);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) sum[r][v] += w * x[v];
            }
            a += ALONG ? step : 1;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            Vec y = sum[r][v];
            if (tile.relu) y = y < 0 ? Vec{} : y;  // a NaN stays one
            store(c + r * LANES + v * W, y);
        }
}

using TileRows = void (*)(int, const Term<float>*, ptrdiff_t, ptrdiff_t, Tile<float>, float*);

template <int R, bool ALONG>
struct RowTable : RowTable<R - 1, ALONG> {
    constexpr RowTable() { this->of[R] = tile_rows<R, ALONG>; }
};
template <bool ALONG>
struct RowTable<0, ALONG> {
    TileRows of[TILE_ROWS + 1] = {};
};

static void rows(int rows, int terms, const Term<float>* term, ptrdiff_t row, ptrdiff_t col, Tile<float> tile, float* c) {
    static constexpr RowTable<TILE_ROWS, true> along;
    static constexpr RowTable<TILE_ROWS, false> across;
    for (int r = 0; r < rows;) {
        // Two even tiles rather than a full one and a stub: 10 rows are 5 + 5, not 6 + 4.
        int left = rows - r, n = left <= TILE_ROWS ? left : left < 2 * TILE_ROWS ? (left + 1) / 2 : TILE_ROWS;
        Tile<float> part{tile.bias ? tile.bias + r : nullptr, tile.add, tile.relu};
        (row == 1 ? along.of : across.of)[n](terms, term, r * row, row == 1 ? col : row, part, c + r * LANES);
        r += n;
    }
}

// R x (N vectors) of `outer`: at most eight floats a vector, so that panels need not be wider on wider machines.
constexpr int HALF = W < 8 ? W : 8;
using Half = float __attribute__((vector_size(HALF * 4), aligned(4), may_alias));

template <int R, int N>
static void tile_outer(int width, int terms, const Term<float>* term, ptrdiff_t a0, ptrdiff_t b0, bool add, float* c) {
    Half sum[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[r][n] = add ? *reinterpret_cast<Half*>(c + r * width + n * HALF) : Half{};
    for (int t = 0; t < terms; ++t) {
        const float* a = term[t].a + a0;
        const float* b = term[t].b + b0;
        for (int k = 0; k < LANES; ++k, b += width) {
            Half x[N];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) x[n] = *reinterpret_cast<const Half*>(b + n * HALF);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                Half w = a[r * LANES + k] - Half{};
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) sum[r][n] += w * x[n];
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) *reinterpret_cast<Half*>(c + r * width + n * HALF) = sum[r][n];
}

template <int R, int N>
static void strip_outer(int rows, int width, int terms, const Term<float>* term, int b0, bool add, float* c) {
    int r = 0;
    for (; r + R <= rows; r += R) tile_outer<R, N>(width, terms, term, r * LANES, b0, add, c + r * width);
    for (; r + 2 <= rows; r += 2) tile_outer<2, N>(width, terms, term, r * LANES, b0, add, c + r * width);
    for (; r < rows; ++r) tile_outer<1, N>(width, terms, term, r * LANES, b0, add, c + r * width);
}

static void outer(int rows, int width, int terms, const Term<float>* term, bool add, float* c) {
    int o = 0;
    for (; o + 24 <= width; o += 24) strip_outer<HALF / 2, 24 / HALF>(rows, width, terms, term, o, add, c + o);
    if (o + 16 <= width) strip_outer<48 / 16 * HALF / 4, 16 / HALF>(rows, width, terms, term, o, add, c + o), o += 16;
    if (o < width) strip_outer<HALF, 8 / HALF>(rows, width, terms, term, o, add, c + o);
}

static inline float total(Half v) {
    float sum = 0;
    for (int i = 0; i < HALF; ++i) sum += v[i];
    return sum;
}

template <int R, int N>
static void tile_dots(int width, int terms, const Term<float>* term, ptrdiff_t a0, ptrdiff_t b0, bool add, float* c) {
    Half sum[R][N] = {};
    for (int t = 0; t < terms; ++t) {
        const float* a = term[t].a + a0;
        const float* b = term[t].b + b0;
#pragma GCC unroll 4
        for (int k = 0; k < LANES; k += HALF) {
            Half x[N];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) x[n] = *reinterpret_cast<const Half*>(b + n * LANES + k);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                Half w = *reinterpret_cast<const Half*>(a + r * LANES + k);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) sum[r][n] += w * x[n];
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) c[r * width + n] = (add ? c[r * width + n] : 0.f) + total(sum[r][n]);
}

template <int R, int N>
static void strip_dots(int rows, int width, int terms, const Term<float>* term, int o, bool add, float* c) {
    int r = 0;
    for (; r + R <= rows; r += R)
        tile_dots<R, N>(width, terms, term, r * LANES, o * LANES, add, c + r * width + o);
    if (r + 3 <= rows) tile_dots<3, N>(width, terms, term, r * LANES, o * LANES, add, c + r * width + o), r += 3;
    for (; r < rows; ++r) tile_dots<1, N>(width, terms, term, r * LANES, o * LANES, add, c + r * width + o);
}

static void dots(int rows, int outputs, int width, int terms, const Term<float>* term, bool add, float* c) {
    int o = 0;
    if (rows % 5 == 0)  // the rows of 5x5 kernels leave no stub that way
        for (; o + 2 <= outputs; o += 2) strip_dots<5, 2>(rows, width, terms, term, o, add, c);
    for (; o + 3 <= outputs; o += 3) strip_dots<4, 3>(rows, width, terms, term, o, add, c);
    for (; o < outputs; ++o) strip_dots<4, 1>(rows, width, terms, term, o, add, c);
}

using Oct = float __attribute__((vector_size(32), aligned(4), may_alias));

// Eight by eight, by three rounds of shuffles.
static inline void transpose_oct(const float* x, float* y, int width) {
    using I = int __attribute__((vector_size(32)));
    Oct r[8], s[8];
    for (int i = 0; i < 8; ++i) r[i] = *reinterpret_cast<const Oct*>(x + i * LANES);
    for (int i = 0; i < 8; i += 2) {
        s[i] = __builtin_shuffle(r[i], r[i + 1], I{0, 8, 2, 10, 4, 12, 6, 14});
        s[i + 1] = __builtin_shuffle(r[i], r[i + 1], I{1, 9, 3, 11, 5, 13, 7, 15});
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + j] = __builtin_shuffle(s[i + j], s[i + j + 2], I{0, 1, 8, 9, 4, 5, 12, 13});
            r[i + j + 2] = __builtin_shuffle(s[i + j], s[i + j + 2], I{2, 3, 10, 11, 6, 7, 14, 15});
        }
    for (int i = 0; i < 4; ++i) {
        *reinterpret_cast<Oct*>(y + i * width) = __builtin_shuffle(r[i], r[i + 4], I{0, 1, 2, 3, 8, 9, 10, 11});
        *reinterpret_cast<Oct*>(y + (i + 4) * width) = __builtin_shuffle(r[i], r[i + 4], I{4, 5, 6, 7, 12, 13, 14, 15});
    }
}

static void transpose_fast(int outputs, int width, const float* x, float* y) {
    int o = 0;
    for (; o + 8 <= outputs; o += 8)
        for (int lane = 0; lane < LANES; lane += 8) transpose_oct(x + o * LANES + lane, y + lane * width + o, width);
    for (int lane = 0; lane < LANES; ++lane) {
        for (int i = o; i < outputs; ++i) y[lane * width + i] = x[i * LANES + lane];
        for (int i = outputs; i < width; ++i) y[lane * width + i] = 0;
    }
}

using Row = uint8_t __attribute__((vector_size(16), aligned(1), may_alias));

// Sixteen samples by sixteen bytes: four rounds in which rows i and i + 8 are shuffled like two halves of a deck of cards.
static inline void transpose_bytes(Row* r) {
    Row s[LANES];
    for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            s[2 * i] = __builtin_shuffle(r[i], r[i + 8], Row{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
            s[2 * i + 1] =
                __builtin_shuffle(r[i], r[i + 8], Row{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) r[i] = s[i];
    }
}

static void gather_bytes_fast(int features, int valid, const uint8_t* x, const int64_t* index, float scale, float* y) {
    int f = 0;
    for (; valid == LANES && f + 16 <= features; f += 16) {
        Row r[LANES];
        for (int lane = 0; lane < LANES; ++lane) r[lane] = *reinterpret_cast<const Row*>(x + index[lane] * features + f);
        transpose_bytes(r);
        uint8_t turned[16 * LANES];
        __builtin_memcpy(turned, r, sizeof turned);
        for (int i = 0; i < 16 * LANES; ++i) y[f * LANES + i] = scale * float(turned[i]);
    }
    for (; f < features; ++f)
        for (int lane = 0; lane < LANES; ++lane)
            y[f * LANES + lane] = lane < valid ? scale * float(x[index[lane] * features + f]) : 0.f;
}

constexpr int STRETCH = 16 * LANES;  // winners that are as wide as a float for a while

// Winners are as wide as a float while they are compared, and a byte where they are kept. Plain loops turn one into the
// other: of vectors of unlike widths, and of short loops, GCC makes a scalar each.
static void window_max_fast(int features, int window, const float* const* x, bool relu, float* y, uint8_t* winner) {
    const ptrdiff_t count = ptrdiff_t(features) * LANES;
    for (ptrdiff_t begin = 0; begin < count; begin += STRETCH) {
        const int length = count - begin < STRETCH ? int(count - begin) : STRETCH;
        int wide[STRETCH];
        for (int i = 0; i < length; i += W) {
            Vec best = load(x[0] + begin + i);
            Int who{};
            for (int p = 1; p < window; ++p) {
                const Vec other = load(x[p] + begin + i);
                const Int more = other > best;
                best = more ? other : best;
                who = more ? Int{} + p : who;
            }
            if (relu) best = best < 0 ? Vec{} : best;
            store(y + begin + i, best);
            *reinterpret_cast<Int*>(wide + i) = who;
        }
        for (int i = 0; i < length; ++i) winner[begin + i] = uint8_t(wide[i]);
    }
}

static void window_max_back_fast(int features, int window, const uint8_t* winner, const float* y, bool relu,
                                 const float* dy, float* const* dx, bool add) {
    const ptrdiff_t count = ptrdiff_t(features) * LANES;
    for (ptrdiff_t begin = 0; begin < count; begin += STRETCH) {
        const int length = count - begin < STRETCH ? int(count - begin) : STRETCH;
        int wide[STRETCH];
        for (int i = 0; i < length; ++i) wide[i] = winner[begin + i];
        for (int i = 0; i < length; i += W) {
            Vec g = load(dy + begin + i);
            if (relu) g = load(y + begin + i) > 0 ? g : Vec{};
            const Int who = *reinterpret_cast<Int*>(wide + i);
            for (int p = 0; p < window; ++p) {
                float* to = dx[p] + begin + i;
                const Vec part = who == p ? g : Vec{};
                store(to, add ? load(to) + part : part);
            }
        }
    }
}
