// The two entry points of experts.cpp, for those who call them from C++.
#pragma once

#include "isa.h"

namespace codequant {

// The fields of codequant_experts' argument; kernels/cpu.py mirrors it.
struct Experts {
  const Matrices* gate_up;  // has_gate: matrix 2 * e is the gate of expert e, 2 * e + 1 its up
  const Matrices* down;
  const float* gate_up_bias;  // [gate_up->count, gate_up->rows] or null
  const float* down_bias;     // [down->count, down->rows] or null
  int64_t has_gate;
  Activation activation;
  int64_t input_bits, down_bits;
  float input_clip, down_clip;
  Transform down_transform;  // of the intermediate, before it is quantized
};

}  // namespace codequant

// y [tokens * share, m->rows]: row s is W[expert[s]] @ x[s / share] + bias[expert[s]], or 0 where expert[s] is not
// one of the m->count matrices; expert null means matrix 0 throughout. x [tokens, m->columns], bias [count, rows] or
// null. bits 4, 8 or 16. Returns 0, or 1 when memory is short.
CODEQUANT_API int codequant_linear(const codequant::Matrices* m, int64_t tokens, int64_t share, const void* x,
                                   codequant::Dtype x_dtype, const void* expert, codequant::Dtype expert_dtype,
                                   const float* bias, int64_t bits, float clip, int64_t threads, void* y,
                                   codequant::Dtype y_dtype);

// y [tokens, down->rows] = sum over j < share of weight[t, j] * down(activation(gate(x[t])) * up(x[t])) of expert
// expert[t, j], in x's dtype. x [tokens, gate_up->columns]. Returns 0, or 1 when memory is short.
CODEQUANT_API int codequant_experts(const codequant::Experts* e, int64_t tokens, int64_t share, const void* x,
                                    codequant::Dtype x_dtype, const void* expert, codequant::Dtype expert_dtype,
                                    const void* weight, codequant::Dtype weight_dtype, int64_t threads, void* y);
