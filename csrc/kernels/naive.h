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
