// Products of few rows with a matrix that is read once, as it lies in memory; see few_rows.py.
//
// Up to 4 rows: lanes are neighbours in a row, and each result is a sum over lanes. More: the rows are transposed first,
// lanes are neighbouring rows, and every number of the matrix is multiplied with all of them; sums are taken in parts of
// PART numbers, which are then summed. What a result is made of does not depend on threads or on its neighbours.
// While a tile is multiplied, the tile behind it comes from memory. Numbers of bfloat16 are summed as float32, and
// results rounded once.

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace {

constexpr int LANES = 8;
constexpr int LINE = 16;             // floats of a line of the caches
constexpr int64_t PART = 512;        // numbers that are summed one after the other
constexpr int64_t GROUP = 240;       // rows that are prepared together, of whole blocks
constexpr int64_t PANEL_BYTES = 1 << 17;  // of the matrix, which all rows take before the next one comes

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

struct BFloat16 {
  uint16_t bits;
};

struct Product {
  const float* x;
  int64_t rows, x_stride;
  const void* w;
  int64_t columns, w_stride;
  const void* bias;  // may be null
  void* out;
  int64_t out_stride, inner;
  const float* turned;  // x, transposed in blocks of rows
  int64_t chunk;
  std::atomic<int64_t> next;

  template <typename Number>
  const Number* weights(int64_t column) const {
    return static_cast<const Number*>(w) + column * w_stride;
  }
};

inline Vec load(const float* at) { return *reinterpret_cast<const Unaligned*>(at); }

inline Vec load(const BFloat16* at) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}

template <typename Number>
inline Vec load_some(const Number* at, int64_t count) {
  Number some[LANES] = {};
  memcpy(some, at, count * sizeof(Number));
  return load(some);
}

inline float wide(float x) { return x; }

inline float wide(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float found;
  memcpy(&found, &bits, sizeof found);
  return found;
}

inline void put(float x, float* at) { *at = x; }

inline void put(float x, BFloat16* at) {  // to the nearest, to even between two
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  at->bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <typename Number>
inline void put(const Product& p, int64_t row, int64_t column, float sum) {
  const float bias = p.bias ? wide(static_cast<const Number*>(p.bias)[column]) : 0.0f;
  put(sum + bias, static_cast<Number*>(p.out) + row * p.out_stride + column);
}

// The sums of four vectors' lanes.
inline __m128 sums(Vec a, Vec b, Vec c, Vec d) {
  __m256 of_four = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
  return _mm_add_ps(_mm256_castps256_ps128(of_four), _mm256_extractf128_ps(of_four, 1));
}

// -- lanes along a row -------------------------------------------------------------------------------------------------

template <int ROWS, int COLUMNS, typename Number>
inline void along(const Product& p, int64_t column, bool more) {
  const float* x = p.x;
  const Number* w = p.weights<Number>(column);
  Vec sum[ROWS * COLUMNS] = {};
  int64_t i = 0;
  const Number* behind = w + (more ? COLUMNS * p.w_stride : 0);
  if (ROWS == 1) {  // all time goes into reading: the processor sees where to itself, but for where rows begin
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) __builtin_prefetch(behind + c * p.w_stride, 0, 3);
  }
  for (; i + LANES <= p.inner; i += LANES) {
    Vec some[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) some[r] = load(x + r * p.x_stride + i);
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) {
      if (ROWS > 1) __builtin_prefetch(behind + c * p.w_stride + i, 0, 2);
      Vec weight = load(w + c * p.w_stride + i);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sum[r * COLUMNS + c] += some[r] * weight;
    }
  }
  if (i < p.inner) {
    for (int c = 0; c < COLUMNS; ++c) {
      Vec weight = load_some(w + c * p.w_stride + i, p.inner - i);
      for (int r = 0; r < ROWS; ++r) sum[r * COLUMNS + c] += load_some(x + r * p.x_stride + i, p.inner - i) * weight;
    }
  }
  float found[(ROWS * COLUMNS + 3) / 4 * 4];
  for (int each = 0; each < ROWS * COLUMNS; each += 4) {
    const Vec none = {};
    auto at = [&](int j) { return each + j < ROWS * COLUMNS ? sum[each + j] : none; };
    _mm_storeu_ps(found + each, sums(at(0), at(1), at(2), at(3)));
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c) put<Number>(p, r, column + c, found[r * COLUMNS + c]);
}

