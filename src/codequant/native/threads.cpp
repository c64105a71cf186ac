#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace codequant {
namespace {

class Pool {
 public:
  void run(int64_t threads, int64_t count, const std::function<void(int64_t)>& task) {
    {
      std::lock_guard lock(mutex_);
      grow(threads - 1);
      task_ = &task;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      places_ = std::min(threads - 1, size_);
    }
    for (int64_t i = std::min(threads - 1, count - 1); i > 0; --i) wake_.notify_one();
    work(task, count);
    std::unique_lock lock(mutex_);
    places_ = 0;  // a thread that wakes up only now finds nothing, and nobody waits for it
    done_.wait(lock, [&] { return busy_ == 0; });
  }

  std::mutex caller;  // held by the one thread that uses the pool

 private:
  void grow(int64_t size) {
    try {
      for (; size_ < size; ++size_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // No more threads to be had: those that are there do the work.
    }
  }

  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return places_ > 0; });
      --places_;
      ++busy_;
      const std::function<void(int64_t)>* task = task_;
      const int64_t count = count_;
      lock.unlock();
      work(*task, count);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void work(const std::function<void(int64_t)>& task, int64_t count) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
  }

  std::mutex mutex_;  // guards all below but next_
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t count_ = 0, size_ = 0, busy_ = 0;
  int64_t places_ = 0;  // threads that may still join the current work
  std::atomic<int64_t> next_{0};
};

Pool* pool = nullptr;  // never destroyed: its threads outlive static destructors

void make_pool() { pool = new Pool; }

void start() {
  make_pool();
  pthread_atfork(nullptr, nullptr, make_pool);  // the parent's threads do not exist in the child
}

}  // namespace

void parallel_for(int64_t threads, int64_t count, const std::function<void(int64_t)>& task) {
  static std::once_flag once;
  std::call_once(once, start);
  if (threads > 1 && count > 1) {
    std::unique_lock lock(pool->caller, std::try_to_lock);
    if (lock.owns_lock()) return pool->run(threads, count, task);
  }
  for (int64_t i = 0; i < count; ++i) task(i);
}

}  // namespace codequant
