// The two entry points that compute: a codebook linear layer (of one matrix, or of one per expert), and the whole
// feed-forward of a mixture of experts. Both quantize the tokens, sort them by expert, and hand out (expert, panels)
// tasks; the arithmetic is panel.h's.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "experts.h"
#include "threads.h"

namespace codequant {
namespace {

constexpr int64_t kSlice = 2048;      // tokens whose intermediate is held at once
constexpr int64_t kHugePage = 2 << 20;

void advise_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Memory that keeps its largest size, uninitialized: fresh pages for every call would cost a tenth of a prefill.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  template <class T>
  T* get(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (bytes > bytes_) {
      std::free(data_);
      data_ = nullptr;
      bytes_ = 0;
      const int64_t alignment = bytes < kHugePage ? 64 : kHugePage;
      const int64_t rounded = ceil_div(bytes, alignment) * alignment;
      data_ = std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(rounded));
      if (data_ == nullptr) throw std::bad_alloc();
      advise_huge_pages(data_, rounded);
      bytes_ = rounded;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

struct Workspace {
  Buffer levels, tokens, weights, hidden, hidden_levels, hidden_tokens;
};
thread_local Workspace workspace;

// The numbers of a tensor of the caller's.
struct Values {
  const void* data;
  Dtype dtype;

  Values from(int64_t first) const { return {static_cast<const char*>(data) + first * size_of(dtype), dtype}; }

  // [first, first + count) of a floating-point dtype; `buffer` holds them where they are not float32 already.
  const float* floats(int64_t first, int64_t count, Buffer& buffer) const {
    const Values part = from(first);
    if (dtype == Dtype::float32) return static_cast<const float*>(part.data);
    float* wide = buffer.get<float>(count);
    isa().widen(dtype, part.data, count, wide);
    return wide;
  }

  int64_t integer(int64_t i) const {
    return dtype == Dtype::int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Where the result goes.
struct Output {
  void* data;
  Dtype dtype;

  char* at(int64_t i) const { return static_cast<char*>(data) + i * size_of(dtype); }
  void write(int64_t first, const float* values, int64_t count) const {
    isa().narrow(dtype, values, count, at(first));
  }
};

// x [rows, m.columns], transformed -> planes(bits) tokens per row.
const Token* quantize_rows(const Matrices& m, Values x, int64_t rows, const Transform& transform, int64_t bits,
                           float clip, int64_t threads, Buffer& levels, Buffer& tokens) {
  constexpr int64_t kBlock = 16;
  const int64_t row_bytes = planes(bits) * m.level_bytes();
  uint8_t* level = levels.get<uint8_t>(rows * row_bytes + tile_slack(m));
  Token* token = tokens.get<Token>(rows * planes(bits));
  parallel_for(threads, ceil_div(rows, kBlock), [&](int64_t block) {
    thread_local Buffer wide, scratch;
    for (int64_t row = block * kBlock; row < std::min(rows, (block + 1) * kBlock); ++row) {
      const float* values = x.floats(row * m.columns, m.columns, wide);
      if (transform.count > 0) {
        values = isa().transform(transform, values, m.columns, scratch.get<float>(2 * m.columns));
      }
      isa().quantize(m, values, bits, clip, level + row * row_bytes, token + row * planes(bits));
    }
  });
  return token;
}

// Some rows of the same quantized input, to be multiplied with panel after panel.
struct Batch {
  alignas(64) uint8_t scratch[kScratch];
  alignas(64) float out[kWidth][kMaxTokens][kRows];
  Token tokens[kMaxTokens];
  int64_t planes, count = 0;

  explicit Batch(int64_t bits) : planes(codequant::planes(bits)) {}

  // As many rows as fit of row(0), ..., row(left - 1).
  template <class F>
  void fill(const Matrices& m, const Token* all, int64_t left, F row) {
    count = std::min(left, most_tokens(m) / planes);
    bool in_a_row = true;
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(all + row(i) * planes, planes, tokens + i * planes);
      in_a_row &= row(i) == row(0) + i;
    }
    if (isa().tiles && !in_a_row) gather(m);
  }

  void gather(const Matrices& m) {
    thread_local Buffer buffer;
    const int64_t bytes = m.level_bytes();
    uint8_t* level = buffer.get<uint8_t>(kMaxTokens * bytes + tile_slack(m));
    for (int64_t i = 0; i < count * planes; ++i, level += bytes) {
      std::memcpy(level, tokens[i].level, static_cast<size_t>(bytes));
      tokens[i].level = level;
    }
  }

  // out[i] [count, kRows] = tokens times panel i, for the panel `first` and, where not null, `second`.
  void multiply(const Matrices& m, const uint8_t* first, const uint8_t* second) {
    const Panel panels[kWidth] = {{first, out[0]}, {second, out[1]}};
    const int64_t width = second == nullptr ? 1 : 2;
    isa().product(m, panels, width, tokens, count * planes, scratch);
    for (int64_t p = 0; planes > 1 && p < width; ++p) {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t r = 0; r < kRows; ++r) {
          out[p][i][r] = out[p][i * planes][r] + out[p][i * planes + 1][r] + out[p][i * planes + 2][r];
        }
      }
    }
  }

  // f(panel, its products) for the panels [first, last) of one matrix, taken as pairs from the two halves.
  template <class F>
  void each_panel(const Matrices& m, int64_t matrix, int64_t first, int64_t last, F f) {
    const int64_t half = ceil_div(last - first, 2);
    for (int64_t p = first; p < first + half; ++p) {
      const bool paired = p + half < last;
      multiply(m, m.panel(matrix, p), paired ? m.panel(matrix, p + half) : nullptr);
      f(p, out[0]);
      if (paired) f(p + half, out[1]);
    }
  }
};

void add_bias(float (*out)[kRows], int64_t count, const float* bias, int64_t rows) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t r = 0; r < rows; ++r) out[i][r] += bias[r];
  }
}