template <int ROWS, int COLUMNS, typename Number>
void all_along(Product& p, int64_t first, int64_t end) {
  int64_t c = first;
  for (; c + COLUMNS <= end; c += COLUMNS) along<ROWS, COLUMNS, Number>(p, c, c + 2 * COLUMNS <= p.columns);
  for (; c < end; ++c) along<ROWS, 1, Number>(p, c, false);
}

// -- lanes across rows -------------------------------------------------------------------------------------------------

// behind: the same part of the tile behind, of numbers `behind_stride` apart from row to row; null: there is none.
template <int BLOCKS, int COLUMNS, bool MORE, typename Number>
inline void part(Vec (&sum)[COLUMNS][BLOCKS], const float* turned, const float* w, int64_t w_stride, int64_t count,
                 const Number* behind, int64_t behind_stride) {
  int64_t i = 0;
  for (; i + LINE <= count; i += LINE) {
    if (MORE) {
#pragma GCC unroll 16
      for (int c = 0; c < COLUMNS; ++c) __builtin_prefetch(behind + c * behind_stride + i, 0, 2);
    }
#pragma GCC unroll 4
    for (int64_t j = i; j < i + LINE; ++j) {
      Vec some[BLOCKS];
#pragma GCC unroll 8
      for (int b = 0; b < BLOCKS; ++b) some[b] = load(turned + (j * BLOCKS + b) * LANES);
#pragma GCC unroll 16
      for (int c = 0; c < COLUMNS; ++c) {
        const float weight = w[c * w_stride + j];
#pragma GCC unroll 8
        for (int b = 0; b < BLOCKS; ++b) sum[c][b] += some[b] * weight;
      }
    }
  }
  for (; i < count; ++i)
    for (int c = 0; c < COLUMNS; ++c)
      for (int b = 0; b < BLOCKS; ++b) sum[c][b] += load(turned + (i * BLOCKS + b) * LANES) * w[c * w_stride + i];
}

template <int BLOCKS, int COLUMNS, typename Number>
void across(const Product& p, int64_t row, int64_t column, bool more) {
  const int64_t rows = p.rows - row < BLOCKS * LANES ? p.rows - row : BLOCKS * LANES;
  const float* turned = p.turned + row * p.inner;
  const Number* w = p.weights<Number>(column);
  Vec total[COLUMNS][BLOCKS] = {};
  for (int64_t i = 0; i < p.inner; i += PART) {
    Vec sum[COLUMNS][BLOCKS] = {};
    const int64_t count = p.inner - i < PART ? p.inner - i : PART;
    const Number* behind = w + (more ? COLUMNS * p.w_stride : 0) + i;
    const float* some = turned + i * BLOCKS * LANES;
    auto multiply = [&](const float* from, int64_t stride) {
      if (more) {
        part<BLOCKS, COLUMNS, true>(sum, some, from, stride, count, behind, p.w_stride);
      } else {
        part<BLOCKS, COLUMNS, false>(sum, some, from, stride, count, behind, p.w_stride);
      }
    };
    if constexpr (std::is_same_v<Number, float>) {
      multiply(w + i, p.w_stride);
    } else {
      alignas(64) float own[COLUMNS][PART + LINE];
      for (int c = 0; c < COLUMNS; ++c) {
        const Number* from = w + c * p.w_stride + i;
        int64_t j = 0;
        for (; j + LANES <= count; j += LANES) *reinterpret_cast<Unaligned*>(own[c] + j) = load(from + j);
        for (; j < count; ++j) own[c][j] = wide(from[j]);
      }
      multiply(own[0], PART + LINE);
    }
    for (int c = 0; c < COLUMNS; ++c)
      for (int b = 0; b < BLOCKS; ++b) total[c][b] += sum[c][b];
  }
  float found[COLUMNS][BLOCKS * LANES];
  memcpy(found, total, sizeof found);
  for (int64_t r = 0; r < rows; ++r)
    for (int c = 0; c < COLUMNS; ++c) put<Number>(p, row + r, column + c, found[c][r]);
}

