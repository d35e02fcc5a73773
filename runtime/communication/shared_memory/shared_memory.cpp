// all_reduce and all_gather of the processes of one host, through memory that all of them have mapped.
//
//   segment    one Line per rank, then two slots of `slot_bytes` per rank
//   one part   put my piece into a slot; count my line's sequence up; wait for everyone's; read everyone's slots
//
// The two slots take turns. Who has seen everyone at part n+1 knows that all have finished reading part n, and may
// write the slot of part n again: one meeting per part is enough. Longer tensors take several parts. Where three ranks
// or more sum large parts, each sums a share, and puts it into its slot in place of its piece; they meet again and read
// the shares.
//
// Waiting (`waiting.h`) ends after `patience_ns` at the latest and goes on when called again.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>

#include "waiting.h"

namespace {

enum Type { FLOAT64 = 0, FLOAT32 = 1, BFLOAT16 = 2, FLOAT16 = 3, NONE = 4 };
constexpr int64_t ITEM_BYTES[] = {8, 4, 2, 2};

// What a rank brings to a part, compared by all: a rank in another operation would otherwise be read as if it agreed.
struct Brought {
  int64_t kind;
  int64_t amount;
};

// Two cache lines, because processors fetch them in pairs: no rank's spinning slows another's writing.
struct alignas(128) Line {
  std::atomic<uint32_t> sequence;
  std::atomic<uint32_t> sleepers;
  std::atomic<uint32_t> left;
  Brought brought[2];
};
static_assert(sizeof(Line) == 128, "the segment's size is computed in Python too");

float load(float x) { return x; }
double load(double x) { return x; }
void store(float* to, float x) { *to = x; }
void store(double* to, double x) { *to = x; }

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
};