// Copies the results of a panel for one token. Without a call where all rows are true ones, as in all but the last panel.
void put(const float (&out)[kRows], int64_t rows, float* to) {
  if (rows == kRows) {
    std::memcpy(to, out, sizeof out);
  } else {
    std::copy_n(out, rows, to);
  }
}

// The slots (token, choice) of one expert: order[first .. first + count) of its Route.
struct Group {
  int64_t expert, first, count;
};

struct Route {
  std::vector<int64_t> order;  // slots sorted by expert, stable
  std::vector<Group> groups;   // of the experts that have any
};

// expert [slots]; null means that all slots go to expert 0. An index that is no expert's is left out.
Route route(Values expert, int64_t slots, int64_t experts) {
  const auto of = [&](int64_t slot) { return expert.data == nullptr ? 0 : expert.integer(slot); };
  const auto valid = [&](int64_t slot) { return of(slot) >= 0 && of(slot) < experts; };
  std::vector<int64_t> end(static_cast<size_t>(experts), 0);
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (valid(slot)) ++end[static_cast<size_t>(of(slot))];
  }
  Route result;
  int64_t total = 0;
  for (int64_t e = 0; e < experts; ++e) {
    int64_t& count = end[static_cast<size_t>(e)];
    if (count > 0) result.groups.push_back({e, total, count});
    total += std::exchange(count, total);  // from here on: where the expert's next slot goes
  }
  result.order.resize(static_cast<size_t>(total));
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (valid(slot)) result.order[static_cast<size_t>(end[static_cast<size_t>(of(slot))]++)] = slot;
  }
  return result;
}

// How many tasks to cut the panels of one expert into, for about eight tasks per thread.
int64_t cuts(int64_t threads, int64_t groups, int64_t panels) {
  return threads == 1 ? 1 : std::clamp<int64_t>(ceil_div(8 * threads, groups), 1, panels);
}

// Waking threads costs tens of microseconds: as much as a million products.
int64_t useful_threads(int64_t threads, int64_t slots, const Matrices& m) {
  return slots * m.rows * m.columns < (1 << 20) ? 1 : std::max<int64_t>(threads, 1);
}

// Results of some panels go to memory together: a row of y is pages away from the next, and sixteen of its numbers are
// half a line of bfloat16.
constexpr int64_t kResults = 1 << 16;  // 256 KiB

