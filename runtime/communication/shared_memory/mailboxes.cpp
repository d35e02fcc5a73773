// Messages between the processes of one host: a queue of them from every rank to every other, in memory that all map.
//
//   segment    one Door per rank, then a Mailbox per (sender, receiver), then an arena of `arena_bytes` per rank
//   post       put the message into a slot of my arena, its place into the mailbox; count up what is posted
//   take       wait for the next one of that sender; copy it out; count up what is taken
//
// A sender does not wait: what it has posted may be written to at once, and where no slot is free it makes another one.
// A slot is free again when its message was taken. Slots have a few sizes per power of two, and those of a size are
// kept for it; memory is taken from the system when an arena grows, up to what was ever under way at once. A mailbox
// has LETTERS places: only where as many are untaken does the sender wait.
//
// Waiting (`waiting.h`) ends after `patience_ns` at the latest, with nothing done, and is called again.

#include <fcntl.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <deque>
#include <new>
#include <unordered_map>
#include <vector>

#include "waiting.h"

namespace {

constexpr uint32_t LETTERS = 64;
constexpr int64_t GROWTH_BYTES = 1 << 20, SHORTEST_SLOT = 256, POLL_NS = 100000;

// kind: what the sender is doing, compared by the receiver, as are the bytes.
struct Letter {
  int64_t kind;
  int64_t bytes;
  int64_t offset;  // in the sender's arena
};

// Two cache lines each, because processors fetch them in pairs.
struct alignas(128) Door {
  std::atomic<uint32_t> left;
};

struct alignas(128) Mailbox {
  std::atomic<uint32_t> posted;
  std::atomic<uint32_t> sleepers;
  alignas(128) std::atomic<uint32_t> taken;
  alignas(128) Letter letters[LETTERS];
};

// A tensor's piece: rows of `width` bytes, each `stride` bytes behind the one before.
void pack(char* out, const char* in, int64_t rows, int64_t width, int64_t stride) {
  if (width == stride || rows == 1) {
    if (rows * width > 0) std::memcpy(out, in, rows * width);
    return;
  }
  for (int64_t row = 0; row < rows; ++row) std::memcpy(out + row * width, in + row * stride, width);
}

void unpack(char* out, const char* in, int64_t rows, int64_t width, int64_t stride) {
  if (width == stride || rows == 1) {
    if (rows * width > 0) std::memcpy(out, in, rows * width);
    return;
  }
  for (int64_t row = 0; row < rows; ++row) std::memcpy(out + row * stride, in + row * width, width);
}

// At most a quarter longer, and a whole number of cache lines.
int64_t slot_size(int64_t bytes) {
  int64_t step = SHORTEST_SLOT / 4;
  while (step * 8 < bytes) step *= 2;
  return std::max((bytes + step - 1) / step * step, SHORTEST_SLOT);
}

struct Slot {
  int64_t offset;
  int64_t size;
};

struct Post {
  char* base;
  int size;
  int me;
  int64_t arena_bytes;
  int descriptor;
  bool is_closed = false;
  Spin spin;
  int64_t used = 0, backed = 0;  // of my arena
  std::unordered_map<int64_t, std::vector<int64_t>> free;
  std::vector<std::deque<Slot>> posted;  // by receiver, what it has not taken
  std::vector<uint32_t> taken;           // by sender

  Door* door(int rank) const { return reinterpret_cast<Door*>(base) + rank; }

  Mailbox* box(int from, int to) const {
    char* boxes = base + size * sizeof(Door);
    return reinterpret_cast<Mailbox*>(boxes) + from * size + to;
  }

  char* arena(int rank) const {
    char* arenas = base + size * sizeof(Door) + static_cast<int64_t>(size) * size * sizeof(Mailbox);
    return arenas + rank * arena_bytes;
  }

  int64_t num_untaken(int to) const {
    Mailbox* mine = box(me, to);
    return mine->posted.load(std::memory_order_relaxed) - mine->taken.load(std::memory_order_acquire);
  }

  bool has_come(int from) const {
    // numbers wrap around: the difference does not
    return box(from, me)->posted.load(std::memory_order_acquire) != taken[from];
  }
};

void collect(Post* p) {
  for (int to = 0; to < p->size; ++to) {
    std::deque<Slot>& under_way = p->posted[to];
    if (under_way.empty()) continue;
    for (int64_t left = p->num_untaken(to); static_cast<int64_t>(under_way.size()) > left; under_way.pop_front()) {
      if (under_way.front().size > 0) p->free[under_way.front().size].push_back(under_way.front().offset);
    }
  }
}

// `segment`: where the arena is in the file. False: there is no memory.
bool allocate(Post* p, int64_t bytes, int64_t segment, Slot* found) {
  *found = {0, 0};
  if (bytes == 0) return true;
  int64_t size = slot_size(bytes);
  std::vector<int64_t>& free = p->free[size];
  if (!free.empty()) {
    *found = {free.back(), size};  // the one that came back last is most likely in a cache
    free.pop_back();
    return true;
  }
  if (p->used + size > p->arena_bytes) return false;
  if (p->used + size > p->backed) {
    int64_t more = std::max(p->used + size - p->backed, std::min(GROWTH_BYTES, p->arena_bytes - p->backed));
    // all of it now: a page that cannot be had when it is written to would end the process
    if (posix_fallocate(p->descriptor, segment + p->backed, more) != 0) return false;
    p->backed += more;
  }
  *found = {p->used, size};
  p->used += size;
  return true;
}

}  // namespace