float load(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

void store(BFloat16* to, float x) {
  uint32_t bits = to_bits(x);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  // to nearest, ties to even
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = static_cast<uint16_t>(nan ? 0x7fc0 : rounded);
}

struct Float16 {
  uint16_t bits;
};

float load(Float16 x) {
  uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  uint32_t rest = x.bits & 0x7fff;
  // the exponent's bias moves from 15 to 127; a subnormal number is the difference of two normal ones
  float normal = from_bits((rest << 13) + 0x38000000);
  float subnormal = from_bits((rest << 13) + 0x38800000) - from_bits(0x38800000);
  float finite = rest < 0x400 ? subnormal : normal;
  uint32_t bits = rest >= 0x7c00 ? (0x7f800000 | (rest & 0x3ff) << 13) : to_bits(finite);
  return from_bits(sign | bits);
}

void store(Float16* to, float x) {
  uint32_t bits = to_bits(x);
  uint32_t sign = (bits >> 16) & 0x8000;
  uint32_t rest = bits & 0x7fffffff;
  // normal numbers: rebias, round to nearest with ties to even
  uint32_t normal = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
  // subnormal ones: adding 0.5 leaves the mantissa, in units of 2^-24 and rounded by the processor, in the lowest bits
  uint32_t subnormal = to_bits(from_bits(rest) + 0.5f) - 0x3f000000;
  uint32_t found = rest < 0x38800000 ? subnormal : normal;
  found = found > 0x7c00 ? 0x7c00 : found;
  found = rest >= 0x47800000 ? 0x7c00 : found;
  found = rest > 0x7f800000 ? 0x7e00 : found;
  to->bits = static_cast<uint16_t>(sign | found);
}

constexpr int64_t SMALL_PART = 8;  // of a slot: where there is less, a second meeting costs more than it saves

struct Group {
  char* base;
  int size;
  int me;
  int64_t slot_bytes;
  Spin spin;
  uint32_t sequence;  // of the meeting that is under way
  uint32_t part;      // of which the slots hold the pieces; counted through all operations
  bool shares;        // the slots hold shares of the sum
  bool under_way;     // stays so where an operation was given up: its results, and the order of parts, are lost

  const char* in;
  char* out;
  int64_t rows;           // of the gathered tensor: all dims before the gathered one
  const int64_t* widths;  // bytes per row that each rank brings
  int64_t stride;         // bytes per row of the result
  int64_t bytes;          // of my own piece
  int64_t longest;        // piece of any rank
  int64_t offset;         // of the part in every piece
  Type type;
  Brought mine;

  Line* line(int rank) const { return reinterpret_cast<Line*>(base) + rank; }

  char* slot(int rank) const {
    char* slots = base + size * sizeof(Line);
    return slots + (rank * 2 + (part & 1)) * slot_bytes;
  }

  bool arrived(int rank, std::memory_order order) const {
    // numbers wrap around: the difference does not
    return static_cast<int32_t>(line(rank)->sequence.load(order) - sequence) >= 0;
  }
};

// Tells the others that my slot is filled.
void show(Group* g) {
  g->sequence += 1;
  Line* mine = g->line(g->me);
  mine->brought[g->sequence & 1] = g->mine;
  count_up(&mine->sequence, g->sequence, &mine->sleepers);
}

void put(Group* g) {
  g->part += 1;
  int64_t bytes = std::min(g->slot_bytes, g->bytes - g->offset);
  if (bytes > 0) std::memcpy(g->slot(g->me), g->in + g->offset, bytes);
  show(g);
}

// out[begin:end] = the sum of everyone's slots there; `out` may be my own slot.
template <typename T>
void sum(const Group* g, T* out, int64_t begin, int64_t end) {
  using Wide = decltype(load(T{}));
  constexpr int64_t BLOCK = 512;  // sums of a block stay in the nearest cache
  Wide total[BLOCK];
  for (int64_t start = begin; start < end; start += BLOCK) {
    int64_t length = std::min(BLOCK, end - start);
    // in order of rank, on every rank: the same bits everywhere
    const T* first = reinterpret_cast<const T*>(g->slot(0)) + start;
    for (int64_t i = 0; i < length; ++i) total[i] = load(first[i]);
    for (int rank = 1; rank < g->size; ++rank) {
      const T* piece = reinterpret_cast<const T*>(g->slot(rank)) + start;
      for (int64_t i = 0; i < length; ++i) total[i] += load(piece[i]);
    }
    for (int64_t i = 0; i < length; ++i) store(out + start + i, total[i]);
  }
}

// Sums my share into my slot, or all of the part into the result; false: the shares are to be collected.
template <typename T>
bool reduce(Group* g) {
  int64_t bytes = std::min(g->slot_bytes, g->bytes - g->offset), count = bytes / static_cast<int64_t>(sizeof(T));
  char* out = g->out + g->offset;
  if (g->shares) {
    for (int rank = 0; rank < g->size; ++rank) {
      int64_t begin = count * rank / g->size * sizeof(T), end = count * (rank + 1) / g->size * sizeof(T);
      std::memcpy(out + begin, g->slot(rank) + begin, end - begin);
    }
    g->shares = false;
  } else if (g->size >= 3 && bytes >= g->slot_bytes / SMALL_PART) {
    sum(g, reinterpret_cast<T*>(g->slot(g->me)), count * g->me / g->size, count * (g->me + 1) / g->size);
    g->shares = true;
  } else {
    sum(g, reinterpret_cast<T*>(out), 0, count);
  }
  return !g->shares;
}

void gather(const Group* g) {
  int64_t column = 0;
  for (int rank = 0; rank < g->size; column += g->widths[rank++]) {
    int64_t width = g->widths[rank];
    const char* from = g->slot(rank);
    int64_t at = g->offset, end = std::min(g->offset + g->slot_bytes, width * g->rows);
    while (at < end) {
      int64_t row = at / width, inside = at % width;
      int64_t length = std::min(width - inside, end - at);
      std::memcpy(g->out + row * g->stride + column + inside, from, length);
      from += length;
      at += length;
    }
  }
}

// What to do when all have come; false: they are to meet again.
bool take(Group* g) {
  switch (g->type) {
    case FLOAT64: return reduce<double>(g);
    case FLOAT32: return reduce<float>(g);
    case BFLOAT16: return reduce<BFloat16>(g);
    case FLOAT16: return reduce<Float16>(g);
    case NONE: break;
  }
  gather(g);
  return true;
}

bool all_agree(const Group* g) {
  for (int rank = 0; rank < g->size; ++rank) {
    Brought other = g->line(rank)->brought[g->sequence & 1];
    if (other.kind != g->mine.kind || other.amount != g->mine.amount) return false;
  }
  return true;
}

}  // namespace