template <int BLOCKS, int COLUMNS, typename Number>
void all_across(Product& p, int64_t first, int64_t end) {
  const int64_t panel = COLUMNS * (1 + PANEL_BYTES / (COLUMNS * p.inner * int64_t(sizeof(Number))));
  for (int64_t start = first; start < end; start += panel) {
    const int64_t stop = end - start < panel ? end : start + panel;
    for (int64_t row = 0; row < p.rows; row += BLOCKS * LANES) {
      int64_t c = start;
      for (; c + COLUMNS <= stop; c += COLUMNS)
        across<BLOCKS, COLUMNS, Number>(p, row, c, row == 0 && c + 2 * COLUMNS <= p.columns);
      for (; c < stop; ++c) across<BLOCKS, 1, Number>(p, row, c, false);
    }
  }
}

// An 8 x 8 part of x to `turned`, whose rows are `size` long.
inline void turn_tile(const float* x, int64_t x_stride, int64_t rows, float* turned, int64_t size) {
  __m256 a[LANES], b[LANES];
#pragma GCC unroll 8
  for (int r = 0; r < LANES; ++r) a[r] = r < rows ? _mm256_loadu_ps(x + r * x_stride) : _mm256_setzero_ps();
#pragma GCC unroll 4
  for (int r = 0; r < LANES; r += 2) {
    b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < LANES; r += 4) {
    a[r] = _mm256_shuffle_ps(b[r], b[r + 2], 0x44);
    a[r + 1] = _mm256_shuffle_ps(b[r], b[r + 2], 0xee);
    a[r + 2] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0x44);
    a[r + 3] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    _mm256_storeu_ps(turned + r * size, _mm256_permute2f128_ps(a[r], a[r + 4], 0x20));
    _mm256_storeu_ps(turned + (r + 4) * size, _mm256_permute2f128_ps(a[r], a[r + 4], 0x31));
  }
}

// x[row, i] to block row / size, place (i, row % size); rows that fill up the last block are zeros.
void turn(const Product& p, float* turned, int64_t size) {
  for (int64_t row = 0; row < p.rows; row += size, turned += size * p.inner) {
    int64_t i = 0;
    for (; i + LANES <= p.inner; i += LANES)
      for (int64_t r = 0; r < size; r += LANES)
        turn_tile(p.x + (row + r) * p.x_stride + i, p.x_stride, p.rows - row - r, turned + i * size + r, size);
    for (; i < p.inner; ++i)
      for (int64_t r = 0; r < size; ++r)
        turned[i * size + r] = row + r < p.rows ? p.x[(row + r) * p.x_stride + i] : 0.0f;
  }
}

// -- threads -----------------------------------------------------------------------------------------------------------

typedef void Columns(Product&, int64_t, int64_t);

struct Work {
  Product* product;
  Columns* columns;
};

void take_chunks(void* given) {
  Work& work = *static_cast<Work*>(given);
  Product& p = *work.product;
  for (;;) {
    const int64_t start = p.next.fetch_add(p.chunk, std::memory_order_relaxed);
    if (start >= p.columns) return;
    work.columns(p, start, p.columns - start < p.chunk ? p.columns : start + p.chunk);
  }
}

template <typename Number>
constexpr Columns* ALONG[] = {
    all_along<1, 4, Number>, all_along<2, 4, Number>, all_along<3, 4, Number>, all_along<4, 3, Number>};

template <typename Number>
constexpr Columns* ACROSS[] = {all_across<1, 6, Number>, all_across<2, 6, Number>, all_across<3, 4, Number>};

