// Codebook assignment and refitting under a Hessian; codequant/error_feedback.py has the mathematics and the readable
// twins. kLanes rows of the weight are processed side by side, one per vector lane, and kTile rows per visit to a block
// of the Hessian, because the Hessian, not the arithmetic, is what must come from memory.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace {

constexpr int64_t kLanes = 32, kTile = 128;
constexpr int64_t kBlock = 64;   // columns whose feedback is applied at once; those inside a block see each other's
constexpr int64_t kChunk = 256;  // rows of the Hessian packed at a time: a chunk of errors [kChunk][kLanes] fits in L1

}  // namespace

#define CODEQUANT_BODY "error_feedback_loops.h"
#include "multiversion.h"

namespace {

struct Shape {
    int64_t matrices, rows, columns;  // B, O, I
    int64_t groups;                   // G
    int entries;                      // K
    int64_t tiles() const { return (rows + kTile - 1) / kTile; }
};

// Up to kTile rows of one matrix with the rows in lanes: [lane group][column][kLanes]. Lanes beyond the last row hold
// zeros, for which every result is zero too.
struct Tile {
    Shape shape;
    std::vector<float> target, error, table, gradient, panel;
    std::vector<int32_t> indices;
    int64_t rows = 0;

    explicit Tile(const Shape& s)
        : shape(s), target(kTile * s.columns), error(target), table(kTile * s.groups * s.entries),
          gradient(kTile * kBlock), panel(kChunk * kBlock), indices(kTile * s.columns) {}

    int64_t lane_groups() const { return (rows + kLanes - 1) / kLanes; }
    int64_t at(int64_t row, int64_t column) const {
        return ((row / kLanes) * shape.columns + column) * kLanes + row % kLanes;
    }
    int64_t table_at(int64_t row, int64_t entry) const {
        return ((row / kLanes) * shape.groups * shape.entries + entry) * kLanes + row % kLanes;
    }
    float* errors(int64_t group) { return error.data() + group * shape.columns * kLanes; }
    float* gradients(int64_t group) { return gradient.data() + group * kBlock * kLanes; }

    // groups [columns] is the codebook of each column. from_scratch: nothing is quantized yet, so the error is zero.
    void load(const float* w, const float* codebook, const uint8_t* codes, const int32_t* groups, int64_t count,
              bool from_scratch) {
        rows = count;
        std::fill(target.begin(), target.end(), 0.0f);
        std::fill(error.begin(), error.end(), 0.0f);
        std::fill(table.begin(), table.end(), 0.0f);
        std::fill(indices.begin(), indices.end(), 0);
        const int64_t entries = shape.groups * shape.entries;
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t e = 0; e < entries; ++e) table[table_at(r, e)] = codebook[r * entries + e];
            for (int64_t c = 0; c < shape.columns; ++c) {
                const float value = w[r * shape.columns + c];
                target[at(r, c)] = value;
                if (from_scratch) continue;
                const uint8_t code = codes[r * shape.columns + c];
                indices[at(r, c)] = code;
                error[at(r, c)] = codebook[r * entries + groups[c] * shape.entries + code] - value;
            }
        }
    }

    // gradient [lane group][width][kLanes] += sum over j = begin .. end - 1 of matrix[j][first + c] * error[j].
    void add_gradient(const float* matrix, int64_t first, int64_t width, int64_t begin, int64_t end) {
        const auto pack = CODEQUANT_SELECT(pack_panel);
        const auto multiply = CODEQUANT_SELECT(multiply);
        for (int64_t j = begin; j < end; j += kChunk) {
            const int64_t count = std::min(kChunk, end - j);
            pack(matrix + j * shape.columns + first, shape.columns, count, width, panel.data());
            for (int64_t g = 0; g < lane_groups(); ++g) multiply(panel.data(), errors(g) + j * kLanes, count, gradients(g));
        }
    }

    bool sweep(const float* matrix, const int32_t* groups, bool from_scratch) {
        const auto assign = CODEQUANT_SELECT(assign_block);
        bool changed = false;
        for (int64_t first = 0; first < shape.columns; first += kBlock) {
            const int64_t width = std::min(kBlock, shape.columns - first);
            std::fill(gradient.begin(), gradient.end(), 0.0f);
            add_gradient(matrix, first, width, 0, from_scratch ? first : shape.columns);
            for (int64_t g = 0; g < lane_groups(); ++g) {
                const int64_t offset = (g * shape.columns + first) * kLanes;
                changed |= assign(matrix + first * shape.columns + first, shape.columns, width, groups + first,
                                  table.data() + g * shape.groups * shape.entries * kLanes, shape.entries,
                                  target.data() + offset, error.data() + offset, gradients(g), indices.data() + offset);
            }
        }
        return changed;
    }
};

