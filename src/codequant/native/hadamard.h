// The transform of codequant.hadamard for one token, one small product per Kronecker factor of its matrix. Plain loops,
// as in convert.h; the order of the sums is fixed.
#pragma once

#include <cstring>

#include "isa.h"

namespace codequant {
namespace {

// Sylvester's matrix of this order over the middle of x [count / (order * inner), order, inner], in place.
inline void butterflies(float* x, int64_t count, int64_t order, int64_t inner) {
  for (int64_t half = inner; half < order * inner; half *= 2) {
    for (int64_t first = 0; first < count; first += 2 * half) {
      float *__restrict a = x + first, *__restrict b = a + half;
      for (int64_t i = 0; i < half; ++i) {
        const float sum = a[i] + b[i], difference = a[i] - b[i];
        a[i] = sum;
        b[i] = difference;
      }
    }
  }
}

// Any matrix over the middle of x [count / (order * inner), order, inner]. The last factor has inner == 1, and vectors
// of its matrix's columns; the others have vectors of x.
inline void dense_factor(const Factor& f, const float* x, int64_t count, int64_t inner, float* out) {
  typedef float Floats __attribute__((vector_size(kRows * sizeof(float))));
  const int64_t width = ceil_div(f.order, kRows) * kRows;
  for (int64_t first = 0; first < count; first += f.order * inner, x += f.order * inner, out += f.order * inner) {
    for (int64_t j = 0; inner == 1 && j < f.order; j += kRows) {
      Floats sum{}, row;
      for (int64_t k = 0; k < f.order; ++k) {
        std::memcpy(&row, f.matrix + k * width + j, sizeof row);
        sum += x[k] * row;
      }
      const int64_t columns = f.order - j < kRows ? f.order - j : kRows;
      std::memcpy(out + j, &sum, static_cast<size_t>(columns) * sizeof *out);
    }
    for (int64_t j = 0; inner > 1 && j < f.order; ++j) {
      float* __restrict to = out + j * inner;
      std::memset(to, 0, static_cast<size_t>(inner) * sizeof *to);
      for (int64_t k = 0; k < f.order; ++k) {
        for (int64_t i = 0; i < inner; ++i) to[i] += x[k * inner + i] * f.matrix[k * width + j];
      }
    }
  }
}

const float* transform(const Transform& t, const float* x, int64_t columns, float* scratch) {
  float *from = scratch, *to = scratch + columns;
  std::memcpy(from, x, static_cast<size_t>(columns) * sizeof *x);
  int64_t inner = columns;
  for (const Factor* f = t.factors; f < t.factors + t.count; ++f) {
    inner /= f->order;
    if (f->matrix == nullptr) {
      butterflies(from, columns, f->order, inner);
    } else {
      dense_factor(*f, from, columns, inner, to);
      float* const swapped = from;
      from = to;
      to = swapped;
    }
  }
  for (int64_t i = 0; i < columns; ++i) from[i] *= t.scale;
  return from;
}

}  // namespace
}  // namespace codequant
