// The hot loop of clustering.cpp, compiled once per instruction set by multiversion.h.

typedef double Doubles __attribute__((vector_size(CODEQUANT_VECTOR_BYTES), aligned(8), may_alias));
typedef int64_t Integers __attribute__((vector_size(CODEQUANT_VECTOR_BYTES), aligned(8)));
constexpr int kWidth = CODEQUANT_VECTOR_BYTES / 8;
// Finding the least of many is one chain of dependent steps: several vectors side by side hide its latency.
constexpr int kVectors = 2, kLanes = kVectors * kWidth;
static_assert(kLanes <= kPadding);

// D_k (`cost`) and the start of the last cluster (`split`) from D_{k-1}, for every j = 1..n; arrays [n + 1], padded by
// kPadding, which is read and written too. Apart from square[j], common to all candidates i, a start i costs
// base[i] - dx * dx / dw with base = D_{k-1} - square. Candidates are compared as fractions
// (base[i] * dw - dx * dx) / dw by cross-multiplication: no division. A denominator of 0 stands for infinity.
//
// The best start never moves left as j grows. So every `stride`-th j is searched between the starts of its neighbours,
// halving the stride (candidates in lanes), until neighbours are kLanes apart; the points between are then searched
// together (points in lanes).
CODEQUANT_TARGET inline void add_cluster(int64_t n, const double* weight, const double* moment, const double* square,
                                         const double* base, double* cost, int32_t* split) {
    const auto load = [](const double* p) CODEQUANT_TARGET -> const Doubles& {
        return *reinterpret_cast<const Doubles*>(p);
    };
    Integers iota;
    for (int l = 0; l < kWidth; ++l) iota[l] = l;
    split[0] = 0;
    int64_t top = kLanes;
    while (top * 2 <= n) top *= 2;
    for (int64_t stride = top; stride >= kLanes; stride /= 2) {
        for (int64_t j = stride; j <= n; j += 2 * stride) {
            const int64_t first = split[j - stride];
            const int64_t last = j + stride <= n ? std::min<int64_t>(split[j + stride], j - 1) : j - 1;
            Doubles numerator[kVectors], denominator[kVectors] = {};
            Integers start[kVectors] = {};
            for (int v = 0; v < kVectors; ++v) numerator[v] = Doubles{} + 1;
            for (int64_t i = first; i <= last; i += kLanes) {
                for (int v = 0; v < kVectors; ++v) {
                    const int64_t at = i + v * kWidth;
                    const Integers lane = iota + at;
                    const Doubles dw = weight[j] - load(weight + at), dx = moment[j] - load(moment + at);
                    const Doubles candidate = load(base + at) * dw - dx * dx;
                    const Integers better = (candidate * denominator[v] < numerator[v] * dw) & (lane <= last);
                    numerator[v] = better ? candidate : numerator[v];
                    denominator[v] = better ? dw : denominator[v];
                    start[v] = better ? lane : start[v];
                }
            }
            double least = HUGE_VAL;
            for (int v = 0; v < kVectors; ++v) {
                numerator[v] /= denominator[v];
                for (int l = 0; l < kWidth; ++l) least = numerator[v][l] < least ? numerator[v][l] : least;
            }
            int64_t leftmost = j;
            for (int v = 0; v < kVectors; ++v)
                for (int l = 0; l < kWidth; ++l)
                    leftmost = (numerator[v][l] == least) & (start[v][l] < leftmost) ? start[v][l] : leftmost;
            split[j] = static_cast<int32_t>(leftmost);
            cost[j] = square[j] + least;
        }
    }
    for (int64_t block = 0; block < n; block += kLanes) {
        const int64_t first = split[block];
        const int64_t last = block + kLanes <= n ? split[block + kLanes] : n - 1;
        Doubles numerator[kVectors], denominator[kVectors] = {};
        Integers start[kVectors] = {};
        for (int v = 0; v < kVectors; ++v) numerator[v] = Doubles{} + 1;
        for (int64_t i = first; i <= last; ++i) {
            for (int v = 0; v < kVectors; ++v) {
                const int64_t at = block + 1 + v * kWidth;
                const Doubles dw = load(weight + at) - weight[i], dx = load(moment + at) - moment[i];
                const Doubles candidate = base[i] * dw - dx * dx;
                const Integers better = (candidate * denominator[v] < numerator[v] * dw) & (i < iota + at);
                numerator[v] = better ? candidate : numerator[v];
                denominator[v] = better ? dw : denominator[v];
                start[v] = better ? Integers{} + i : start[v];
            }
        }
        for (int v = 0; v < kVectors; ++v) {
            const int64_t at = block + 1 + v * kWidth;
            *reinterpret_cast<Doubles*>(cost + at) = load(square + at) + numerator[v] / denominator[v];
            for (int l = 0; l < kWidth; ++l) split[at + l] = static_cast<int32_t>(start[v][l]);
        }
    }
}
