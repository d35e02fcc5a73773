// How a rank waits for a word that another process counts up: it spins for a moment, then sleeps on the word, a futex.
//
// How long it spins is learned: with a core for every rank it saves the wake-up; where ranks outnumber cores, or others
// keep the cores busy, the awaited rank may need this very core. Waiting ends at a deadline, so that the caller, in
// Python, can see to signals and lost ranks.

#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace {

enum Status { DONE = 0, WAITING = 1, LEFT = 2, DISAGREE = 3, BROKEN = 4, FULL = 5 };

static_assert(std::atomic<uint32_t>::is_always_lock_free, "locks do not work between processes");

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void sleep_on(std::atomic<uint32_t>* word, uint32_t seen, int64_t ns) {
  timespec t{static_cast<time_t>(ns / 1000000000LL), static_cast<long>(ns % 1000000000LL)};
  syscall(SYS_futex, word, FUTEX_WAIT, seen, &t, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>* word) { syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0); }

// Sequentially consistent, as is the sleeper's side: either it sees the new number, or we see that it sleeps.
void count_up(std::atomic<uint32_t>* word, uint32_t number, const std::atomic<uint32_t>* sleepers) {
  word->store(number, std::memory_order_seq_cst);
  if (sleepers->load(std::memory_order_seq_cst) > 0) wake_all(word);
}

constexpr int64_t SHORTEST_SPIN_NS = 2000, LONGEST_SPIN_NS = 100000;
constexpr uint32_t PROBE_EVERY = 32;  // waits: try the longest, lest a busy moment shorten it for good

struct Spin {
  int64_t ns = LONGEST_SPIN_NS;
  int64_t num_waits = 0;
};

// arrived(): whether what is awaited has come, read with acquire.
template <typename Arrived>
bool spin_for(Spin* spin, Arrived arrived) {
  bool probe = ++spin->num_waits % PROBE_EVERY == 0;
  int64_t limit = probe ? LONGEST_SPIN_NS : spin->ns, start = now_ns(), passed = 0;
  do {
    for (int i = 0; i < 16; ++i) {
      if (arrived()) {
        spin->ns = std::min(std::max(spin->ns, 2 * passed), LONGEST_SPIN_NS);
        return true;
      }
      relax();
    }
    passed = now_ns() - start;
  } while (passed < limit);
  spin->ns = std::max(spin->ns / 2, SHORTEST_SPIN_NS);
  return false;
}

// Until `word`, of another rank, has made arrived() true. left: set by that rank when it takes part in nothing any more.
template <typename Arrived>
int wait_for(Spin* spin, std::atomic<uint32_t>* word, std::atomic<uint32_t>* sleepers,
             const std::atomic<uint32_t>* left, Arrived arrived, int64_t deadline_ns) {
  if (spin_for(spin, arrived)) return DONE;
  for (;;) {
    // read before the word: a rank that has brought its last part may leave
    bool gone = left->load(std::memory_order_acquire) != 0;
    if (arrived()) return DONE;
    if (gone) return LEFT;
    int64_t rest = deadline_ns - now_ns();
    if (rest <= 0) return WAITING;
    sleepers->fetch_add(1, std::memory_order_seq_cst);
    uint32_t seen = word->load(std::memory_order_seq_cst);
    if (!arrived()) sleep_on(word, seen, rest);
    sleepers->fetch_sub(1, std::memory_order_seq_cst);
  }
}

}  // namespace