void linear(const Matrices& m, Values x, int64_t tokens, int64_t share, Values expert, const float* bias, int64_t bits,
            float clip, int64_t threads, Output y) {
  const Route routed = route(expert, tokens * share, m.count);
  if (static_cast<int64_t>(routed.order.size()) < tokens * share) {
    std::fill(y.at(0), y.at(tokens * share * m.rows), char{0});
  }
  if (routed.groups.empty()) return;
  const Token* token = quantize_rows(m, x, tokens, {}, bits, clip, threads, workspace.levels, workspace.tokens);
  const int64_t panels = m.panels_each(), cut = cuts(threads, static_cast<int64_t>(routed.groups.size()), panels);
  parallel_for(threads, static_cast<int64_t>(routed.groups.size()) * cut, [&](int64_t task) {
    const Group& group = routed.groups[static_cast<size_t>(task / cut)];
    const int64_t* slot = routed.order.data() + group.first;
    const int64_t first = panels * (task % cut) / cut, last = panels * (task % cut + 1) / cut;
    thread_local Buffer buffer;
    Batch batch(bits);
    for (int64_t done = 0; done < group.count; done += batch.count) {
      batch.fill(m, token, group.count - done, [&](int64_t i) { return slot[done + i] / share; });
      const int64_t together = std::clamp<int64_t>(kResults / (batch.count * kRows), 1, last - first);
      const int64_t width = (together + 1) * kRows;  // a line more than a power of two: else rows meet in few sets
      float* results = buffer.get<float>(batch.count * width);
      for (int64_t start = first; start < last; start += together) {
        const int64_t stop = std::min(start + together, last);
        batch.each_panel(m, group.expert, start, stop, [&](int64_t p, float(*out)[kRows]) {
          const int64_t rows = std::min(kRows, m.rows - p * kRows);
          if (bias != nullptr) add_bias(out, batch.count, bias + group.expert * m.rows + p * kRows, rows);
          float* column = results + (p - start) * kRows;
          for (int64_t i = 0; i < batch.count; ++i) put(out[i], kRows, column + i * width);
        });
        const int64_t rows = std::min(stop * kRows, m.rows) - start * kRows;
        for (int64_t i = 0; i < batch.count; ++i) {
          y.write(slot[done + i] * m.rows + start * kRows, results + i * width, rows);
        }
      }
    }
  });
}

// activation(gate) * up of every slot of the route -> hidden [routed.order.size(), gate_up->rows].
void gate_and_up(const Experts& e, const Route& routed, const Token* token, int64_t share, int64_t threads,
                 float* hidden) {
  const Matrices& m = *e.gate_up;
  const int64_t panels = m.panels_each(), cut = cuts(threads, static_cast<int64_t>(routed.groups.size()), panels);
  parallel_for(threads, static_cast<int64_t>(routed.groups.size()) * cut, [&](int64_t task) {
    const Group& group = routed.groups[static_cast<size_t>(task / cut)];
    const int64_t* slot = routed.order.data() + group.first;
    const int64_t matrix = e.has_gate ? 2 * group.expert : group.expert;
    Batch batch(e.input_bits);
    for (int64_t done = 0; done < group.count; done += batch.count) {
      batch.fill(m, token, group.count - done, [&](int64_t i) { return slot[done + i] / share; });
      for (int64_t p = panels * (task % cut) / cut; p < panels * (task % cut + 1) / cut; ++p) {
        const int64_t rows = std::min(kRows, m.rows - p * kRows);
        batch.multiply(m, m.panel(matrix, p), e.has_gate ? m.panel(matrix + 1, p) : nullptr);
        for (int64_t i = 0; e.gate_up_bias != nullptr && i <= e.has_gate; ++i) {
          add_bias(batch.out[i], batch.count, e.gate_up_bias + (matrix + i) * m.rows + p * kRows, rows);
        }
        float(*gate)[kRows] = batch.out[0];
        isa().activate(e.activation, gate[0], e.has_gate ? batch.out[1][0] : nullptr, batch.count * kRows);
        for (int64_t i = 0; i < batch.count; ++i) {
          put(gate[i], rows, hidden + (group.first + done + i) * m.rows + p * kRows);
        }
      }
    }
  });
}

