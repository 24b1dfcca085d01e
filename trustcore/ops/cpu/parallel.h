// A small fork-join pool for work of microseconds.
//
// A decoder step makes over a hundred short products; waking a sleeping thread for each would cost as much as the
// product. Workers therefore spin for a short while after a job before they sleep, and a caller never waits for a
// worker that did not wake in time: parts are claimed one by one, and the caller claims what nobody else does. One job
// runs at a time: a call that finds the pool busy (XLA may run independent operations at once) does its work on its own
// thread.
//
// Invariant: a part of job n is claimed by a compare-and-swap on (n, next part), so a worker that comes late to a job
// can neither claim a part of another one nor touch a task that has returned.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tc {

inline void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  static Pool& get() {
    static Pool* pool = new Pool();  // never destroyed: workers may still spin while the process ends
    return *pool;
  }

  int size() const { return threads_; }

  // Calls task(part) for every part in [0, parts), on all threads, and returns when all are done.
  template <typename Task>
  void run(int64_t parts, const Task& task) {
    if (parts <= 1 || threads_ == 1 || !busy_.try_lock()) {
      for (int64_t i = 0; i < parts; ++i) task(i);
      return;
    }
    task_.store(&task, std::memory_order_relaxed);
    call_.store([](const void* t, int64_t part) { (*static_cast<const Task*>(t))(part); }, std::memory_order_relaxed);
    parts_.store(static_cast<uint32_t>(parts), std::memory_order_relaxed);
    left_.store(parts, std::memory_order_relaxed);
    const uint64_t job = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(job << 32, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    take_parts(job);
    while (left_.load(std::memory_order_acquire) != 0) pause_cpu();
    busy_.unlock();
  }

 private:
  // Some 50 microseconds of polling: longer than the gap between two products of a decoder layer, short enough that a
  // core is not kept from somebody else.
  static constexpr int kSpins = 2000;

  Pool() : threads_(static_cast<int>(std::thread::hardware_concurrency())) {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) threads_ = CPU_COUNT(&set);
#endif
    if (threads_ < 1) threads_ = 1;
    for (int i = 1; i < threads_; ++i) std::thread([this] { serve(); }).detach();
  }

  uint64_t current_job() const { return ticket_.load(std::memory_order_seq_cst) >> 32; }

  void take_parts(uint64_t job) {
    for (;;) {
      const void* task = task_.load(std::memory_order_relaxed);
      auto call = call_.load(std::memory_order_relaxed);
      const uint32_t parts = parts_.load(std::memory_order_relaxed);
      uint64_t ticket = ticket_.load(std::memory_order_acquire);
      do {
        if (ticket >> 32 != job || static_cast<uint32_t>(ticket) >= parts) return;
      } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel));
      call(task, static_cast<uint32_t>(ticket));
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      int spins = 0;
      uint64_t job;
      while ((job = current_job()) == seen) {
        if (++spins < kSpins) {
          pause_cpu();
          continue;
        }
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return current_job() != seen; });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      }
      seen = job;
      take_parts(job);
    }
  }

  int threads_;
  std::mutex busy_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> ticket_{0};  // job number in the upper half, next part in the lower
  std::atomic<int64_t> left_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<uint32_t> parts_{0};
  std::atomic<const void*> task_{nullptr};
  std::atomic<void (*)(const void*, int64_t)> call_{nullptr};
};

}  // namespace tc