// Solves (m + ridge * mean diagonal) x = -b in place of b; m [n, n] symmetric, positive semidefinite. A zero m gives 0.
void solve(std::vector<double>& m, double* b, int n, double ridge) {
    double trace = 0;
    for (int k = 0; k < n; ++k) trace += m[k * n + k];
    if (!(trace > 0)) {
        std::fill_n(b, n, 0.0);
        return;
    }
    for (int k = 0; k < n; ++k) m[k * n + k] += ridge * trace / n;
    for (int k = 0; k < n; ++k) {  // Cholesky, lower triangle
        for (int i = k; i < n; ++i) {
            double sum = m[i * n + k];
            for (int j = 0; j < k; ++j) sum -= m[i * n + j] * m[k * n + j];
            m[i * n + k] = i == k ? std::sqrt(sum) : sum / m[k * n + k];
        }
    }
    for (int k = 0; k < n; ++k) {
        double sum = -b[k];
        for (int j = 0; j < k; ++j) sum -= m[k * n + j] * b[j];
        b[k] = sum / m[k * n + k];
    }
    for (int k = n - 1; k >= 0; --k) {
        double sum = b[k];
        for (int j = k + 1; j < n; ++j) sum -= m[j * n + k] * b[j];
        b[k] = sum / m[k * n + k];
    }
}

}  // namespace

// `sweeps` passes over the columns, each choosing indices in turn (see sweep_reference). target [B, O, I]; matrix
// [B, I, I]; codebook [B, O, G, K]; groups int32 [B, I] -> indices [B, O, I], also read unless from_scratch, in which
// case the matrix is upper triangular.
CODEQUANT_API void codequant_sweep(const float* target, const float* matrix, const float* codebook,
                                   const int32_t* groups, int64_t B, int64_t O, int64_t I, int64_t G, int K, int sweeps,
                                   int from_scratch, int threads, uint8_t* indices) {
    const Shape shape{B, O, I, G, K};
    const int64_t tasks = B * shape.tiles();
    parallel(tasks, threads, [&](const auto& next) {
        Tile tile(shape);
        for (int64_t task; (task = next()) < tasks;) {
            const int64_t b = task / shape.tiles(), first = task % shape.tiles() * kTile, row = b * O + first;
            tile.load(target + row * I, codebook + row * G * K, indices + row * I, groups + b * I,
                      std::min(kTile, O - first), from_scratch);
            for (int s = 0; s < sweeps; ++s)
                if (!tile.sweep(matrix + b * I * I, groups + b * I, from_scratch)) break;
            for (int64_t r = 0; r < tile.rows; ++r)
                for (int64_t c = 0; c < I; ++c)
                    indices[(row + r) * I + c] = static_cast<uint8_t>(tile.indices[tile.at(r, c)]);
        }
    });
}