struct Memory {
  float* at = nullptr;
  size_t bytes = 0;
  ~Memory() { free(at); }
  float* of(size_t wanted) {
    if (bytes < wanted) {
      free(at);
      bytes = 0;
      at = static_cast<float*>(aligned_alloc(64, (wanted + 63) / 64 * 64));
      if (at) bytes = wanted;
    }
    return at;
  }
};

thread_local Memory memory;

// The sizes are those of `few_rows`.
template <typename Number>
int multiply(Product& p, const Number* x, int64_t x_stride, int threads,
             void (*parallel)(void (*)(void*), void*, unsigned, unsigned)) {
  const int64_t by_two = (p.rows + 2 * LANES - 1) / (2 * LANES) * 2;
  const int64_t by_three = (p.rows + 3 * LANES - 1) / (3 * LANES) * 3;
  const int64_t blocks = p.rows <= 4 ? 0 : p.rows <= LANES ? 1 : by_two <= by_three ? 2 : 3, size = blocks * LANES;
  const int64_t padded = blocks ? (p.rows + size - 1) / size * size : 0;
  constexpr bool is_wide = std::is_same_v<Number, float>;
  const int64_t numbers = (padded + (is_wide ? 0 : p.rows)) * p.inner;
  float* own = nullptr;
  if (numbers && !(own = memory.of(size_t(numbers) * sizeof(float)))) return 1;
  if constexpr (is_wide) {
    p.x = x;
    p.x_stride = x_stride;
  } else {
    float* rows = own + padded * p.inner;
    for (int64_t r = 0; r < p.rows; ++r)
      for (int64_t i = 0; i < p.inner; ++i) rows[r * p.inner + i] = wide(x[r * x_stride + i]);
    p.x = rows;
    p.x_stride = p.inner;
  }
  if (blocks) turn(p, own, size);
  p.turned = own;
  Work work{&p, blocks ? ACROSS<Number>[blocks - 1] : ALONG<Number>[p.rows - 1]};
  if (threads > 1) {
    // whole tiles of every kind, several for each thread
    constexpr int64_t TILES = 12;
    p.chunk = (p.columns / (4 * threads) / TILES + 1) * TILES;
    parallel(take_chunks, &work, unsigned(threads), 0);
  } else {
    work.columns(p, 0, p.columns);
  }
  return 0;
}

template <typename Number>
int in_groups(Product& p, const Number* x, int64_t x_stride, int threads,
              void (*parallel)(void (*)(void*), void*, unsigned, unsigned)) {
  const int64_t rows = p.rows;
  for (int64_t row = 0; row < rows; row += GROUP) {
    p.rows = rows - row < GROUP ? rows - row : GROUP;
    p.next = 0;
    if (const int failed = multiply(p, x + row * x_stride, x_stride, threads, parallel)) return failed;
    p.out = static_cast<Number*>(p.out) + GROUP * p.out_stride;
  }
  return 0;
}

}  // namespace

extern "C" {

// out[rows, columns] = x[rows, inner] w[columns, inner]^T + bias, strides in numbers; rows, inner > 0. All are float32,
// or all bfloat16 (is_half). parallel: GOMP_parallel of the threads that torch uses, where there are several.
// 0: done, 1: no memory.
int few_rows(const void* x, int64_t rows, int64_t x_stride, const void* w, int64_t columns, int64_t w_stride,
             const void* bias, void* out, int64_t out_stride, int64_t inner, int is_half, int threads,
             void (*parallel)(void (*)(void*), void*, unsigned, unsigned)) {
  Product p{nullptr, rows, 0, w, columns, w_stride, bias, out, out_stride, inner, nullptr, columns, {0}};
  return is_half ? in_groups(p, static_cast<const BFloat16*>(x), x_stride, threads, parallel)
                 : in_groups(p, static_cast<const float*>(x), x_stride, threads, parallel);
}

}  // extern "C"
