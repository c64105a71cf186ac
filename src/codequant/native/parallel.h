// Independent tasks on a few threads. Which thread runs a task never changes its result, so neither does their number.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// Calls worker(next) on `threads` threads; each worker loops `while ((task = next()) < tasks)` and so can keep its
// scratch memory from one task to the next.
template <typename Worker>
void parallel(int64_t tasks, int threads, const Worker& worker) {
    std::atomic<int64_t> counter{0};
    auto next = [&counter] { return counter.fetch_add(1, std::memory_order_relaxed); };
    const int64_t helpers = std::min<int64_t>(threads, tasks) - 1;
    std::vector<std::thread> pool;
    for (int64_t i = 0; i < helpers; ++i) pool.emplace_back([&] { worker(next); });
    worker(next);
    for (auto& thread : pool) thread.join();
}