// Least-squares codebooks for given indices, one column group after the other (see refit_reference). Shapes as above,
// columns of a group adjacent; codebook is updated in place.
CODEQUANT_API void codequant_refit(const float* target, const float* hessian, const uint8_t* indices, int64_t B,
                                   int64_t O, int64_t I, int64_t G, int K, double ridge, int threads,
                                   float* codebook) {
    const Shape shape{B, O, I, G, K};
    const int64_t tasks = B * shape.tiles(), size = I / G;
    std::vector<int32_t> groups(I);
    for (int64_t c = 0; c < I; ++c) groups[c] = static_cast<int32_t>(c / size);
    const auto sum_rows = CODEQUANT_SELECT(sum_rows);
    parallel(tasks, threads, [&](const auto& next) {
        Tile tile(shape);
        std::vector<float> block(size * kBlock);
        std::vector<double> normal(kTile * K * K), slope(kTile * K), system(K * K);
        std::vector<int32_t> members(kTile * size), starts(kTile * (K + 1));
        float sums[kBlock];
        for (int64_t task; (task = next()) < tasks;) {
            const int64_t b = task / shape.tiles(), first_row = task % shape.tiles() * kTile, row = b * O + first_row;
            const float* h = hessian + b * I * I;
            tile.load(target + row * I, codebook + row * G * K, indices + row * I, groups.data(),
                      std::min(kTile, O - first_row), false);
            for (int64_t g = 0; g < G; ++g) {
                const int64_t begin = g * size;
                std::fill(normal.begin(), normal.end(), 0.0);
                std::fill(slope.begin(), slope.end(), 0.0);
                for (int64_t r = 0; r < tile.rows; ++r) {  // columns of the group, ordered by index
                    const uint8_t* code = indices + (row + r) * I + begin;
                    int32_t* start = starts.data() + r * (K + 1);
                    std::fill_n(start, K + 1, 0);
                    for (int64_t c = 0; c < size; ++c) ++start[code[c] + 1];
                    for (int k = 0; k < K; ++k) start[k + 1] += start[k];
                    std::vector<int32_t> next_slot(start, start + K);
                    for (int64_t c = 0; c < size; ++c)
                        members[r * size + next_slot[code[c]]++] = static_cast<int32_t>(c);
                }
                for (int64_t c0 = 0; c0 < size; c0 += kBlock) {
                    const int64_t width = std::min(kBlock, size - c0);
                    std::fill(tile.gradient.begin(), tile.gradient.end(), 0.0f);  // by the other groups
                    tile.add_gradient(h, begin + c0, width, 0, begin);
                    tile.add_gradient(h, begin + c0, width, begin + size, I);
                    for (int64_t j = 0; j < size; ++j) {
                        const float* source = h + (begin + j) * I + begin + c0;
                        std::fill(std::copy_n(source, width, block.data() + j * kBlock), block.data() + (j + 1) * kBlock, 0.0f);
                    }
                    for (int64_t r = 0; r < tile.rows; ++r) {
                        const uint8_t* code = indices + (row + r) * I + begin + c0;
                        const int32_t* start = starts.data() + r * (K + 1);
                        float error[kBlock];
                        for (int64_t c = 0; c < width; ++c) {
                            error[c] = tile.error[tile.at(r, begin + c0 + c)];
                            slope[r * K + code[c]] += tile.gradients(r / kLanes)[c * kLanes + r % kLanes];
                        }
                        for (int k = 0; k < K; ++k) {
                            if (start[k] == start[k + 1]) continue;
                            sum_rows(block.data(), members.data() + r * size + start[k], start[k + 1] - start[k], sums);
                            double* line = normal.data() + (r * K + k) * K;
                            float own = 0;  // this group's part of the slope
                            for (int64_t c = 0; c < width; ++c) {
                                line[code[c]] += sums[c];
                                own += sums[c] * error[c];
                            }
                            slope[r * K + k] += own;
                        }
                    }
                }
                for (int64_t r = 0; r < tile.rows; ++r) {
                    system.assign(normal.begin() + r * K * K, normal.begin() + (r + 1) * K * K);
                    double* change = slope.data() + r * K;
                    solve(system, change, K, ridge);
                    float* entry = codebook + ((row + r) * G + g) * K;
                    for (int k = 0; k < K; ++k) entry[k] += static_cast<float>(change[k]);
                    for (int64_t c = begin; c < begin + size; ++c)
                        tile.error[tile.at(r, c)] = entry[indices[(row + r) * I + c]] - tile.target[tile.at(r, c)];
                }
            }
        }
    });
}

// cost [B, O] = e H e^T of every row of error [B, O, I] under hessian [B, I, I].
CODEQUANT_API void codequant_row_cost(const float* error, const float* hessian, int64_t B, int64_t O, int64_t I,
                                      int threads, double* cost) {
    const Shape shape{B, O, I, 0, 0};
    const int64_t tasks = B * shape.tiles();
    parallel(tasks, threads, [&](const auto& next) {
        Tile tile(shape);
        for (int64_t task; (task = next()) < tasks;) {
            const int64_t b = task / shape.tiles(), first_row = task % shape.tiles() * kTile, row = b * O + first_row;
            tile.rows = std::min(kTile, O - first_row);
            for (int64_t r = 0; r < tile.rows; ++r)
                for (int64_t c = 0; c < I; ++c) tile.error[tile.at(r, c)] = error[(row + r) * I + c];
            std::fill_n(cost + row, tile.rows, 0.0);
            for (int64_t first = 0; first < I; first += kBlock) {
                const int64_t width = std::min(kBlock, I - first);
                std::fill(tile.gradient.begin(), tile.gradient.end(), 0.0f);
                tile.add_gradient(hessian + b * I * I, first, width, 0, I);
                for (int64_t r = 0; r < tile.rows; ++r)
                    for (int64_t c = 0; c < width; ++c)
                        cost[row + r] += static_cast<double>(tile.gradients(r / kLanes)[c * kLanes + r % kLanes]) *
                                         tile.error[tile.at(r, first + c)];
            }
        }
    });
}