extern "C" {

// Bytes that all ranks' doors and mailboxes take, before the arenas.
int64_t post_bytes(int size) {
  return size * static_cast<int64_t>(sizeof(Door)) + static_cast<int64_t>(size) * size * sizeof(Mailbox);
}

// How many messages from one rank to another may be posted and not taken.
int64_t post_letters() { return LETTERS; }

// `base`: in a mapped segment of the file `descriptor`, filled with zeros when it was made.
Post* post_new(void* base, int size, int me, int64_t arena_bytes, int descriptor) {
  Post* p = new (std::nothrow) Post{};
  if (p == nullptr) return nullptr;
  p->base = static_cast<char*>(base);
  p->size = size;
  p->me = me;
  p->arena_bytes = arena_bytes;
  p->descriptor = descriptor;
  p->posted.resize(size);
  p->taken.resize(size);
  return p;
}

void post_free(Post* p) { delete p; }

// x: rows of `width` bytes. `base_offset`: of `base` in its file. Copied when it returns DONE.
int post_send(Post* p, int to, const void* x, int64_t rows, int64_t width, int64_t stride, int64_t kind,
              int64_t base_offset, int64_t patience_ns) {
  if (p->is_closed) return BROKEN;
  Mailbox* box = p->box(p->me, to);
  int64_t deadline_ns = now_ns() + patience_ns;
  while (p->num_untaken(to) >= LETTERS) {
    if (p->door(to)->left.load(std::memory_order_acquire) != 0) return LEFT;
    if (now_ns() >= deadline_ns) return WAITING;
    timespec nap{0, POLL_NS};
    nanosleep(&nap, nullptr);
  }
  if (p->door(to)->left.load(std::memory_order_acquire) != 0) return LEFT;
  collect(p);
  Slot slot;
  char* arena = p->arena(p->me);
  if (!allocate(p, rows * width, base_offset + (arena - p->base), &slot)) return FULL;
  pack(arena + slot.offset, static_cast<const char*>(x), rows, width, stride);
  uint32_t number = box->posted.load(std::memory_order_relaxed);
  box->letters[number % LETTERS] = {kind, rows * width, slot.offset};
  p->posted[to].push_back(slot);
  count_up(&box->posted, number + 1, &box->sleepers);
  return DONE;
}

// The next message of `from` -> out, rows of `width` bytes. DISAGREE: it is another, which is dropped, and brought
// [2] says of what kind, and how many bytes.
int post_take(Post* p, int from, void* out, int64_t rows, int64_t width, int64_t stride, int64_t kind,
              int64_t patience_ns, int64_t* brought) {
  if (p->is_closed) return BROKEN;
  Mailbox* box = p->box(from, p->me);
  auto arrived = [p, from] { return p->has_come(from); };
  if (!arrived()) {
    int64_t deadline_ns = now_ns() + patience_ns;
    int status = wait_for(&p->spin, &box->posted, &box->sleepers, &p->door(from)->left, arrived, deadline_ns);
    if (status != DONE) return status;
  }
  Letter letter = box->letters[p->taken[from] % LETTERS];
  bool agrees = letter.kind == kind && letter.bytes == rows * width;
  if (agrees) {
    unpack(static_cast<char*>(out), p->arena(from) + letter.offset, rows, width, stride);
  } else {
    brought[0] = letter.kind;
    brought[1] = letter.bytes;
  }
  p->taken[from] += 1;
  box->taken.store(p->taken[from], std::memory_order_release);
  return agrees ? DONE : DISAGREE;
}

int post_has_come(const Post* p, int from) { return p->has_come(from) ? 1 : 0; }

int64_t post_num_untaken(const Post* p, int to) { return p->num_untaken(to); }

// Of my arena, what the system has given for it.
int64_t post_backed(const Post* p) { return p->backed; }

// This rank posts and takes nothing any more. What it has posted can be taken; those that wait for more learn it.
void post_leave(Post* p) {
  p->is_closed = true;
  p->door(p->me)->left.store(1, std::memory_order_release);
  for (int to = 0; to < p->size; ++to) wake_all(&p->box(p->me, to)->posted);
}

}  // extern "C"
