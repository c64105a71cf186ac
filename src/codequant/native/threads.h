// Threads that wait for work without spinning.
#pragma once

#include <cstdint>
#include <functional>

namespace codequant {

// task(i) for every i in [0, count), on at most `threads` threads, the caller being one; returns when all are done.
// Tasks must not depend on one another, nor on who runs them, and must not call this function. A call from a second
// thread while another one is under way runs on its caller alone. After fork() the child starts threads of its own.
void parallel_for(int64_t threads, int64_t count, const std::function<void(int64_t)>& task);

}  // namespace codequant
