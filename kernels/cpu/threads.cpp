#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace quest {
namespace cpu {
namespace {

constexpr auto kSpin = std::chrono::microseconds(20);

class ThreadPool {
 public:
  void run(int64_t tasks, int threads, void (*task)(void*, int64_t), void* context) {
    while (static_cast<int>(workers_.size()) < threads - 1) {
      workers_.emplace_back([this] { work(); });
      workers_.back().detach();
    }
    task_ = task;
    context_ = context;
    tasks_ = tasks;
    next_.store(0, std::memory_order_relaxed);
    failed_ = tasks;
    error_ = nullptr;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      places_ = threads - 1;
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    share();
    {
      // A worker that has not joined by now finds no place and never touches this job.
      std::lock_guard<std::mutex> lock(mutex_);
      places_ = 0;
    }
    while (joined_.load(std::memory_order_acquire) > 0) std::this_thread::yield();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  void share() {
    for (;;) {
      const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= tasks_) return;
      try {
        task_(context_, i);
      } catch (...) {
        std::lock_guard<std::mutex> lock(error_mutex_);
        if (i < failed_) {
          failed_ = i;
          error_ = std::current_exception();
        }
      }
    }
  }

  void work() {
    uint64_t seen = 0;
    for (;;) {
      await(seen);
      {
        std::lock_guard<std::mutex> lock(mutex_);
        seen = round_.load(std::memory_order_relaxed);
        if (places_ == 0) continue;
        --places_;
        joined_.fetch_add(1, std::memory_order_relaxed);
      }
      share();
      joined_.fetch_sub(1, std::memory_order_release);
    }
  }

  void await(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 64; ++i) {
        if (round_.load(std::memory_order_acquire) != seen) return;
      }
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_, error_mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> joined_{0};
  void (*task_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t tasks_ = 0, failed_ = 0;
  int places_ = 0;
  std::exception_ptr error_;
};

// Leaked on purpose: detached threads may outlive static destruction, and a forked child, which
// inherits no threads, must start a pool of its own.
struct Shared {
  ThreadPool pool;
  std::mutex in_use;
};

Shared*& shared() {
  static Shared* one = [] {
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, [] { shared() = new Shared; });
#endif
    return new Shared;
  }();
  return one;
}

}  // namespace

void run_tasks(int64_t tasks, int threads, void (*task)(void*, int64_t), void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads > 1) {
    Shared* s = shared();
    std::unique_lock<std::mutex> lock(s->in_use, std::try_to_lock);
    if (lock.owns_lock()) {
      s->pool.run(tasks, threads, task, context);
      return;
    }
  }
  for (int64_t i = 0; i < tasks; ++i) task(context, i);
}

}  // namespace cpu
}  // namespace quest
