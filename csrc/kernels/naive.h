// The naive twins of the fast kernels: what they must compute, as one would write it down.

template <class T>
static void naive_rows(int rows, int terms, const Term<T>* term, ptrdiff_t row, ptrdiff_t col, Tile<T> tile, T* c) {
    for (int r = 0; r < rows; ++r)
        for (int lane = 0; lane < LANES; ++lane) {
            T sum = tile.add ? c[r * LANES + lane] : T(0);
            if (tile.bias) sum += tile.bias[r];
            for (int t = 0; t < terms; ++t)
                for (int k = 0; k < term[t].k; ++k)
                    sum += term[t].a[r * row + k * col] * term[t].b[k * LANES + lane];
            c[r * LANES + lane] = tile.relu && sum < 0 ? T(0) : sum;
        }
}

template <class T>
static void naive_outer(int rows, int width, int terms, const Term<T>* term, bool add, T* c) {
    for (int r = 0; r < rows; ++r)
        for (int o = 0; o < width; ++o) {
            T sum = add ? c[r * width + o] : T(0);
            for (int t = 0; t < terms; ++t)
                for (int k = 0; k < LANES; ++k) sum += term[t].a[r * LANES + k] * term[t].b[k * width + o];
            c[r * width + o] = sum;
        }
}

template <class T>
static void naive_dots(int rows, int outputs, int width, int terms, const Term<T>* term, bool add, T* c) {
    for (int i = 0; i < rows; ++i)
        for (int o = 0; o < outputs; ++o) {
            T sum = add ? c[i * width + o] : T(0);
            for (int t = 0; t < terms; ++t)
                for (int lane = 0; lane < LANES; ++lane)
                    sum += term[t].a[i * LANES + lane] * term[t].b[o * LANES + lane];
            c[i * width + o] = sum;
        }
}

template <class T>
static void naive_window_max(int features, int window, const T* const* x, bool relu, T* y, uint8_t* winner) {
    for (ptrdiff_t i = 0; i < ptrdiff_t(features) * LANES; ++i) {
        int best = 0;
        for (int p = 1; p < window; ++p)
            if (x[p][i] > x[best][i]) best = p;
        y[i] = relu && x[best][i] < 0 ? T(0) : x[best][i];
        winner[i] = uint8_t(best);
    }
}

template <class T>
static void naive_window_max_back(int features, int window, const uint8_t* winner, const T* y, bool relu, const T* dy,
                                  T* const* dx, bool add) {
    for (ptrdiff_t i = 0; i < ptrdiff_t(features) * LANES; ++i)
        for (int p = 0; p < window; ++p) {
            const T g = winner[i] == p && !(relu && !(y[i] > 0)) ? dy[i] : T(0);
            dx[p][i] = add ? dx[p][i] + g : g;
        }
}

template <class T>
static void naive_causal_again(int keys, T scale, const T* level, T* y) {
    for (int k = 0; k < keys; ++k)
        for (int lane = 0; lane < LANES; ++lane)
            y[k * LANES + lane] = k <= keys - LANES + lane ? exp_(scale * y[k * LANES + lane] - level[lane]) : T(0);
}

template <class T>
static void naive_causal(int keys, T scale, T* y, T* level) {
    for (int lane = 0; lane < LANES; ++lane) {
        const int seen = keys - LANES + lane + 1;
        T top = y[lane], sum = 0;
        for (int k = 1; k < seen; ++k) top = y[k * LANES + lane] > top ? y[k * LANES + lane] : top;
        for (int k = 0; k < seen; ++k) sum += exp_(scale * (y[k * LANES + lane] - top));
        level[lane] = scale * top + log_(sum);
    }
    naive_causal_again(keys, scale, level, y);
}
