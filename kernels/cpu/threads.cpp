#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#endif

#include "openmp.h"

namespace quest {
namespace cpu {
namespace {

constexpr auto kSpin = std::chrono::microseconds(20);

// Numbered tasks that several threads share out.
class Round {
 public:
  Round(int64_t tasks, void (*task)(void*, int64_t), void* context)
      : tasks_(tasks), task_(task), context_(context), failed_(tasks) {}

  // Takes tasks until none is left.
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

  // When all threads have ended: the exception of the lowest failing task.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const int64_t tasks_;
  void (*const task_)(void*, int64_t);
  void* const context_;
  std::atomic<int64_t> next_{0};
  std::mutex error_mutex_;
  int64_t failed_;
  std::exception_ptr error_;
};

class ThreadPool {
 public:
  void run(Round& round, int threads) {
    while (static_cast<int>(workers_.size()) < threads - 1) {
      workers_.emplace_back([this] { work(); });
      workers_.back().detach();
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      round_ = &round;
      places_ = threads - 1;
      rounds_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    round.share();
    {
      // A worker that has not joined by now finds no place and never touches this round.
      std::lock_guard<std::mutex> lock(mutex_);
      places_ = 0;
    }
    while (joined_.load(std::memory_order_acquire) > 0) std::this_thread::yield();
  }

 private:
  void work() {
    uint64_t seen = 0;
    for (;;) {
      await(seen);
      Round* round;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        seen = rounds_.load(std::memory_order_relaxed);
        if (places_ == 0) continue;
        --places_;
        joined_.fetch_add(1, std::memory_order_relaxed);
        round = round_;
      }
      round->share();
      joined_.fetch_sub(1, std::memory_order_release);
    }
  }

  void await(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 64; ++i) {
        if (rounds_.load(std::memory_order_acquire) != seen) return;
      }
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return rounds_.load(std::memory_order_acquire) != seen; });
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> rounds_{0};
  std::atomic<int> joined_{0};
  Round* round_ = nullptr;
  int places_ = 0;
};

// Leaked on purpose: detached threads may outlive static destruction, and a forked child, which
// inherits no threads, must start a pool of its own (OpenMP's runtime would wait for lost ones).
struct Shared {
  ThreadPool pool;
  std::mutex in_use;
  bool forked = false;
};

Shared*& shared() {
  static Shared* one = [] {
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, [] {
      shared() = new Shared;
      shared()->forked = true;
    });
#endif
    return new Shared;
  }();
  return one;
}

}  // namespace

void run_tasks(int64_t tasks, int threads, void (*task)(void*, int64_t), void* context) {
  Shared* s = shared();
  if (threads > 1 && tasks > 1) {
    Round round(tasks, task, context);
    const OpenMp& openmp = torch_openmp();
    // Another number than torch's would make the runtime end and start threads at each change.
    if (openmp.parallel != nullptr && openmp.max_threads() == threads && !s->forked) {
      openmp.parallel([](void* all) { static_cast<Round*>(all)->share(); }, &round,
                      static_cast<unsigned>(threads), 0);
      round.rethrow();
      return;
    }
    std::unique_lock<std::mutex> lock(s->in_use, std::try_to_lock);
    if (lock.owns_lock()) {
      s->pool.run(round, threads > tasks ? static_cast<int>(tasks) : threads);
      round.rethrow();
      return;
    }
  }
  for (int64_t i = 0; i < tasks; ++i) task(context, i);
}

}  // namespace cpu
}  // namespace quest
