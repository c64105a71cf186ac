// Exact weighted 1-D k-means of many short rows; codequant/clustering.py explains the method and holds its readable twin.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace {
constexpr int kPadding = 16;  // the search reads and writes whole vectors
}

#define CODEQUANT_BODY "clustering_search.h"
#include "multiversion.h"

namespace {

struct Scratch {
    std::vector<uint64_t> keys, spare;                // value bits above, column below
    std::vector<double> weight, moment;               // prefix sums of w and w * x, [n + 1], padded
    std::vector<double> square;                       // prefix sum of w * x * x, [n + 1], padded
    std::vector<double> cost, base;                   // D_k[j], and D_{k-1}[i] - square[i], [n + 1], padded
    std::vector<int32_t> split;                       // [K, n + 1]: where the last of k clusters starts

    Scratch(int64_t n, int clusters)
        : keys(n), spare(n), weight(n + 1 + kPadding), moment(weight), square(weight), cost(weight), base(weight),
          split(clusters * (n + 1 + kPadding)) {}
};

// Floats in the order of unsigned integers.
inline uint32_t ordered_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// keys ascending by their upper 32 bits, equal values in column order.
void radix_sort(std::vector<uint64_t>& keys, std::vector<uint64_t>& spare) {
    for (int shift = 32; shift < 64; shift += 8) {
        uint32_t start[257] = {};
        for (uint64_t key : keys) ++start[(key >> shift & 0xFF) + 1];
        for (int digit = 0; digit < 256; ++digit) start[digit + 1] += start[digit];
        for (uint64_t key : keys) spare[start[key >> shift & 0xFF]++] = key;
        keys.swap(spare);
    }
}

void cluster_row(const float* values, const float* weights, int64_t n, int clusters, Scratch& s, float* centroids,
                 uint8_t* indices) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += weights[i];
    // See clustering.py: a weight this small changes no centroid visibly and keeps every interval's weight positive.
    const double floor = total > 0 ? 1e-9 * total / static_cast<double>(n) : 1;
    double mean = 0;
    if (total > 0) {
        for (int64_t i = 0; i < n; ++i) mean += static_cast<double>(weights[i]) * values[i];
        mean /= total;
    }
    for (int64_t i = 0; i < n; ++i)
        s.keys[i] = static_cast<uint64_t>(ordered_bits(values[i])) << 32 | static_cast<uint64_t>(i);
    radix_sort(s.keys, s.spare);
    for (int64_t i = 0; i < n; ++i) {
        const auto column = static_cast<uint32_t>(s.keys[i]);
        const double w = std::max<double>(weights[column], floor), x = values[column] - mean;
        s.weight[i + 1] = s.weight[i] + w;
        s.moment[i + 1] = s.moment[i] + w * x;
        s.square[i + 1] = s.square[i] + w * x * x;
    }
    s.cost[0] = 0;
    for (int64_t j = 1; j <= n; ++j) s.cost[j] = s.square[j] - s.moment[j] * s.moment[j] / s.weight[j];
    std::fill_n(s.split.begin(), n + 1, 0);
    const auto search = CODEQUANT_SELECT(add_cluster);
    for (int k = 1; k < clusters; ++k) {
        for (int64_t i = 0; i <= n; ++i) s.base[i] = s.cost[i] - s.square[i];
        search(n, s.weight.data(), s.moment.data(), s.square.data(), s.base.data(), s.cost.data(),
                    s.split.data() + k * (n + 1 + kPadding));
    }
    int64_t end = n;
    for (int k = clusters - 1; k >= 0; --k) {
        const int64_t start = s.split[k * (n + 1 + kPadding) + end];
        if (start < end) {
            const double w = s.weight[end] - s.weight[start], wx = s.moment[end] - s.moment[start];
            centroids[k] = static_cast<float>(mean + wx / w);
            // Equal values in two clusters have equal means up to rounding.
            if (k + 1 < clusters) centroids[k] = std::min(centroids[k], centroids[k + 1]);
        } else {  // fewer distinct values than clusters
            centroids[k] = centroids[k + 1];
        }
        for (int64_t i = start; i < end; ++i) indices[static_cast<uint32_t>(s.keys[i])] = static_cast<uint8_t>(k);
        end = start;
    }
}

}  // namespace

// values [rows, columns]; weights [rows, columns], or one row for all with weight_stride 0 -> centroids [rows, clusters]
// ascending, indices [rows, columns]. 1 <= columns < 2**31, 1 <= clusters <= 256; weights finite and not negative.
CODEQUANT_API void codequant_kmeans(const float* values, const float* weights, int64_t weight_stride, int64_t rows,
                                 int64_t columns, int clusters, int threads, float* centroids, uint8_t* indices) {
    constexpr int64_t kRowsPerTask = 16;
    const int64_t tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
    parallel(tasks, threads, [&](const auto& next) {
        Scratch scratch(columns, clusters);
        for (int64_t task; (task = next()) < tasks;)
            for (int64_t r = task * kRowsPerTask; r < std::min(rows, (task + 1) * kRowsPerTask); ++r)
                cluster_row(values + r * columns, weights + r * weight_stride, columns, clusters, scratch,
                            centroids + r * clusters, indices + r * columns);
    });
}
