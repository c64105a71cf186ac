// Random shapes through every entry point, for the sanitizers and for processors that only an emulator has: repacking
// must round-trip, and each instruction set must give the portable one's bits, on any number of threads. Every buffer
// is its own allocation of exactly the documented size, so that AddressSanitizer sees the first byte beyond.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "experts.h"

extern "C" {
const char* codequant_isa(int64_t index);
int codequant_use_isa(const char* name);
int64_t codequant_bytes(const codequant::Matrices* m);
void codequant_to_panels(const codequant::Matrices* m, uint8_t* const*, int64_t part_rows, int8_t*, float*,
                         int64_t threads);
void codequant_from_panels(const codequant::Matrices* m, uint8_t* const*, int64_t part_rows, int8_t*, float*,
                           int64_t threads);
}

namespace {

std::mt19937 engine;

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); }

std::vector<float> normal(int64_t count) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = distribution(engine);
  return values;
}

using Bytes = std::vector<uint8_t>;

Bytes random(int64_t count, codequant::Dtype dtype) {
  const auto values = normal(count);
  Bytes bytes(static_cast<size_t>(count * codequant::size_of(dtype)));
  codequant::isa().narrow(dtype, values.data(), count, bytes.data());
  return bytes;
}

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what);
  std::exit(1);
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

std::vector<uint8_t*> pointers(std::vector<std::vector<uint8_t>>& parts) {
  std::vector<uint8_t*> found;
  for (auto& part : parts) found.push_back(part.data());
  return found;
}

struct Weight {
  std::vector<std::vector<uint8_t>> packed;  // parts
  std::vector<uint8_t> panels;
  std::vector<int8_t> codebook;
  std::vector<float> step;
  codequant::Matrices m;
  int64_t part_rows;

  Weight(int64_t count, int64_t rows, int64_t columns, int64_t groups, int64_t bits)
      : m{nullptr, count, rows, columns, groups, bits} {
    const int64_t row_bytes = (columns * bits + 7) / 8;
    do part_rows = draw(1, count * rows);
    while (count * rows % part_rows != 0);
    packed.assign(static_cast<size_t>(count * rows / part_rows), std::vector<uint8_t>(part_rows * row_bytes));
    for (auto& part : packed) {
      for (size_t i = 0; i < part.size(); ++i) {
        const bool last = (static_cast<int64_t>(i) + 1) % row_bytes == 0;
        const int64_t used = last ? columns * bits - (row_bytes - 1) * 8 : 8;
        part[i] = static_cast<uint8_t>(draw(0, (1 << used) - 1));
      }
    }
    codebook.resize(static_cast<size_t>(count * rows * groups << bits));
    for (int8_t& c : codebook) c = static_cast<int8_t>(draw(-127, 127));
    step = normal(count * rows * groups);
  }

  void prepare(int64_t threads) {
    panels.assign(static_cast<size_t>(codequant_bytes(&m)), 0xAA);
    m.panels = panels.data();
    codequant_to_panels(&m, pointers(packed).data(), part_rows, codebook.data(), step.data(), threads);
    std::vector<std::vector<uint8_t>> packed_back(packed.size(), std::vector<uint8_t>(packed[0].size()));
    std::vector<int8_t> codebook_back(codebook.size());
    std::vector<float> step_back(step.size());
    codequant_from_panels(&m, pointers(packed_back).data(), part_rows, codebook_back.data(), step_back.data(), threads);
    expect(packed == packed_back && same(codebook, codebook_back) && same(step, step_back), "round trip");
  }
};

void one_case() {
  const int64_t bits = draw(2, 4), groups = draw(1, 4), columns = groups * draw(1, draw(0, 9) == 0 ? 3000 : 90);
  const int64_t count = draw(1, 5), rows = draw(1, 40), middle = draw(1, 40), share = draw(1, 3);
  const int64_t tokens = draw(1, draw(0, 4) == 0 ? 150 : 15), gate = draw(0, 1);
  const auto activation = static_cast<codequant::Activation>(draw(0, 3));
  const int64_t activation_bits[] = {4, 8, 16};
  const int64_t input_bits = activation_bits[draw(0, 2)], down_bits = activation_bits[draw(0, 2)];
  Weight first(count * (1 + gate), middle, columns, groups, bits), second(count, rows, middle, 1, bits);
  const auto dtype = static_cast<codequant::Dtype>(draw(0, 2));
  const auto x = random(tokens * columns, dtype), weight = random(tokens * share, dtype);
  const auto first_bias = normal(first.m.count * middle), second_bias = normal(count * rows);
  std::vector<int32_t> expert(static_cast<size_t>(tokens * share));
  for (int32_t& e : expert) e = static_cast<int32_t>(draw(-1, count));
  const int64_t size = codequant::size_of(dtype), order = middle % 2 == 0 ? middle / 2 : middle;
  const auto matrix = normal(order * codequant::ceil_div(order, 16) * 16);
  const codequant::Factor factors[] = {{middle / order, nullptr}, {order, matrix.data()}};
  const codequant::Transform transform{factors, draw(0, 1) * 2, 0.3f};
  Bytes linear, experts;
  for (int64_t i = 0; codequant_isa(i) != nullptr; ++i) {
    expect(codequant_use_isa(codequant_isa(i)) == 0, "a listed instruction set can be chosen");
    const int64_t threads = draw(1, 3);
    first.prepare(threads);
    second.prepare(threads);
    Bytes y(static_cast<size_t>(tokens * share * middle * size), 0xAA);
    codequant_linear(&first.m, tokens, share, x.data(), dtype, expert.data(), codequant::Dtype::int32,
                     first_bias.data(), input_bits, 0.9f, threads, y.data(), dtype);
    expect(i == 0 || same(y, linear), "linear has the same bits on every instruction set");
    linear = y;
    const codequant::Experts e{&first.m,   &second.m, first_bias.data(), second_bias.data(), gate,
                               activation, input_bits, down_bits, 1.0f, 0.9f, transform};
    y.assign(static_cast<size_t>(tokens * rows * size), 0xAA);
    codequant_experts(&e, tokens, share, x.data(), dtype, expert.data(), codequant::Dtype::int32, weight.data(), dtype,
                      threads, y.data());
    expect(i == 0 || same(y, experts), "experts have the same bits on every instruction set");
    experts = y;
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  std::string sets;
  for (int64_t i = 0; codequant_isa(i) != nullptr; ++i) sets += std::string(" ") + codequant_isa(i);
  for (int i = 0; i < cases; ++i) {
    engine.seed(static_cast<unsigned>(i));
    one_case();
  }
  std::printf("%d cases:%s\n", cases, sets.c_str());
}
