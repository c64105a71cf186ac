// The hot loop of clustering.cpp, compiled once per instruction set by multiversion.h.

typedef double Doubles __attribute__((vector_size(CODEQUANT_VECTOR_BYTES), aligned(8), may_alias));
typedef int64_t Integers __attribute__((vector_size(CODEQUANT_VECTOR_BYTES), aligned(8)));
constexpr int kLanes = CODEQUANT_VECTOR_BYTES / 8;

// D_k (`cost`) and the start of the last cluster (`split`) from D_{k-1}, for every j = 1..n; arrays [n + 1], padded by
// kLanes. Apart from square[j], common to all candidates i, a start i costs base[i] - dx * dx / dw with
// base = D_{k-1} - square. Candidates are compared as fractions (base[i] * dw - dx * dx) / dw by cross-multiplication:
// no division. A denominator of 0 stands for infinity.
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
    for (int l = 0; l < kLanes; ++l) iota[l] = l;
    split[0] = 0;
    int64_t top = kLanes;
    while (top * 2 <= n) top *= 2;
    for (int64_t stride = top; stride >= kLanes; stride /= 2) {
        for (int64_t j = stride; j <= n; j += 2 * stride) {
            const int64_t first = split[j - stride];
            const int64_t last = j + stride <= n ? std::min<int64_t>(split[j + stride], j - 1) : j - 1;
            Doubles numerator = Doubles{} + 1, denominator = Doubles{};
            Integers start = {};
            for (int64_t i = first; i <= last; i += kLanes) {
                const Integers lane = iota + i;
                const Doubles dw = weight[j] - load(weight + i), dx = moment[j] - load(moment + i);
                const Doubles candidate = load(base + i) * dw - dx * dx;
                const Integers better = (candidate * denominator < numerator * dw) & (lane <= last);
                numerator = better ? candidate : numerator;
                denominator = better ? dw : denominator;
                start = better ? lane : start;
            }
            int best = 0;
            for (int l = 1; l < kLanes; ++l) {
                const double left = numerator[l] * denominator[best], right = numerator[best] * denominator[l];
                if (left < right || (left == right && start[l] < start[best])) best = l;
            }
            split[j] = static_cast<int32_t>(start[best]);
            cost[j] = square[j] + numerator[best] / denominator[best];
        }
    }
    for (int64_t block = 0; block < n; block += kLanes) {
        const int64_t first = split[block];
        const int64_t last = block + kLanes <= n ? split[block + kLanes] : n - 1;
        const Integers j = iota + (block + 1);
        const Doubles weight_j = load(weight + block + 1), moment_j = load(moment + block + 1);
        Doubles numerator = Doubles{} + 1, denominator = Doubles{};
        Integers start = {};
        for (int64_t i = first; i <= last; ++i) {
            const Doubles dw = weight_j - weight[i], dx = moment_j - moment[i];
            const Doubles candidate = base[i] * dw - dx * dx;
            const Integers better = (candidate * denominator < numerator * dw) & (i < j);
            numerator = better ? candidate : numerator;
            denominator = better ? dw : denominator;
            start = better ? Integers{} + i : start;
        }
        for (int l = 0; l < kLanes && block + 1 + l <= n; ++l) {
            split[block + 1 + l] = static_cast<int32_t>(start[l]);
            cost[block + 1 + l] = square[block + 1 + l] + numerator[l] / denominator[l];
        }
    }
}
