// The hot loops of error_feedback.cpp, compiled once per instruction set by multiversion.h.

typedef float Floats __attribute__((vector_size(CODEQUANT_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(CODEQUANT_VECTOR_BYTES), aligned(4), may_alias));
constexpr int kVectors = kLanes * 4 / CODEQUANT_VECTOR_BYTES;  // registers that hold one number of kLanes rows
// Columns of the product held in registers beside them: kColumns * kVectors accumulators.
constexpr int kColumns = CODEQUANT_VECTOR_BYTES == 64 ? 8 : CODEQUANT_VECTOR_BYTES == 32 ? 2 : 1;

// panel [kBlock / kColumns][rows][kColumns] = matrix[0 .. rows, 0 .. width], zeros beyond width.
// Row by row, because rows a power of two apart compete for the same few cache sets.
CODEQUANT_TARGET inline void pack_panel(const float* matrix, int64_t stride, int64_t rows, int64_t width,
                                        float* panel) {
    float row[kBlock] = {};
    for (int64_t j = 0; j < rows; ++j, matrix += stride) {
        std::memcpy(row, matrix, width * sizeof(float));
        for (int64_t c = 0; c < kBlock; c += kColumns)
            std::memcpy(panel + c * rows + j * kColumns, row + c, kColumns * sizeof(float));
    }
}

// out [kBlock][kLanes] += sum_j panel[., j] * x[j][kLanes], j = 0 .. rows - 1.
CODEQUANT_TARGET inline void multiply(const float* panel, const float* x, int64_t rows, float* out) {
    for (int64_t c = 0; c < kBlock; c += kColumns, panel += rows * kColumns, out += kColumns * kLanes) {
        Floats sum[kColumns][kVectors];
        for (int u = 0; u < kColumns; ++u)
            for (int v = 0; v < kVectors; ++v) sum[u][v] = reinterpret_cast<const Floats*>(out + u * kLanes)[v];
        for (int64_t j = 0; j < rows; ++j) {
            const Floats* xj = reinterpret_cast<const Floats*>(x + j * kLanes);
            for (int u = 0; u < kColumns; ++u)
                for (int v = 0; v < kVectors; ++v) sum[u][v] += panel[j * kColumns + u] * xj[v];
        }
        for (int u = 0; u < kColumns; ++u)
            for (int v = 0; v < kVectors; ++v) reinterpret_cast<Floats*>(out + u * kLanes)[v] = sum[u][v];
    }
}

// The columns of one block in turn, for kLanes rows: each picks the codebook entry nearest to
// target + error - gradient / diagonal, and tells the columns after it.
//   matrix: the block's corner M[first, first]; groups [width]; table [G][K][kLanes];
//   target, error [width][kLanes]; gradient [width][kLanes], sum_j error[j] * M[j][c]; indices [width][kLanes].
CODEQUANT_TARGET inline bool assign_block(const float* matrix, int64_t stride, int64_t width, const int32_t* groups,
                                          const float* table, int entries, const float* target, float* error,
                                          float* gradient, int32_t* indices) {
    bool changed = false;
    for (int64_t c = 0; c < width; ++c) {
        const float* row = matrix + c * stride;
        const float inverse = 1.0f / row[c];
        for (int v = 0; v < kVectors; ++v) {
            const int64_t at = c * kLanes + v * (kLanes / kVectors);
            const Floats w = *reinterpret_cast<const Floats*>(target + at);
            const Floats before = *reinterpret_cast<const Floats*>(error + at);
            const Floats wanted = w + before - *reinterpret_cast<const Floats*>(gradient + at) * inverse;
            const Floats* entry = reinterpret_cast<const Floats*>(table + int64_t{groups[c]} * entries * kLanes) + v;
            Floats best = *entry, distance = wanted - best;
            distance = distance < 0 ? -distance : distance;
            Ints nearest = {};
            for (int k = 1; k < entries; ++k) {
                const Floats candidate = entry[k * kVectors];
                Floats d = wanted - candidate;
                d = d < 0 ? -d : d;
                const Ints better = d < distance;
                distance = better ? d : distance;
                best = better ? candidate : best;
                nearest = better ? Ints{} + k : nearest;
            }
            const Ints moved = nearest ^ *reinterpret_cast<const Ints*>(indices + at);
            for (int l = 0; l < kLanes / kVectors; ++l) changed |= moved[l] != 0;
            *reinterpret_cast<Ints*>(indices + at) = nearest;
            const Floats after = best - w, step = after - before;
            *reinterpret_cast<Floats*>(error + at) = after;
            for (int64_t later = c + 1; later < width; ++later)
                reinterpret_cast<Floats*>(gradient + later * kLanes)[v] += row[later] * step;
        }
    }
    return changed;
}

// sums [kBlock] = sum over the listed rows j of block[j][kBlock].
CODEQUANT_TARGET inline void sum_rows(const float* block, const int32_t* rows, int64_t count, float* sums) {
    constexpr int kParts = kBlock * 4 / CODEQUANT_VECTOR_BYTES;
    Floats total[kParts] = {};
    for (int64_t r = 0; r < count; ++r) {
        const Floats* row = reinterpret_cast<const Floats*>(block + int64_t{rows[r]} * kBlock);
        for (int p = 0; p < kParts; ++p) total[p] += row[p];
    }
    for (int p = 0; p < kParts; ++p) reinterpret_cast<Floats*>(sums)[p] = total[p];
}