// y [tokens, down->rows] = the weighted sum of down(hidden) over the slots of each token. A task owns some columns of
// y and adds the experts to them in their order, so nothing is shared and the order of the sum is fixed.
void down_and_sum(const Experts& e, const Route& routed, const Token* token, int64_t tokens, int64_t share,
                  const float* weight, int64_t threads, Output y) {
  constexpr int64_t kSums = 1 << 18;  // of one task: 1 MiB, that the second cache holds beside the levels
  const Matrices& m = *e.down;
  const int64_t panels = m.panels_each();
  const int64_t cut = std::clamp(cuts(threads, 1, panels), std::min(ceil_div(tokens * m.rows, kSums), panels), panels);
  parallel_for(threads, cut, [&](int64_t task) {
    thread_local Buffer buffer;
    const int64_t first = panels * task / cut, last = panels * (task + 1) / cut;
    const int64_t columns = (last - first) * kRows;
    float* sums = buffer.get<float>(tokens * columns);  // [tokens, columns]
    std::fill_n(sums, tokens * columns, 0.0f);
    Batch batch(e.down_bits);
    for (const Group& group : routed.groups) {
      for (int64_t done = 0; done < group.count; done += batch.count) {
        batch.fill(m, token, group.count - done, [&](int64_t i) { return group.first + done + i; });
        const int64_t* slot = routed.order.data() + group.first + done;
        batch.each_panel(m, group.expert, first, last, [&](int64_t p, float(*out)[kRows]) {
          const int64_t rows = std::min(kRows, m.rows - p * kRows);
          if (e.down_bias != nullptr) add_bias(out, batch.count, e.down_bias + group.expert * m.rows + p * kRows, rows);
          for (int64_t i = 0; i < batch.count; ++i) {
            float* __restrict target = sums + slot[i] / share * columns + (p - first) * kRows;
            const float scale = weight[slot[i]];
            for (int64_t r = 0; r < kRows; ++r) target[r] += scale * out[i][r];
          }
        });
      }
    }
    const int64_t rows = std::min(columns, m.rows - first * kRows);
    for (int64_t t = 0; t < tokens; ++t) y.write(t * m.rows + first * kRows, sums + t * columns, rows);
  });
}

void experts(const Experts& e, Values x, int64_t tokens, int64_t share, Values expert, Values weight, int64_t threads,
             Output y) {
  Workspace& w = workspace;
  const Route routed = route(expert, tokens * share, e.down->count);
  const int64_t slots = static_cast<int64_t>(routed.order.size());
  const Token* token =
      quantize_rows(*e.gate_up, x, tokens, {}, e.input_bits, e.input_clip, threads, w.levels, w.tokens);
  float* hidden = w.hidden.get<float>(slots * e.gate_up->rows);
  gate_and_up(e, routed, token, share, threads, hidden);
  token = quantize_rows(*e.down, {hidden, Dtype::float32}, slots, e.down_transform, e.down_bits, e.down_clip, threads,
                        w.hidden_levels, w.hidden_tokens);
  down_and_sum(e, routed, token, tokens, share, weight.floats(0, tokens * share, w.weights), threads, y);
}

}  // namespace
}  // namespace codequant

// Ask for huge pages before memory is first written: 35 against 27 GB/s on one core of a Zen 5.
CODEQUANT_API void codequant_advise_huge_pages(void* data, int64_t bytes) { codequant::advise_huge_pages(data, bytes); }

using codequant::Dtype;

CODEQUANT_API int codequant_linear(const codequant::Matrices* m, int64_t tokens, int64_t share, const void* x,
                                   Dtype x_dtype, const void* expert, Dtype expert_dtype, const float* bias,
                                   int64_t bits, float clip, int64_t threads, void* y, Dtype y_dtype) try {
  threads = codequant::useful_threads(threads, tokens * share, *m);
  codequant::linear(*m, {x, x_dtype}, tokens, share, {expert, expert_dtype}, bias, bits, clip, threads, {y, y_dtype});
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

CODEQUANT_API int codequant_experts(const codequant::Experts* e, int64_t tokens, int64_t share, const void* x,
                                    Dtype x_dtype, const void* expert, Dtype expert_dtype, const void* weight,
                                    Dtype weight_dtype, int64_t threads, void* y) try {
  const codequant::Values xs{x, x_dtype}, indices{expert, expert_dtype}, weights{weight, weight_dtype};
  const codequant::Output out{y, x_dtype};
  threads = codequant::useful_threads(threads, tokens * share, *e->gate_up);
  for (int64_t first = 0; first < tokens; first += codequant::kSlice) {
    codequant::experts(*e, xs.from(first * e->gate_up->columns), std::min(codequant::kSlice, tokens - first), share,
                       indices.from(first * share), weights.from(first * share), threads,
                       {out.at(first * e->down->rows), x_dtype});
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