extern "C" {

// `base`: a mapped segment, filled with zeros when it was made.
Group* group_new(void* base, int size, int me, int64_t slot_bytes) {
  Group* g = new (std::nothrow) Group{};
  if (g == nullptr) return nullptr;
  g->base = static_cast<char*>(base);
  g->size = size;
  g->me = me;
  g->slot_bytes = slot_bytes;
  return g;
}

void group_free(Group* g) { delete g; }

// Waits for the others, and goes on to the next parts. WAITING: call it again.
int group_advance(Group* g, int64_t patience_ns) {
  for (;;) {
    int64_t deadline_ns = now_ns() + patience_ns;
    for (int rank = 0; rank < g->size; ++rank) {
      if (g->arrived(rank, std::memory_order_acquire)) continue;
      Line* line = g->line(rank);
      auto arrived = [g, rank] { return g->arrived(rank, std::memory_order_acquire); };
      int status = wait_for(&g->spin, &line->sequence, &line->sleepers, &line->left, arrived, deadline_ns);
      if (status != DONE) return status;
    }
    if (!all_agree(g)) {
      g->under_way = false;  // everyone sees it, at this part: the next operation finds all together again
      return DISAGREE;
    }
    if (!take(g)) {
      show(g);
      continue;
    }
    g->offset += g->slot_bytes;
    if (g->offset >= g->longest) {
      g->under_way = false;
      return DONE;
    }
    put(g);
  }
}

// in[count] -> out[count]: the sum of all ranks' in. They may be the same memory.
int group_all_reduce(Group* g, const void* in, void* out, int64_t count, int type, int64_t patience_ns) {
  if (g->under_way) return BROKEN;
  g->in = static_cast<const char*>(in);
  g->out = static_cast<char*>(out);
  g->type = static_cast<Type>(type);
  g->bytes = g->longest = count * ITEM_BYTES[type];
  g->offset = 0;
  g->shares = false;
  g->under_way = true;
  g->mine = {type, count};
  put(g);
  return group_advance(g, patience_ns);
}

// in[rows, widths[me]] -> out[rows, sum(widths)], in bytes; `widths` must outlive the operation.
int group_all_gather(Group* g, const void* in, void* out, int64_t rows, const int64_t* widths, int64_t patience_ns) {
  if (g->under_way) return BROKEN;
  g->in = static_cast<const char*>(in);
  g->out = static_cast<char*>(out);
  g->type = NONE;
  g->rows = rows;
  g->widths = widths;
  g->stride = g->longest = 0;
  for (int rank = 0; rank < g->size; ++rank) {
    g->stride += widths[rank];
    g->longest = std::max(g->longest, rows * widths[rank]);
  }
  g->bytes = rows * widths[g->me];
  g->offset = 0;
  g->shares = false;
  g->under_way = true;
  g->mine = {NONE, rows * g->stride};
  put(g);
  return group_advance(g, patience_ns);
}

int group_has_arrived(const Group* g, int rank) { return g->arrived(rank, std::memory_order_acquire) ? 1 : 0; }

// What `rank` brought to the part at which the ranks disagree.
void group_brought(const Group* g, int rank, int64_t* kind, int64_t* amount) {
  Brought brought = g->line(rank)->brought[g->sequence & 1];
  *kind = brought.kind;
  *amount = brought.amount;
}

// This rank takes part in nothing any more; those that wait for it learn it at once.
void group_leave(Group* g) {
  g->under_way = true;  // so that a later operation of this rank is refused
  Line* mine = g->line(g->me);
  mine->left.store(1, std::memory_order_release);
  wake_all(&mine->sequence);
}

}  // extern "C"
